"""A folder of image files, one folder a class: ROOT/train/CLASS/*.png and ROOT/test/CLASS/* (or ROOT/val/CLASS/*)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from robust_moe.data.dataset import DATASETS, MOST_SIDE, FolderDataSet
from robust_moe.data.decode import EncodedConfig, decode_images, read_image_file
from robust_moe.data.image_set import DataError, ImageSet
from robust_moe.data.image_tree import SUFFIXES, ImageTree
from robust_moe.settings import hint, setting

__all__ = ["ImageFolder"]


@DATASETS.register("image_folder")
class ImageFolder(FolderDataSet):
    """Every image below ``data.root``, decoded into memory at ``data.image_size`` (N * C * size^2 bytes).

    Classes are the folders of ROOT/train in alphabetical order; images lie in them at any depth. Read are the files
    that torchvision's ``ImageFolder`` reads, in its order: links are followed, and names that do not end as an image's
    are passed over. Names that begin with a dot are passed over too, at every depth, which torchvision does not do; a
    link to a folder that it is in counts as an image that cannot be read.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EncodedConfig):
        """Settings of a folder of images."""

        image_size: int | None = setting(
            None,
            "side that images are scaled to cover and cut to the centre of; required to load them",
            unit="pixels",
            at_least=1,
            at_most=MOST_SIDE,
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
        train, test = (_load(folder, names, size, self.config.on_error) for folder in (root / "train", test_folder))
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


def _load(folder: Path, class_names: tuple[str, ...], size: int, on_error: Literal["stop", "skip"]) -> ImageSet:
    tree = ImageTree(folder, on_error)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = tree.images(name) if (folder / name).is_dir() else []
        if not found and folder.name == "train":
            raise DataError(f"{folder / name}: expected images ({', '.join(SUFFIXES)}), got none")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{folder}: expected images ({', '.join(SUFFIXES)}), got none")
    images, kept, notes = decode_images(
        len(files), lambda i: read_image_file(files[i]), lambda i: str(files[i]), size, on_error
    )
    name = f"image_folder:{folder.resolve().parent.name}"
    return ImageSet(images, torch.tensor(labels)[kept], class_names, name, (*tree.notes(), *notes))
