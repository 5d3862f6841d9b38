"""A folder of image files, one folder a class: ROOT/train/CLASS/*.png and ROOT/test/CLASS/* (or ROOT/val/CLASS/*)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robust_moe.data.dataset import DATASETS, FolderDataSet
from robust_moe.data.decode import decode_images
from robust_moe.data.image_set import DataError, ImageSet
from robust_moe.settings import hint, setting

__all__ = ["ImageFolder"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@DATASETS.register("image_folder")
class ImageFolder(FolderDataSet):
    """Every image below ``data.root``, decoded into memory at ``data.image_size`` (N * C * size^2 bytes).

    Classes are the folders of ROOT/train in alphabetical order; images lie in them at any depth and come in the order
    of their paths. Files whose names do not end as an image's are passed over.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FolderDataSet.Config):
        """Settings of a folder of images."""

        image_size: int | None = setting(
            None,
            "side that images are scaled to cover and cut to the centre of; required to load them",
            unit="pixels",
            at_least=1,
        )

    config: Config
    files = "train/CLASS/*.png and test/CLASS/*.png"

    def load(self) -> tuple[ImageSet, ImageSet]:
        root, size = self.root, self.config.image_size
        if size is None:
            raise DataError("data.image_size: expected the side in pixels for data.name=image_folder, got null")
        test_folder = root / "test" if (root / "test").is_dir() else root / "val"
        names = _class_names(root / "train")
        for name in _class_names(test_folder):
            if name not in names:
                near = hint(name, names)
                raise DataError(f"{test_folder / name}: expected a class of {root / 'train'}, got {name!r}{near}")
        train, test = (_load(folder, names, size) for folder in (root / "train", test_folder))
        if train.channels != test.channels:
            expected = f"{train.channels} channels, as {root / 'train'}"
            raise DataError(f"{test_folder}: expected {expected}, got {test.channels}")
        return train, test


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder with one folder a class, got none")
    names = tuple(sorted(item.name for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")))
    if not names:
        raise DataError(f"{folder}: expected one folder a class, got no folder in it")
    return names


def _load(folder: Path, class_names: tuple[str, ...], size: int) -> ImageSet:
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
    images = decode_images(len(files), lambda i: files[i].read_bytes(), lambda i: str(files[i]), size)
    return ImageSet(images, torch.tensor(labels), class_names, f"image_folder:{folder.resolve().parent.name}")
