"""Fashion-MNIST from IDX files in a folder, plain or gzipped.

Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", arXiv:1708.07747. IDX: two zero bytes, a type code, the
number of dimensions, one big-endian uint32 a dimension, then the values.
"""

from __future__ import annotations

import gzip
import math
import zlib
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.dataset import DATASETS, FolderDataSet
from robust_moe.data.image_set import DataError, ImageSet, check_labels, resize

__all__ = ["FashionMNIST", "read_idx"]

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CHUNK = 2**20  # bytes read at a time
WHERE = "e.g. /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist"


@DATASETS.register("fashion_mnist")
class FashionMNIST(FolderDataSet):
    """60,000 training and 10,000 test images, 1 channel, 28x28 pixels, 10 classes."""

    files = f"Fashion-MNIST's IDX files ({WHERE})"

    def load(self) -> tuple[ImageSet, ImageSet]:
        size = self.config.image_size
        return _load_part(self.root, "train", size), _load_part(self.root, "t10k", size)


def _load_part(root: Path, part: str, size: int | None) -> ImageSet:
    image_file = _find(root, f"{part}-images-idx3-ubyte")
    label_file = _find(root, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1).to(torch.int64)
    if len(images) != len(labels):
        raise DataError(f"{label_file}: expected {len(images)} labels, as images in {image_file}, got {len(labels)}")
    check_labels(labels, len(CLASS_NAMES), label_file)
    return ImageSet(resize(images.unsqueeze(1), size), labels, CLASS_NAMES, "fashion_mnist")


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{root / name}: expected this file or {name}.gz, got neither; data.root is the folder, {WHERE}")


def read_idx(path: Path, ndim: int) -> Tensor:
    """The values of an IDX file of bytes with ``ndim`` dimensions: uint8 tensor of the shape it states.

    Raises :class:`DataError` for a damaged gzip stream, a wrong magic number, and too few or too many bytes.
    """
    zipped = path.suffix == ".gz"
    with gzip.open(path) if zipped else open(path, "rb") as file:
        try:
            return _values(file, path, ndim)
        except (OSError, EOFError, zlib.error) as error:
            what = "a whole gzip stream" if zipped else "a file"
            raise DataError(f"{path}: expected {what}, got: {error}") from error


def _values(file: gzip.GzipFile | BufferedReader, path: Path, ndim: int) -> Tensor:
    """Reads the header, and then no more than it says: a small gzip file may stand for any number of bytes."""
    start = 4 + 4 * ndim
    data = file.read(start)
    magic = bytes([0, 0, 8, ndim])  # 8: unsigned bytes
    if data[:4] != magic:
        raise DataError(
            f"{path}: expected the magic number {magic.hex()} (bytes in {ndim} dimensions), got {data[:4].hex()!r}"
        )
    if len(data) < start:
        raise DataError(f"{path}: expected a header of {start} bytes, got {len(data)} bytes: truncated")
    shape = [int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4)]
    if 0 in shape:
        raise DataError(f"{path}: expected at least one value, got shape {shape}")
    expected = start + math.prod(shape)
    values = bytearray()
    while len(values) < expected - start and (part := file.read(min(CHUNK, expected - start - len(values)))):
        values += part
    if len(values) < expected - start:
        raise DataError(f"{path}: expected {expected} bytes for shape {shape}, got {start + len(values)}: truncated")
    if file.read(1):
        raise DataError(f"{path}: expected {expected} bytes for shape {shape}, got more: trailing bytes")
    return torch.frombuffer(values, dtype=torch.uint8).reshape(shape)
