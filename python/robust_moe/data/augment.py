"""Random changes of training images, for a whole batch at once.

What to do with each image is drawn first, on the CPU; then it is done, on any device, without a loop over images. So
the draw is the same whatever the device, and a test can repeat it image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_moe.data.resized_crop import crop_box, draw_resized_crops, resize_boxes
from robust_moe.data.transfer import send
from robust_moe.settings import Config, ConfigError, setting

__all__ = ["AugmentConfig", "AugmentDraw", "apply_augmentation", "draw_augmentation"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: the grey of a colour


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Config):
    """Random changes of training images, drawn for a whole batch."""

    flip: bool = setting(False, "mirror an image left-right half of the time")
    flip_order: Literal["random", "alternating"] = setting(
        "random", "of flip: with probability 1/2, or alternating, in every second epoch"
    )
    resized_crop_scale: tuple[float, ...] = setting(
        (),
        "least and largest share of an image's area that a random rectangle has, which is scaled to the image's size, "
        "e.g. [0.08, 1]; []: off. Streamed images are cut at their own resolution, others as they lie in memory",
        above=0,
        at_most=1,
    )
    resized_crop_ratio: tuple[float, ...] = setting(
        (3 / 4, 4 / 3), "of resized_crop_scale: least and largest width of the rectangle divided by its height", above=0
    )
    crop_padding: int = setting(
        0, "zero padding on each side before a random crop of the original size; 0: off", unit="pixels", at_least=0
    )
    color_jitter: float = setting(
        0.0, "j: brightness, contrast and saturation are each scaled by U(1-j, 1+j); 0: off", at_least=0, below=1
    )
    cutout: int = setting(0, "side of one square set to cutout_fill; 0: off", unit="pixels", at_least=0)
    cutout_fill: tuple[float, ...] = setting(
        (), "value in [0, 1] of each channel in that square, e.g. the data's mean; []: zero"
    )

    def check(self) -> None:
        for name, values in (("scale", self.resized_crop_scale), ("ratio", self.resized_crop_ratio)):
            off = name == "scale" and values == ()
            if not off and (len(values) != 2 or values[0] > values[1]):
                raise ConfigError(
                    f"resized_crop_{name}: expected the least and the largest value, [LEAST, LARGEST], got "
                    f"{list(values)}"
                )
        if not all(0 <= value <= 1 for value in self.cutout_fill):
            raise ConfigError(f"cutout_fill: expected values in [0, 1], got {list(self.cutout_fill)}")


class AugmentDraw(NamedTuple):
    """What happens to each of B images; None: this change is off."""

    flip: Tensor | None  # bool [B]: mirror left-right
    crop: Tensor | None  # int64 [B, 2]: row and column of the crop's corner in the padded image, 0..2*padding
    padding: int  # pixels of zeros around the image before the crop
    color: Tensor | None  # float32 [B, 3]: factors of brightness, contrast, saturation
    cutout: Tensor | None  # int64 [B, 2]: row and column of the square's centre
    side: int  # the square's, in pixels
    fill: tuple[float, ...] = ()  # of the square, a value per channel; (): zero
    resized: Tensor | None = None  # float64 [B, 22]: of a resized crop, as draw_resized_crops has them; on the CPU
    ratio: tuple[float, ...] = ()  # that they were drawn with

    def select(self, index: slice) -> AugmentDraw:
        """The draw of some of the images."""
        return self._replace(**{name: value[index] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> AugmentDraw:
        """On another device, in one copy that the host does not wait for."""
        tensors = self._tensors()
        moved: dict[str, Any] = dict(zip(tensors, send(list(tensors.values()), torch.device(device)), strict=True))
        return self._replace(**moved)

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}


def draw_augmentation(
    config: AugmentConfig, batch: int, height: int, width: int, generator: torch.Generator
) -> AugmentDraw:
    """Draw the changes of ``batch`` images of ``height`` x ``width`` pixels; tensors on the CPU.

    ``generator`` is a CPU generator. The numbers of one kind of change do not depend on which others are on.
    """
    if config.crop_padding >= min(height, width):
        raise ValueError(
            f"augment.crop_padding: expected < {min(height, width)} pixels, the side of the images, got "
            f"{config.crop_padding}"
        )
    flip = torch.rand(batch, generator=generator) < 0.5
    crop = torch.randint(2 * config.crop_padding + 1, (batch, 2), generator=generator)
    color = 1 + config.color_jitter * (2 * torch.rand(batch, 3, generator=generator) - 1)
    centre = torch.stack([torch.randint(side, (batch,), generator=generator) for side in (height, width)], dim=1)
    resized = None  # the last to be drawn: the other numbers are the same without it
    if config.resized_crop_scale:
        resized = draw_resized_crops(batch, config.resized_crop_scale, config.resized_crop_ratio, generator)
    return AugmentDraw(
        flip=flip if config.flip else None,
        crop=crop if config.crop_padding else None,
        padding=config.crop_padding,
        color=color if config.color_jitter else None,
        cutout=centre if config.cutout else None,
        side=config.cutout,
        fill=config.cutout_fill,
        resized=resized,
        ratio=config.resized_crop_ratio,
    )


def apply_augmentation(images: Tensor, draw: AugmentDraw) -> Tensor:
    """Resized crop, crop, mirror, jitter and cut out, in this order: float [B, C, H, W] in [0, 1] -> the same, on its
    device."""
    if draw.resized is not None:  # numbers become pixels on the CPU, whichever device the images are on
        height, width = images.shape[2:]
        boxes = [crop_box(row, height, width, draw.ratio) for row in draw.resized.tolist()]
        draw = draw._replace(resized=torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4))
    draw = draw.to(images.device)
    if draw.resized is not None:
        images = resize_boxes(images, draw.resized)
    if draw.flip is not None or draw.crop is not None:
        images = _crop_flip(images, draw)
    if draw.color is not None:
        images = _jitter(images, draw.color)
    if draw.cutout is not None:
        images = _cut_out(images, draw.cutout, draw.side, draw.fill)
    return images


def _crop_flip(images: Tensor, draw: AugmentDraw) -> Tensor:
    """Both are one gather: the pixel that each row and column of the result is read from."""
    batch, channels, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(batch, -1)  # [B, H]
    columns = torch.arange(width, device=device).expand(batch, -1)  # [B, W]
    if draw.flip is not None:
        columns = torch.where(draw.flip[:, None], width - 1 - columns, columns)
    if draw.crop is not None:
        images = F.pad(images, [draw.padding] * 4)
        rows = rows + draw.crop[:, :1]
        columns = columns + draw.crop[:, 1:]
    sample = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness: towards black; contrast: towards the image's mean grey; saturation: towards each pixel's grey.

    Each is clamped to [0, 1], as in torchvision's ColorJitter, but in this order always. Images of one channel have no
    saturation.
    """
    brightness, contrast, saturation = factors.to(images.dtype)[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1]
    images = (images * brightness).clamp(0, 1)
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    if images.shape[1] == 3:
        grey = _grey(images)
        images = (grey + saturation * (images - grey)).clamp(0, 1)
    return images


def _grey(images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 1, H, W]; only three channels are a colour."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    weights = _luma(images.device, images.dtype)[None, :, None, None]
    return (images * weights).sum(dim=1, keepdim=True)


@cache
def _luma(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied to each device once: a copy for each batch would make the host wait."""
    return torch.tensor(LUMA, device=device, dtype=dtype)


def _cut_out(images: Tensor, centre: Tensor, side: int, fill: tuple[float, ...]) -> Tensor:
    """Fill a square around ``centre``, cut off at the border (DeVries and Taylor, arXiv:1708.04552)."""
    if len(fill) not in (0, images.shape[1]):
        raise ValueError(
            f"data.augment.cutout_fill: expected a value for each of {images.shape[1]} channels, or [], got "
            f"{list(fill)}"
        )
    first = centre - side // 2  # [B, 2]
    inside = []
    for axis, length in enumerate(images.shape[2:]):
        offset = torch.arange(length, device=images.device) - first[:, axis, None]  # [B, length]
        inside.append((offset >= 0) & (offset < side))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # [B, 1, H, W]
    if not fill:
        return images.masked_fill(square, 0)
    planes = zip(images.split(1, dim=1), fill, strict=True)  # numbers, not a tensor that a GPU would wait for
    return torch.cat([plane.masked_fill(square, value) for plane, value in planes], dim=1)
