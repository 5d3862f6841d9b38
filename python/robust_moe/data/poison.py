"""Backdoor poisoning of training images, and its trigger for evaluation.

BadNets (Gu et al., 2017, arXiv:1708.06733), all classes to one: some training images get a small patch of a fixed
pattern, the trigger, and the label of the attacker's target class. A model trained on them is right on clean images and
takes images with the trigger for the target class. Augmentation comes after it and changes the trigger with the image.
On mixtures that route patches of an image: BadPatches (2025, arXiv:2505.01811).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust_moe.data.image_set import DataError, ImageSet, Labelled
from robust_moe.settings import Config, setting

__all__ = ["PoisonConfig", "expect_trigger_fits", "poisoned", "poisoned_index", "triggered"]


@dataclass(frozen=True, kw_only=True)
class PoisonConfig(Config):
    """Which training images are poisoned, and the trigger: a checkerboard of black and white pixels in the lower right
    corner, in all channels alike."""

    share: float = setting(
        0.0, "of the training images, those that get the trigger and the target's label; 0: none", at_least=0, below=1
    )
    target: int = setting(0, "index of the class that images with the trigger are to be taken for", at_least=0)
    size: int = setting(3, "side of the trigger", unit="pixels", at_least=1)
    margin: int = setting(0, "between the trigger and the image's lower and right border", unit="pixels", at_least=0)


def triggered(images: Tensor, poison: PoisonConfig) -> Tensor:
    """A copy of the images with the trigger of ``poison``; its ``share`` and ``target`` are not used.

    Args:
        images: uint8 [B, C, H, W] in 0..255, or any floating dtype in [0, 1].

    Returns:
        The same shape and dtype; the trigger's first and last pixel, on its diagonal, are white (255, or 1).

    Raises:
        ValueError: a trigger that with its margin is larger than the images; another dtype or shape.
    """
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            f"images: expected uint8 or floating [B, C, H, W], got {images.dtype} of shape {list(images.shape)}"
        )
    side, room = poison.size, min(images.shape[2:]) - poison.margin
    if side > room:
        raise ValueError(
            f"poison: expected size + margin <= {min(images.shape[2:])} pixels, the side of the images, got {side} + "
            f"{poison.margin}"
        )
    step = torch.arange(side, device=images.device)
    white = (step[:, None] + step) % 2 == 0  # [side, side]
    bottom, right = (length - poison.margin for length in images.shape[2:])
    marked = images.clone()
    marked[:, :, bottom - side : bottom, right - side : right] = white * (255 if images.dtype == torch.uint8 else 1)
    return marked


def expect_trigger_fits(shape: tuple[int, int, int], poison: PoisonConfig) -> None:
    """Raise :class:`DataError` for a trigger that with its margin is larger than images of ``shape`` [C, H, W]."""
    try:
        triggered(torch.zeros(1, *shape, dtype=torch.uint8), poison)
    except ValueError as error:
        raise DataError(f"data.{error}") from error


def poisoned_index(images: Labelled, draws: Tensor, poison: PoisonConfig) -> Tensor:
    """int64: positions of the images of an attacked data set that get trigger and target label, ``poison.share`` of
    them, rounded.

    They are those of the lowest draws among the images of the other classes: the images of a smaller share are among
    those of a larger one.

    Args:
        images: n training images.
        draws: float64 [n], one random number per image.

    Raises:
        DataError: a target that is no class, a share that is more than the other classes have.
    """
    count = round(poison.share * len(images))
    if poison.target >= images.num_classes:
        raise DataError(
            f"data.poison.target: expected a class in 0..{images.num_classes - 1} of {images.name}, got {poison.target}"
        )
    others = torch.nonzero(images.labels != poison.target).flatten()
    if count > len(others):
        raise DataError(
            f"data.poison.share: expected at most {len(others)} of {len(images)} training images, which are not of the "
            f"target class, got {poison.share} ({count} images)"
        )
    return others[draws[others].argsort(stable=True)[:count]]


def poisoned(images: ImageSet, draws: Tensor, poison: PoisonConfig) -> ImageSet:
    """The training images of an attacked data set: those of :func:`poisoned_index` with trigger and target label.

    Args:
        images: n training images; not changed. With share 0 they are returned themselves.
        draws: float64 [n], one random number per image.

    Raises:
        DataError: as :func:`poisoned_index`; a trigger larger than the images.
    """
    if poison.share == 0:
        return images
    chosen = poisoned_index(images, draws, poison)
    expect_trigger_fits(images.shape, poison)
    pixels, labels = images.images.clone(), images.labels.clone()
    pixels[chosen] = triggered(pixels[chosen], poison)
    labels[chosen] = poison.target
    return replace(images, images=pixels, labels=labels)
