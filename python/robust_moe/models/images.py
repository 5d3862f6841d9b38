"""What a network has to know about its images."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ImageSpec"]


@dataclass(frozen=True)
class ImageSpec:
    """Float images [B, channels, image_size, image_size] in [0, 1], of ``num_classes`` classes.

    mean, std: of the images, one number per channel (:func:`robust_moe.data.channel_statistics`).

    Raises:
        ValueError: a count below 1, or not one mean and one std per channel.
    """

    num_classes: int
    channels: int
    image_size: int  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("num_classes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a count >= 1, got {getattr(self, name)}")
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            if count != self.channels:
                raise ValueError(f"{name}: expected {self.channels} numbers, a channel each, got {count}")
