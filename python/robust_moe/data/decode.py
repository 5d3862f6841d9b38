"""One encoded image (JPEG, PNG, ...) to pixels.

Pillow is the one decoder. Measured on 2 cores (x86-64, Pillow 13): 12,000..18,000 JPEGs a second of 32x32 pixels in
one thread, 50,000 in 3..4 s. torchvision.io.decode_jpeg did 40,000 a second with the same pixels bit for bit, but it
decodes nothing but JPEG and does not import beside every PyTorch build: 2 s are not worth a second path.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from robust_moe.data.image_set import DataError, import_extra

__all__ = ["GREY_MODES", "Readable", "is_transparent", "load_rgb", "open_image", "read_image_file", "scaled_to_cover"]

GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "PA"})
MOST_PIXELS = 2**26  # of an image: decoded, it takes 256 MiB for each thread
MOST_BYTES = 2**28  # of an encoded image


class Readable(Protocol):
    """Numbered encoded images; see :class:`robust_moe.data.encoded.EncodedImages`."""

    def read(self, i: int) -> bytes: ...
    def where(self, i: int) -> str: ...


def read_image_file(path: Path) -> bytes:
    """The content of an image file. Raises OSError or ValueError for what is no file, or is far too large."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, for ever
        raise ValueError("no ordinary file")
    if found.st_size > MOST_BYTES:
        raise ValueError(f"{found.st_size:,} bytes, more than {MOST_BYTES:,}")
    return path.read_bytes()


@contextmanager
def _naming(images: Readable, i: int) -> Iterator[None]:
    """Whatever is wrong with image i is a DataError that names it: Pillow's formats raise OSError, SyntaxError,
    ValueError, struct.error and more."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        unknown = type(error).__name__ == "UnidentifiedImageError"  # its text has an address in memory
        got = "no format that Pillow knows" if unknown else error
        raise DataError(f"{images.where(i)}: expected an image that decodes, got: {got}") from error


def open_image(images: Readable, i: int) -> Any:
    """Pillow's image i: its header is read, its pixels are not decoded yet. Raises :class:`DataError`, which names
    it."""
    image_module = import_extra("PIL.Image", "Pillow", "encoded images")
    with _naming(images, i):
        data = images.read(i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image_module.DecompressionBombWarning)  # the limit is the one below
            image = image_module.open(io.BytesIO(data))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS:,}")
    return image


def load_rgb(images: Readable, i: int, image: Any, look: Callable[[Any], None] = lambda image: None) -> Any:
    """The decoded pixels of ``image``, which :func:`open_image` opened, in three channels: grey three times, without
    transparency. ``look`` is shown the decoded image as it was. Raises :class:`DataError` for one that does not decode,
    or has another number of bits a channel than 8."""
    with _naming(images, i):
        image.load()
    if image.mode not in GREY_MODES | COLOUR_MODES:
        raise DataError(f"{images.where(i)}: expected an image of 8 bits a channel, got mode {image.mode!r}")
    look(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def scaled_to_cover(image: Any, height: int, width: int) -> Any:
    """The image scaled to cover the rectangle (bilinear) and cut to its centre."""
    bilinear = import_extra("PIL.Image", "Pillow", "encoded images").Resampling.BILINEAR
    return import_extra("PIL.ImageOps", "Pillow", "encoded images").fit(image, (width, height), bilinear)


def is_transparent(image: Any) -> bool:
    """Whether any pixel of a decoded image is not opaque."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return False
    alpha = image.convert("RGBA").getchannel("A")
    return bool(alpha.getextrema()[0] < 255)
