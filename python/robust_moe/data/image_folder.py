"""A folder of image files, one folder a class: ROOT/train/CLASS/*.png and ROOT/test/CLASS/* (or ROOT/val/CLASS/*)."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import DataConfig
from .decode import decode_images
from .image_set import DataError, ImageSet, nearest

__all__ = ["load_image_folder"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def load_image_folder(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    """Every image below ``config.root``, decoded into memory at ``config.image_size`` (N * C * size^2 bytes).

    Classes are the folders of ROOT/train in alphabetical order; images lie in them at any depth and come in the order
    of their paths. Files whose names do not end as an image's are passed over.
    """
    if config.root is None:
        raise DataError("data.root: expected a folder with train/CLASS/*.png and test/CLASS/*.png, got null")
    if config.image_size is None:
        raise DataError("data.image_size: expected the side in pixels for data.name=image_folder, got null")
    root = Path(config.root)
    test_folder = root / "test" if (root / "test").is_dir() else root / "val"
    class_names = _class_names(root / "train")
    for name in _class_names(test_folder):
        if name not in class_names:
            hint = nearest(name, class_names)
            raise DataError(f"{test_folder / name}: expected a class of {root / 'train'}, got {name!r}{hint}")
    train, test = (_load(folder, class_names, config) for folder in (root / "train", test_folder))
    if train.channels != test.channels:
        raise DataError(f"{test_folder}: expected {train.channels} channels, as {root / 'train'}, got {test.channels}")
    return train, test


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with one folder a class, got none")
    names = tuple(sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")))
    if not names:
        raise DataError(f"{folder}: expected one folder a class, got no folder in it")
    return names


def _load(folder: Path, class_names: tuple[str, ...], config: DataConfig) -> ImageSet:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found and folder.name == "train":
            raise DataError(f"{folder / name}: expected images ({', '.join(sorted(SUFFIXES))}), got none")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), got none")
    images = decode_images(len(files), lambda i: files[i].read_bytes(), lambda i: str(files[i]), config.image_size)
    return ImageSet(images, torch.tensor(labels), class_names, f"image_folder:{folder.resolve().parent.name}")
