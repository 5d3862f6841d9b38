"""Random resized crops: a rectangle of random area and shape is cut out and scaled to the side of the images.

Source: C. Szegedy et al., "Going Deeper with Convolutions", 2015 (arXiv:1409.4842), in the form of torchvision's
``RandomResizedCrop``: ten attempts at a rectangle that fits, then the largest central one of an allowed shape. The
random numbers do not depend on the size of an image, so they are drawn before it is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["crop_box", "draw_resized_crops", "resize_boxes"]

ATTEMPTS = 10
NUMBERS = 2 * ATTEMPTS + 2  # of an image: share of the area and shape of each attempt, then the place of the corner


def draw_resized_crops(
    batch: int, scale: tuple[float, ...], ratio: tuple[float, ...], generator: torch.Generator
) -> Tensor:
    """float64 [batch, 22]: the numbers that :func:`crop_box` makes a rectangle of.

    Args:
        scale: least and largest share of an image's area.
        ratio: least and largest width divided by height; its logarithm is uniform.
    """
    numbers = torch.rand(batch, NUMBERS, dtype=torch.float64, generator=generator)
    share, shape = numbers[:, 0 : 2 * ATTEMPTS : 2], numbers[:, 1 : 2 * ATTEMPTS : 2]
    share.mul_(scale[1] - scale[0]).add_(scale[0])
    shape.mul_(math.log(ratio[1] / ratio[0])).add_(math.log(ratio[0])).exp_()
    return numbers


def crop_box(numbers: Sequence[float], height: int, width: int, ratio: tuple[float, ...]) -> tuple[int, int, int, int]:
    """(top, left, height, width) in pixels of the crop of an image of ``height`` x ``width``; ``numbers``: a row of
    :func:`draw_resized_crops`, drawn with this ``ratio``."""
    for attempt in range(ATTEMPTS):
        area, shape = numbers[2 * attempt] * height * width, numbers[2 * attempt + 1]
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            down, right = numbers[-2:]
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    own = width / height
    if own < ratio[0]:
        w, h = width, min(max(round(width / ratio[0]), 1), height)
    elif own > ratio[1]:
        w, h = min(max(round(height * ratio[1]), 1), width), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def resize_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Each image's rectangle scaled to the whole image, bilinear: float [B, C, H, W] and int64 [B, 4] (top, left,
    height, width) -> float [B, C, H, W]. A rectangle is no larger than the image, so nothing has to be smoothed first;
    pixels outside of it have no part in the result."""
    _, _, height, width = images.shape
    top, left, h, w = boxes.unbind(1)
    sample = torch.arange(len(images), device=images.device)[:, None]

    def between(first: Tensor, length: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of ``side`` places, the two pixels that it lies between, and the weight of the second, all [B, side];
        centres of pixels are at halves."""
        steps = torch.arange(side, device=images.device, dtype=images.dtype) + 0.5
        place = (steps * (length[:, None] / side) - 0.5).clamp(min=0)
        before = place.long().clamp(max=length[:, None] - 1)
        after = (before + 1).clamp(max=length[:, None] - 1)
        return first[:, None] + before, first[:, None] + after, place - before

    above, below, weight = between(top, h, height)
    rows = images.transpose(1, 2)  # [B, H, C, W]
    images = torch.lerp(rows[sample, above], rows[sample, below], weight[:, :, None, None]).transpose(1, 2)
    before, after, weight = between(left, w, width)
    columns = images.permute(0, 3, 1, 2)  # [B, W, C, H]
    mixed = torch.lerp(columns[sample, before], columns[sample, after], weight[:, :, None, None])
    return mixed.permute(0, 2, 3, 1).contiguous()
