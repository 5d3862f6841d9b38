"""TinyImageNet as its archive unpacks: wnids.txt, train/CLASS/images, val/images and val/val_annotations.txt.

Source: Y. Le and X. Yang, "Tiny ImageNet Visual Recognition Challenge", Stanford CS 231N, 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from robust_moe.data.dataset import DATASETS
from robust_moe.data.encoded import EncodedPart, ImageFiles
from robust_moe.data.encoded_source import EncodedDataSet
from robust_moe.data.image_set import DataError
from robust_moe.data.image_tree import SUFFIXES, ImageTree
from robust_moe.settings import hint, shown

__all__ = ["TinyImageNet"]

NAME = "tiny_imagenet"
CLASSES, ANNOTATIONS = "wnids.txt", "val_annotations.txt"
MOST_BYTES = 2**24  # of a list of classes or annotations; the original's has 0.4 MB


@DATASETS.register("tiny_imagenet")
class TinyImageNet(EncodedDataSet):
    """100,000 training and 10,000 test images, 3 channels, 64x64 pixels, 200 classes, named by their WordNet ids.

    The test images are the archive's validation part; its test part has no labels, and is not read. Classes are in
    alphabetical order, as torchvision's ``ImageFolder`` numbers the folders of train. A tree whose validation images
    were sorted into folders, val/CLASS, is read by ``data.name=image_folder``.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EncodedDataSet.Config):
        """Settings of TinyImageNet."""

    config: Config
    always_colour = True
    files = f"{CLASSES}, train and val of tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip)"

    def parts(self) -> tuple[EncodedPart, EncodedPart]:
        root = self.root
        wnids = _wnids(root / CLASSES)
        tree = ImageTree(_folder(root / "train"), self.config.on_error)
        files, labels = _training_files(tree, wnids)
        test_files, test_labels = _annotated(_folder(root / "val"), wnids)
        return (
            EncodedPart(ImageFiles(root, files), torch.tensor(labels), wnids, NAME, root / "train", tree.notes()),
            EncodedPart(ImageFiles(root, test_files), torch.tensor(test_labels), wnids, NAME, root / "val"),
        )


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder, as the archive of TinyImageNet has it, got none")
    return path


def _lines(file: Path, what: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not empty, with their numbers."""
    if not file.is_file():
        raise DataError(f"{file}: expected a file with {what}, got none")
    if file.stat().st_size > MOST_BYTES:
        raise DataError(f"{file}: expected at most {MOST_BYTES:,} bytes, got {file.stat().st_size:,}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected {what} as text, got: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file}: expected {what}, got an empty file")
    return lines


def _wnids(file: Path) -> tuple[str, ...]:
    """The classes, sorted."""
    wnids: dict[str, int] = {}
    for number, line in _lines(file, "a class a line"):
        name = line.strip()
        if not _plain(name):
            raise DataError(f"{file}: line {number}: expected the name of a folder in train, got {shown(name)}")
        if name in wnids:
            raise DataError(
                f"{file}: line {number}: expected each class once, got {name!r} of line {wnids[name]} again"
            )
        wnids[name] = number
    return tuple(sorted(wnids))


def _plain(name: str) -> bool:
    """Whether this is the name of something in a folder, and no path out of it."""
    return not (name.startswith(".") or "/" in name or "\\" in name or "\0" in name)


def _training_files(tree: ImageTree, wnids: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    found = {item.name for item in tree.folder.iterdir() if item.is_dir() and not item.name.startswith(".")}
    for name in sorted(found.difference(wnids)):
        raise DataError(f"{tree.folder / name}: expected a class of {CLASSES}, got {name!r}{hint(name, wnids)}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(wnids):
        folder = tree.folder / name / "images"
        if not folder.is_dir():
            raise DataError(f"{folder}: expected a folder with the images of a class of {CLASSES}, got none")
        images = tree.images(f"{name}/images")
        if not images:
            raise DataError(f"{folder}: expected images ({', '.join(SUFFIXES)}), got none")
        files += images
        labels += [label] * len(images)
    return files, labels


def _annotated(val: Path, wnids: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """The validation images in the order of their annotations: ``FILE<tab>CLASS<tab>box``."""
    file, folder = val / ANNOTATIONS, _folder(val / "images")
    if not file.is_file():
        near = "; data.name=image_folder reads val/CLASS folders" if _has_class_folders(val, wnids) else ""
        raise DataError(f"{file}: expected a file with an image and its class a line, got none{near}")
    label_of = {name: label for label, name in enumerate(wnids)}
    labels: dict[str, int] = {}  # of the images by name
    for number, line in _lines(file, "an image and its class a line"):
        image, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0].strip()
        where = f"{file}: line {number}"
        if not rest or not _plain(image):
            raise DataError(f"{where}: expected the name of an image, a tab and its class, got {shown(line)}")
        if wnid not in label_of:
            raise DataError(f"{where}: expected a class of {CLASSES}, got {shown(wnid)}{hint(wnid, wnids)}")
        if image in labels:
            raise DataError(f"{where}: expected each image once, got {image!r} again")
        labels[image] = label_of[wnid]
    present = {item.name for item in folder.iterdir() if item.name.lower().endswith(SUFFIXES) and _plain(item.name)}
    for name in sorted(present.difference(labels)):
        raise DataError(f"{folder / name}: expected a line in {ANNOTATIONS}, got none")
    return [folder / name for name in labels], list(labels.values())


def _has_class_folders(val: Path, wnids: tuple[str, ...]) -> bool:
    return any((val / name).is_dir() for name in wnids)
