"""Labelled images that are decoded when a batch asks for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.decode import GREY_MODES, load_rgb, open_image, scaled_to_cover
from robust_moe.data.decode_all import Side, decode_all, expect_side
from robust_moe.data.encoded import EncodedImages
from robust_moe.data.image_set import DataError, ImageSet, LabelledImages, import_extra
from robust_moe.data.poison import PoisonConfig, expect_trigger_fits, poisoned_index, triggered
from robust_moe.data.resized_crop import crop_box

__all__ = ["StreamedSet"]


@dataclass(frozen=True, eq=False)
class StreamedSet(LabelledImages):
    """Labelled images in files, of which a batch's are decoded at a time.

    images: N encoded images
    labels: int64 [N], positions in ``class_names``
    class_names: one name a class
    name: the data set's, e.g. ``image_folder:flowers``
    side: what becomes of an image's size
    grey: one channel; a coloured image is refused then. False: three
    on_error: "stop" at an image that cannot be read, or "skip" it: the next one that can takes its place in the batch
    workers: processes that decode, 0: the training's own; None: as many as seem useful
    notes: what was passed over, one sentence each
    poison, poisoned: the trigger, and bool [N]: which images get it; None: none
    """

    images: EncodedImages
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    side: Side
    grey: bool
    on_error: str = "stop"
    workers: int | None = None
    notes: tuple[str, ...] = ()
    poison: PoisonConfig | None = None
    poisoned: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1 if self.grey else 3, self.side.height, self.side.width

    def subset(self, index: Tensor) -> Self:
        poisoned = None if self.poisoned is None else self.poisoned[index]
        return replace(self, images=self.images.select(index), labels=self.labels[index], poisoned=poisoned)

    def with_backdoor(self, draws: Tensor, poison: PoisonConfig) -> StreamedSet:
        """As :func:`robust_moe.data.poison.poisoned` of images in memory."""
        if poison.share == 0:
            return self
        chosen = poisoned_index(self, draws, poison)
        expect_trigger_fits(self.shape, poison)
        labels, marked = self.labels.clone(), torch.zeros(len(self), dtype=torch.bool)
        labels[chosen], marked[chosen] = poison.target, True
        return replace(self, labels=labels, poison=poison, poisoned=marked)

    def decoded(self) -> ImageSet:
        found = decode_all(self.images, self.side, self.on_error, cure="fewer of them (-n, or data.train_limit)")
        if self.grey and not found.grey:
            first = next(i for i in found.kept.tolist() if open_image(self.images, i).mode not in GREY_MODES)
            raise self._in_colour(first)
        pixels = found.tensor(self.shape[0])
        if self.poison is not None and self.poisoned is not None:
            chosen = self.poisoned[found.kept]
            pixels[chosen] = triggered(pixels[chosen], self.poison)
        labels, origin = self.labels[found.kept], self.images.select(found.kept)
        return ImageSet(pixels, labels, self.class_names, self.name, (*self.notes, *found.notes), origin)

    def pixels(self, i: int, crop: Sequence[float] | None = None, ratio: tuple[float, ...] = ()) -> np.ndarray:
        """Image i, decoded: uint8 [C, H, W].

        Args:
            crop: numbers of a random resized crop, drawn with ``ratio``: what of the image, at its own resolution, is
                scaled to [H, W]; None: all of it, as :meth:`decoded` has it.

        Raises:
            DataError: it cannot be read, or is of another size or in colour where that is refused; names it.
        """
        image = open_image(self.images, i)
        if self.grey and image.mode not in GREY_MODES:
            raise self._in_colour(i)
        if crop is not None:
            image = self._cropped(i, image, crop, ratio)
        else:
            image = load_rgb(self.images, i, image)
            if self.side.scaled:
                image = scaled_to_cover(image, self.side.height, self.side.width)
            expect_side(image, self.side, self.images.where(i))
        pixels: np.ndarray = np.asarray(image).transpose(2, 0, 1)[: self.shape[0]]
        if self.poison is not None and self.poisoned is not None and self.poisoned[i]:
            pixels = triggered(torch.from_numpy(pixels.copy())[None], self.poison)[0].numpy()
        return pixels

    def _cropped(self, i: int, image: Any, crop: Sequence[float], ratio: tuple[float, ...]) -> Any:
        """JPEG's decoder leaves out what the result is too small to show: a crop of twice the side or more costs a
        quarter of the time or less."""
        width, height = image.size
        top, left, h, w = crop_box(crop, height, width, ratio)
        image.draft(image.mode, (math.ceil(width * self.side.width / w), math.ceil(height * self.side.height / h)))
        image = load_rgb(self.images, i, image)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + w) * across, (top + h) * down)
        bilinear = import_extra("PIL.Image", "Pillow", "encoded images").Resampling.BILINEAR
        return image.resize((self.side.width, self.side.height), bilinear, box=box)

    def _in_colour(self, i: int) -> DataError:
        return DataError(f"{self.images.where(i)}: expected a grey image, as those are that were looked at, got colour")
