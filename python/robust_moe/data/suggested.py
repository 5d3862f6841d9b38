"""Settings under which the images in ``data.root`` are read, where those of a preset do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robust_moe.data.dataset import DataSet
from robust_moe.data.folder_layout import class_folders, find_layout
from robust_moe.data.image_folder import ImageFolder
from robust_moe.data.image_kind import IMAGE_KINDS
from robust_moe.data.image_set import DataError
from robust_moe.data.image_tree import SUFFIXES
from robust_moe.data.tiny_imagenet import CLASSES

__all__ = ["suggesting_settings", "without_expectation"]

LOOKED_AT = 100  # entries of a class folder: one image among them is enough


@contextmanager
def suggesting_settings(config: DataSet.Config) -> Iterator[None]:
    """A DataError inside, where ``config.root`` holds images in class folders and ``config`` is for other files, says
    so, and has the ``settings`` that read them."""
    try:
        yield
    except DataError as error:
        root = getattr(config, "root", None)
        if root is None or isinstance(config, ImageFolder.Config) or not _holds_images(Path(root)):
            raise
        name = ImageFolder.Config.name
        better = DataError(f"{error}; {root} holds images in class folders, which data.name={name} reads")
        better.settings = (f"data.name={name}", *without_expectation(config))
        raise better from error


def without_expectation(config: DataSet.Config) -> tuple[str, ...]:
    """Settings that run the configuration on images of another kind than ``config.expects``, at that kind's size, for
    which its networks were chosen."""
    if config.expects is None:
        return ()
    size = () if config.image_size is not None else (f"data.image_size={IMAGE_KINDS[config.expects].size}",)
    return ("data.expects=null", *size)


def _holds_images(root: Path) -> bool:
    """Whether these are class folders with images, and not TinyImageNet's archive with something wrong in it."""
    try:
        layout = find_layout(root)
        inside = [path for name in class_folders(layout.train)[:2] for path in _some(layout.train / name)]
    except (DataError, OSError):
        return False
    return not (root / CLASSES).exists() and any(path.suffix.lower() in SUFFIXES for path in inside)


def _some(folder: Path) -> list[Path]:
    return [path for path, _ in zip(folder.rglob("*"), range(LOOKED_AT), strict=False)]
