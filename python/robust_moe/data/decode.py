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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.image_set import DataError, import_extra

__all__ = ["decode_images"]

GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "PA"})
THREADS_FROM = 96 * 96  # pixels
CHUNK = 128  # images a task


def decode_images(count: int, read: Callable[[int], bytes], where: Callable[[int], str], size: int | None) -> Tensor:
    """Decode ``count`` images of 8 bits a channel into uint8 [count, C, H, W]; C is 1 if all are grey, else 3.

    read: the encoded bytes of image i; may raise OSError
    where: how to name image i in an error
    size: side in pixels: the image is scaled to cover the square (bilinear) and cut to its centre; None: as it is,
        and then all must be of one size
    Transparency is dropped. Raises :class:`DataError` for the first image that cannot be used.
    """
    if count == 0:
        raise DataError(f"{where(0)}: expected at least one image, got none")
    image_module = import_extra("PIL.Image", "Pillow", "encoded images")
    fit = import_extra("PIL.ImageOps", "Pillow", "encoded images").fit

    def decode(i: int) -> Any:
        try:
            with image_module.open(io.BytesIO(read(i))) as image:
                image.load()
        except Exception as error:  # Pillow's formats raise OSError, SyntaxError, ValueError, struct.error, ...
            raise DataError(f"{where(i)}: expected an image that decodes, got: {error}") from error
        if image.mode not in GREY_MODES | COLOUR_MODES:
            raise DataError(f"{where(i)}: expected an image of 8 bits a channel, got mode {image.mode!r}")
        return image

    first = decode(0)
    large = first.size[0] * first.size[1] >= THREADS_FROM
    width, height = first.size if size is None else (size, size)
    pixels = np.empty((count, 3, height, width), dtype=np.uint8)
    grey = np.zeros(count, dtype=bool)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, count)):
            image = decode(i)
            grey[i] = image.mode in GREY_MODES
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
    return torch.from_numpy(pixels[:, :1].copy() if grey.all() else pixels)
