"""Encoded images (JPEG, PNG, ...) to one uint8 tensor.

Pillow is the one decoder. Measured on 2 cores (x86-64, Pillow 13): 12,000..18,000 JPEGs a second of 32x32 pixels in
one thread, 50,000 in 3..4 s. torchvision.io.decode_jpeg did 40,000 a second with the same pixels bit for bit, but it
decodes nothing but JPEG and does not import beside every PyTorch build: 2 s are not worth a second path. Two threads
help from about 100 pixels a side (256 pixels: 2,115 -> 3,554 a second) and cost below that (32 pixels: 11,700 ->
9,300), where Python's part of the work dominates.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.dataset import FolderDataSet
from robust_moe.data.image_set import DataError, expect_room, import_extra, listed
from robust_moe.settings import setting

__all__ = ["Decoded", "EncodedConfig", "decode_images", "read_image_file", "read_image_sizes"]

GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "PA"})
THREADS_FROM = 96 * 96  # pixels
CHUNK = 128  # images a task
MOST_PIXELS = 2**26  # of an image: decoded, it takes 256 MiB for each thread
MOST_BYTES = 2**28  # of an encoded image


@dataclass(frozen=True, kw_only=True)
class EncodedConfig(FolderDataSet.Config):
    """Settings of sources of encoded images."""

    on_error: Literal["stop", "skip"] = setting(
        "stop", "an image that cannot be read: stop; skip: leave it out, and count and name it"
    )


class Decoded(NamedTuple):
    """Images, and what was left out."""

    images: Tensor  # uint8 [M, C, H, W]; C is 1 if all are grey, else 3
    kept: Tensor  # int64 [M], ascending: positions among all images
    notes: tuple[str, ...]  # what was left out and what was converted, one sentence each; nothing where all are alike


def read_image_file(path: Path) -> bytes:
    """The content of an image file. Raises OSError or ValueError for what is no file, or is far too large."""
    _expect_image_file(path)
    return path.read_bytes()


def _expect_image_file(path: Path) -> None:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, for ever
        raise ValueError("no ordinary file")
    if found.st_size > MOST_BYTES:
        raise ValueError(f"{found.st_size:,} bytes, more than {MOST_BYTES:,}")


def read_image_sizes(paths: Sequence[Path]) -> Tensor:
    """[M, 2] int64: width and height of those images whose headers can be read, in their order; no pixel is decoded."""
    image_module = import_extra("PIL.Image", "Pillow", "encoded images")
    sizes = []
    for path in paths:
        try:
            _expect_image_file(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
                with image_module.open(path) as image:
                    sizes.append(image.size)
        except Exception:  # decoding raises it again, and says which image it is
            continue
    return torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)


def decode_images(
    count: int,
    read: Callable[[int], bytes],
    where: Callable[[int], str],
    size: int | None,
    on_error: Literal["stop", "skip"] = "stop",
) -> Decoded:
    """Decode ``count`` images of 8 bits a channel.

    read: the encoded bytes of image i; may raise OSError
    where: how to name image i in an error
    size: side in pixels: the image is scaled to cover the square (bilinear) and cut to its centre; None: as it is,
        and then all must be of one size
    on_error: leave out images that cannot be used, or stop at the first
    Where some are in colour, grey ones get three equal channels; transparency is dropped; the notes name both. Raises
    :class:`DataError` for the first image that cannot be used; with ``skip`` where none can, and for images of several
    sizes; and for more images than memory.
    """
    if count == 0:
        raise DataError(f"{where(0)}: expected at least one image, got none")
    image_module = import_extra("PIL.Image", "Pillow", "encoded images")
    fit = import_extra("PIL.ImageOps", "Pillow", "encoded images").fit

    def decode(i: int) -> Any:
        try:
            data = read(i)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", image_module.DecompressionBombWarning)  # the limit is the one below
                image = image_module.open(io.BytesIO(data))
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS:,}")
            with image:
                image.load()
        except Exception as error:  # Pillow's formats raise OSError, SyntaxError, ValueError, struct.error, ...
            unknown = isinstance(error, image_module.UnidentifiedImageError)  # its text has an address in memory
            got = "no format that Pillow knows" if unknown else error
            raise DataError(f"{where(i)}: expected an image that decodes, got: {got}") from error
        if image.mode not in GREY_MODES | COLOUR_MODES:
            raise DataError(f"{where(i)}: expected an image of 8 bits a channel, got mode {image.mode!r}")
        return image

    faults: dict[int, DataError] = {}

    def decode_or_skip(i: int) -> Any:
        try:
            return decode(i)
        except DataError as error:
            if on_error == "stop":
                raise
            faults[i] = error
            return None

    first = next((image for image in map(decode_or_skip, range(count)) if image is not None), None)
    if first is None:
        raise DataError(f"expected an image that can be read, got none of {count}, the first of them: {faults[0]}")
    large = first.size[0] * first.size[1] >= THREADS_FROM
    width, height = first.size if size is None else (size, size)
    expect_room(count * 3 * height * width, f"{where(0)}: {count:,} images of {width}x{height} pixels")
    pixels = np.empty((count, 3, height, width), dtype=np.uint8)
    grey, transparent = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, count)):
            image = decode_or_skip(i)
            if image is None:
                continue
            grey[i] = image.mode in GREY_MODES
            transparent[i] = _is_transparent(image)
            if image.mode != "RGB":
                image = image.convert("RGB")
            if size is not None:
                image = fit(image, (size, size), image_module.Resampling.BILINEAR)
            if image.size != (width, height):
                got = f"{image.size[0]}x{image.size[1]}"
                raise DataError(
                    f"{where(i)}: expected {width}x{height} pixels, as the first image, got {got}; "
                    "data.image_size brings all to one size"
                )
            pixels[i] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count() if large else 1) as pool:
        for _ in pool.map(fill, range(0, count, CHUNK)):  # in order: the first bad image is the one reported
            pass
    kept = np.array([i for i in range(count) if i not in faults])
    if faults:
        pixels = pixels[kept]
    images = torch.from_numpy(pixels[:, :1].copy() if grey.all() else pixels)
    notes = []
    if faults:
        named = listed([str(faults[i]) for i in sorted(faults)], "; ")
        notes.append(f"left out {len(faults)} of {count} images, which cannot be read (data.on_error=skip): {named}")
    others = grey[kept].any() and not grey[kept].all()
    for marked, what in (
        (grey[kept] & others, "grey images to colour, as the others are"),
        (transparent[kept], "images with transparent parts to opaque ones"),
    ):
        if marked.any():
            named = listed([where(int(i)) for i in kept[marked]], most=3)
            notes.append(f"converted {int(marked.sum()):,} of {len(kept):,} {what}: {named}")
    return Decoded(images, torch.from_numpy(kept), tuple(notes))


def _is_transparent(image: Any) -> bool:
    """Whether any pixel is not opaque."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    alpha = image.convert("RGBA").getchannel("A")
    return bool(alpha.getextrema()[0] < 255)
