"""Kinds of images that recipes are for: the values of ``data.expects``."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["IMAGE_KINDS", "ImageKind"]


class ImageKind(NamedTuple):
    """What a recipe takes for granted about its images."""

    classes: int
    channels: int
    size: int  # pixels a side

    def __str__(self) -> str:
        return f"{self.classes} classes, {self.channels}x{self.size}x{self.size}"


IMAGE_KINDS: dict[str, ImageKind] = {
    "cifar10": ImageKind(10, 3, 32),
    "cifar100": ImageKind(100, 3, 32),
    "fashion_mnist": ImageKind(10, 1, 28),
    "tiny_imagenet": ImageKind(200, 3, 64),
}
"""By name; the images may come from any source, such as a Parquet folder of the same set."""
