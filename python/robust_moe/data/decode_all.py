"""Many encoded images to one uint8 tensor in memory, and a look at their headers.

Two threads help from about 100 pixels a side (256 pixels: 2,115 -> 3,554 a second) and cost below that (32 pixels:
11,700 -> 9,300), where Python's part of the work dominates.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.decode import GREY_MODES, is_transparent, load_rgb, open_image, scaled_to_cover
from robust_moe.data.encoded import EncodedImages
from robust_moe.data.image_set import DataError, expect_room, listed
from robust_moe.data.progress import Task, silent

__all__ = ["Decoded", "Headers", "OtherSize", "Side", "decode_all", "read_headers", "spread"]

THREADS_FROM = 96 * 96  # pixels
CHUNK = 128  # images a task


@dataclass(frozen=True)
class Side:
    """What becomes of an image's size."""

    height: int
    width: int
    scaled: bool  # to cover this rectangle, and cut to its centre; False: every image must have this size


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images, and what was left out."""

    pixels: np.ndarray  # uint8 [M, 3, H, W]
    kept: Tensor  # int64 [M], ascending: positions among all images
    grey: bool  # whether all of them are
    notes: tuple[str, ...]  # what was left out and what was converted, one sentence each; nothing where all are alike

    def tensor(self, channels: int) -> Tensor:
        """uint8 [M, channels, H, W]; one channel of grey images, or three."""
        return torch.from_numpy(self.pixels[:, :1].copy() if channels == 1 else self.pixels)


@dataclass(frozen=True, eq=False)
class Headers:
    """What the headers of images say; no pixel is decoded."""

    sizes: Tensor  # int64 [M, 2]: width and height of those that can be read
    grey: bool  # whether all of them are


def spread(count: int, most: int) -> Tensor:
    """int64: ``most`` positions spread evenly over ``count``, or all of them."""
    return torch.arange(count) if count <= most else torch.arange(most) * count // most


def read_headers(images: EncodedImages, task: Task = silent) -> Headers:
    """Of those images whose headers can be read, in their order; decoding the others says what is wrong with them."""
    sizes, grey = [], True
    with task("looking at images", len(images)) as advance:
        for i in range(len(images)):
            try:
                image = open_image(images, i)
            except DataError:
                continue
            finally:
                advance(1)
            sizes.append(image.size)
            grey = grey and image.mode in GREY_MODES
    images.forget()
    return Headers(torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2), grey)


def decode_all(
    images: EncodedImages,
    side: Side,
    on_error: str = "stop",
    *,
    what: str = "images",
    cure: str = "",
    task: Task = silent,
) -> Decoded:
    """Decode images of 8 bits a channel into memory.

    on_error: leave out images that cannot be used ("skip"), or "stop" at the first
    what: they are, for the progress
    cure: what helps where they are more than memory
    The notes name grey images among coloured ones and transparent ones. Raises :class:`DataError` for the first image
    that cannot be used; with ``skip`` where none can, and for images of several sizes; and for more than memory.
    """
    count, height, width = len(images), side.height, side.width
    if count:
        expect_room(
            count * 3 * height * width, f"{images.where(0)}: {count:,} images of {width}x{height} pixels", cure=cure
        )
    pixels = np.empty((count, 3, height, width), dtype=np.uint8)
    grey, transparent = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
    faults: dict[int, DataError] = {}

    def fill(i: int) -> None:
        def look(image: Any) -> None:
            grey[i] = image.mode in GREY_MODES
            transparent[i] = is_transparent(image)

        image = load_rgb(images, i, open_image(images, i), look)
        if side.scaled:
            image = scaled_to_cover(image, height, width)
        expect_side(image, side, images.where(i) if image.size != (width, height) else "")
        pixels[i] = np.asarray(image).transpose(2, 0, 1)

    def fill_chunk(start: int) -> int:
        end = min(start + CHUNK, count)
        for i in range(start, end):
            try:
                fill(i)
            except OtherSize:
                raise
            except DataError as error:
                if on_error == "stop":
                    raise
                faults[i] = error
        return end - start

    large = height * width >= THREADS_FROM
    with ThreadPoolExecutor(os.cpu_count() if large else 1) as pool, task(f"reading {what}", count) as advance:
        for done in pool.map(fill_chunk, range(0, count, CHUNK)):  # in order: the first bad image is the one reported
            advance(done)
    images.forget()
    if count and len(faults) == count:
        raise DataError(f"expected an image that can be read, got none of {count}, the first of them: {faults[0]}")
    kept = np.array([i for i in range(count) if i not in faults], dtype=np.int64)
    if faults:
        pixels, grey, transparent = pixels[kept], grey[kept], transparent[kept]
    notes = []
    if faults:
        named = listed([str(faults[i]) for i in sorted(faults)], "; ")
        notes.append(f"left out {len(faults)} of {count} images, which cannot be read (data.on_error=skip): {named}")
    for marked, kind in (
        (grey & (not grey.all()), "grey images to colour, as the others are"),
        (transparent, "images with transparent parts to opaque ones"),
    ):
        if marked.any():
            named = listed([images.where(int(i)) for i in kept[marked]], most=3)
            notes.append(f"converted {int(marked.sum()):,} of {len(kept):,} {kind}: {named}")
    return Decoded(pixels, torch.from_numpy(kept), bool(grey.all()), tuple(notes))


class OtherSize(DataError):
    """An image of another size than the others: no damage that could be left out."""


def expect_side(image: Any, side: Side, where: str) -> None:
    """Raise :class:`OtherSize` for an image that is not of that size."""
    if image.size != (side.width, side.height):
        got = f"{image.size[0]}x{image.size[1]}"
        raise OtherSize(
            f"{where}: expected {side.width}x{side.height} pixels, as the first image, got {got}; "
            "data.image_size brings all to one size"
        )
