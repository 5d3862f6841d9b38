"""A folder of image files, one folder a class: ROOT/train/CLASS/*.png and ROOT/test/CLASS/* (or ROOT/val/CLASS/*)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from robust_moe.data.dataset import DATASETS, MOST_SIDE, FolderDataSet
from robust_moe.data.decode import EncodedConfig, decode_images, read_image_file
from robust_moe.data.image_set import DataError, ImageSet, listed
from robust_moe.settings import hint, setting

__all__ = ["ImageFolder"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # torchvision's
DEEPEST = 100  # folders below a class


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


class _Tree:
    """The classes' images below ``folder``, and what is not read of it."""

    def __init__(self, folder: Path, on_error: str) -> None:
        self.folder, self.on_error = folder, on_error
        self.hidden: list[str] = []  # what begins with a dot, below which nothing is looked at
        self.others: list[str] = []  # files whose names do not end as an image's
        self.left_out: list[str] = []  # folders that cannot be read, and why
        self.classless = [entry.name for entry in self._entries(folder) if not entry.is_dir()]

    def images(self, name: str) -> list[Path]:
        """Those of a class in the order of torchvision's ``ImageFolder``: by the folder's path, then by the name."""
        found = sorted(self._walk(self.folder / name, ()), key=lambda pair: str(pair[0]))
        return [path for _, paths in found for path in paths]

    def notes(self) -> tuple[str, ...]:
        """What was passed over and left out: how many, and their names."""
        passed_over = {
            "hidden names": self.hidden,
            "files whose names do not end as an image's": self.others,
            "files that lie in no class": self.classless,
        }
        notes = [f"passed over {len(names)} {what}: {listed(names)}" for what, names in passed_over.items() if names]
        if self.left_out:
            why = "which cannot be read (data.on_error=skip)"
            notes.append(f"left out {len(self.left_out)} folders, {why}: {listed(self.left_out, '; ')}")
        return tuple(f"{self.folder}: {note}" for note in notes)

    def _walk(self, folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[Path, list[Path]]]:
        """Each folder, links followed, with its images; ``above``: device and inode of the folders that it is in."""
        try:
            status = folder.stat()
            this = (status.st_dev, status.st_ino)
            if this in above:
                raise OSError(f"a link to a folder that it is in, {folder.resolve()}")
            if len(above) == DEEPEST:
                raise OSError(f"a folder in more than {DEEPEST} others")
            entries = self._entries(folder)
        except OSError as error:
            fault = f"{folder}: expected a folder that can be read, got: {error}"
            if self.on_error == "stop":
                raise DataError(fault) from error
            self.left_out.append(fault)
            return
        images, folders = [], []
        for entry in entries:
            if entry.is_dir():
                folders.append(Path(entry.path))
            elif entry.name.lower().endswith(SUFFIXES):
                images.append(Path(entry.path))
            else:
                self.others.append(self._name(entry))
        yield folder, images
        for below in folders:
            yield from self._walk(below, (*above, this))

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, in the order of the names, hidden names apart."""
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        self.hidden += [self._name(entry) for entry in entries if entry.name.startswith(".")]
        return [entry for entry in entries if not entry.name.startswith(".")]

    def _name(self, entry: os.DirEntry[str]) -> str:
        return str(Path(entry.path).relative_to(self.folder))


def _load(folder: Path, class_names: tuple[str, ...], size: int, on_error: Literal["stop", "skip"]) -> ImageSet:
    tree = _Tree(folder, on_error)
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
