"""CIFAR-10 and CIFAR-100 in torchvision's layout.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..config import DataConfig
from .image_set import DataError, ImageSet, check_labels, import_extra, resize

__all__ = ["load_cifar10", "load_cifar100"]


def load_cifar10(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """50,000 training and 10,000 test images, 3 channels, 32x32 pixels, 10 classes."""
    return _load(config, "CIFAR10")


def load_cifar100(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """50,000 training and 10,000 test images, 3 channels, 32x32 pixels, 100 classes."""
    return _load(config, "CIFAR100")


def _load(config: DataConfig, kind: str) -> tuple[ImageSet, ImageSet]:
    source = getattr(import_extra("torchvision.datasets", "torchvision", f"data.name={config.name}"), kind)
    how = f"python -c \"import torchvision; torchvision.datasets.{kind}('FOLDER', download=True)\""
    if config.root is None:
        raise DataError(f"data.root: expected the folder of {kind}, got null; to download it: {how}")
    folder = Path(config.root) / source.base_folder
    for name, digest in [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]:
        _check_file(folder / name, digest, how)
    parts = [source(config.root, train=train, download=False) for train in (True, False)]
    train, test = (_image_set(part, config) for part in parts)
    return train, test


def _check_file(path: Path, digest: str, how: str) -> None:
    """torchvision only says "not found or corrupted"; this names the file. It also guards the unpickling."""
    if not path.is_file():
        raise DataError(f"{path}: expected a file, got none; to download it: {how}")
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != digest:
        raise DataError(
            f"{path}: expected MD5 {digest}, got {found} ({path.stat().st_size} bytes): truncated or changed"
        )


def _image_set(part: Any, config: DataConfig) -> ImageSet:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(part.targets, dtype=torch.int64)
    check_labels(labels, len(part.classes), Path(part.root) / part.base_folder)
    return ImageSet(resize(images, config.image_size), labels, tuple(part.classes), config.name)
