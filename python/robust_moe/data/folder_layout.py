"""How a folder's images are laid out: in parts, ROOT/train and ROOT/test or ROOT/val, or in one tree of classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from robust_moe.data.image_set import DataError, listed
from robust_moe.data.image_tree import SUFFIXES

__all__ = ["FolderLayout", "class_folders", "find_layout"]

PARTS = ("train", "test", "val")
TEST_PARTS = ("test", "val")  # the first that holds class folders is read
# in small letters, what others name parts: two such folders are no classes
PART_WORDS = {*PARTS, "training", "testing", "valid", "validation", "eval", "dev"}


@dataclass(frozen=True)
class FolderLayout:
    """Where the classes of the training and of the test images are."""

    train: Path  # a folder with one folder per class
    test: Path | None  # likewise; None: the test images are held out of ``train``
    note: str | None  # what was found out, one sentence; None: train and test, and nothing else


def find_layout(root: Path) -> FolderLayout:
    """The layout of ``root``.

    With ROOT/train, its folders are the classes, and the test images are in ROOT/test, or else in ROOT/val. Without it
    the folders of ROOT itself are the classes. A part without class folders, such as test images without labels, is
    passed over.

    Raises:
        DataError: no folder, no class folders in it, or a single class.
    """
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder of images, got none")
    if not (root / "train").is_dir():
        parts = [name for name in TEST_PARTS if (root / name).is_dir()]
        if parts and set(class_folders(root)) <= {*parts, "train"}:
            raise DataError(
                f"{root / 'train'}: expected a folder with one folder per class, beside {parts[0]}, got none"
            )
        _refuse_parts_as_classes(root)
        _expect_classes(root)
        return FolderLayout(root, None, f"{root}: one tree of classes, without train and test")
    train = root / "train"
    _expect_classes(train)
    there = [root / name for name in TEST_PARTS if (root / name).is_dir()]
    labelled = [folder for folder in there if class_folders(folder)]
    others = [root / name for name in class_folders(root) if name not in PARTS and name.lower() in PART_WORDS]
    unread = [folder for folder in (*there, *others) if folder not in labelled[:1]]
    passed_over = f"passed over {listed([folder.name for folder in unread])}" if unread else ""
    if labelled:
        note = f"{root}: the test images are those of {labelled[0].name}; {passed_over}" if unread else None
        return FolderLayout(train, labelled[0], note)
    why = ", which is not named test or val" if others else ", without class folders"
    without = f", and {passed_over}{why}" if unread else ""
    return FolderLayout(train, None, f"{root}: train without labelled test images{without}")


def _refuse_parts_as_classes(root: Path) -> None:
    """Raise DataError for parts under other names than ours, which would be taken for classes, such as Train, Test."""
    parts = [name for name in class_folders(root) if name.lower() in PART_WORDS]
    if len(parts) >= 2:
        raise DataError(
            f"{root}: expected train and test (or val), or one folder per class, got parts under other names, "
            f"{listed(parts)}; rename them, or link to them under those names"
        )


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in ``folder``, sorted; hidden ones apart."""
    with os.scandir(folder) as found:
        return tuple(sorted(entry.name for entry in found if entry.is_dir() and not entry.name.startswith(".")))


def _expect_classes(folder: Path) -> None:
    """Raise DataError unless ``folder`` holds at least two class folders."""
    names = class_folders(folder)
    if len(names) >= 2:
        return
    if not names:
        images = any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
        got = "images without a class" if images else "no folder in it"
        raise DataError(f"{folder}: expected one folder per class, got {got}")
    inside = folder / names[0]
    below = class_folders(inside)
    nested = len(below) >= 2 or any(name in PARTS for name in below)
    near = f"; data.root={inside} reads the {len(below)} folders in it" if nested else ""
    raise DataError(f"{folder}: expected one folder per class, at least two of them, got {names[0]!r} alone{near}")
