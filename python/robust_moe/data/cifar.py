"""CIFAR-10 and CIFAR-100 in torchvision's layout.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import torch

from robust_moe.data.dataset import DATASETS, FolderDataSet
from robust_moe.data.image_set import DataError, ImageSet, check_labels, import_extra, resize

__all__ = ["CIFAR10", "CIFAR100"]

DOWNLOAD = "to download it: python -c \"import torchvision; torchvision.datasets.{}('FOLDER', download=True)\""


@DATASETS.register("cifar10")
class CIFAR10(FolderDataSet):
    """50,000 training and 10,000 test images, 3 channels, 32x32 pixels, 10 classes."""

    files = f"CIFAR10 ({DOWNLOAD.format('CIFAR10')})"
    source: ClassVar[str] = "CIFAR10"  # the class of torchvision.datasets

    def load(self) -> tuple[ImageSet, ImageSet]:
        name = self.config.name
        source = getattr(import_extra("torchvision.datasets", "torchvision", f"data.name={name}"), self.source)
        folder = self.root / source.base_folder
        for file, digest in [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]:
            _check_file(folder / file, digest, DOWNLOAD.format(self.source))
        parts = [source(self.root, train=train, download=False) for train in (True, False)]
        train, test = (_image_set(part, name, self.config.image_size) for part in parts)
        return train, test


@DATASETS.register("cifar100")
class CIFAR100(CIFAR10):
    """50,000 training and 10,000 test images, 3 channels, 32x32 pixels, 100 classes."""

    files = f"CIFAR100 ({DOWNLOAD.format('CIFAR100')})"
    source = "CIFAR100"


def _check_file(path: Path, digest: str, how: str) -> None:
    """torchvision only says "not found or corrupted"; this names the file. It also guards the unpickling."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file, got none; {how}")
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != digest:
        raise DataError(
            f"{path}: expected MD5 {digest}, got {found} ({path.stat().st_size} bytes): truncated or changed"
        )


def _image_set(part: Any, name: str, size: int | None) -> ImageSet:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(part.targets, dtype=torch.int64)
    check_labels(labels, len(part.classes), Path(part.root) / part.base_folder)
    return ImageSet(resize(images, size), labels, tuple(part.classes), name)
