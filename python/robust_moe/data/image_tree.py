"""The image files below a folder, and what is not read of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from robust_moe.data.image_set import DataError, listed

__all__ = ["SUFFIXES", "ImageTree"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # torchvision's
DEEPEST = 100  # folders below a class


class ImageTree:
    """The classes' images below ``folder``, and what is not read of it.

    Args:
        folder: holds a folder for each class.
        on_error: of a folder that cannot be read, "stop" (:class:`DataError`) or "skip".
    """

    def __init__(self, folder: Path, on_error: str) -> None:
        self.folder, self.on_error = folder, on_error
        self.hidden: list[str] = []  # what begins with a dot, below which nothing is looked at
        self.others: list[str] = []  # files whose names do not end as an image's
        self.left_out: list[str] = []  # folders that cannot be read, and why
        self.classless = [entry.name for entry in self._entries(folder) if not entry.is_dir()]

    def images(self, name: str) -> list[Path]:
        """Those below ``folder / name``, in the order of torchvision's ``ImageFolder``: by their folder's path, then by
        their name."""
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
