"""Encoded images in files: read one at a time, by number, in any order and by any process."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.decode import read_image_file
from robust_moe.data.image_set import Labelled
from robust_moe.data.progress import Task

__all__ = ["EncodedImages", "EncodedPart", "ImageFiles", "Names"]


class Names:
    """Names in one block of bytes: a list of a million strings costs a process ten times the memory, and each of its
    forks again, as Python counts the references to every one."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self._text[self._ends[i] : self._ends[i + 1]])


class EncodedImages(ABC):
    """N encoded images (JPEG, PNG, ...), or some of them in an order. What :meth:`for_any_order` gives can be sent to
    worker processes.

    Args:
        count: images that the source has.
    """

    def __init__(self, count: int) -> None:
        self._index = np.arange(count)

    def __len__(self) -> int:
        return len(self._index)

    def select(self, index: Tensor) -> Self:
        """The images at ``index`` (int64 [M]), in that order; nothing is read or copied."""
        chosen = copy.copy(self)
        chosen._index = self._index[index.numpy()]
        return chosen

    def read(self, i: int) -> bytes:
        """The encoded bytes of image i, 0..N-1. Raises OSError or ValueError where they cannot be had."""
        return self._read(int(self._index[i]))

    def where(self, i: int) -> str:
        """How an error names image i."""
        return self._where(int(self._index[i]))

    def identities(self) -> Tensor:
        """int64 [N]: 8 bytes of BLAKE2b of each image's name and of the size of its bytes, as far as the source knows
        it without reading them. The same wherever the folder of the data lies."""
        names = (os.fsencode(self._identity(int(i))) for i in self._index)
        joined = b"".join(blake2b(name, digest_size=8).digest() for name in names)
        return torch.from_numpy(np.frombuffer(joined, np.int64).copy())

    def for_any_order(self, task: Task) -> EncodedImages:
        """The same images, of which each is read in about the same time whatever was read before; ``task`` shows the
        progress where that takes time."""
        return self

    def forget(self) -> None:  # noqa: B027  # most keep nothing
        """Give back the memory of what was read lately."""

    @abstractmethod
    def _read(self, position: int) -> bytes: ...

    @abstractmethod
    def _where(self, position: int) -> str: ...

    @abstractmethod
    def _identity(self, position: int) -> str: ...


class ImageFiles(EncodedImages):
    """Image files below a folder.

    Args:
        root: the folder; where it lies is no part of the images' identity.
        paths: the files.
    """

    def __init__(self, root: Path, paths: Iterable[Path]) -> None:
        self._root = root
        self._names = Names(os.path.relpath(path, root) for path in paths)
        super().__init__(len(self._names))

    def _read(self, position: int) -> bytes:
        return read_image_file(self._root / self._names[position])

    def _where(self, position: int) -> str:
        return str(self._root / self._names[position])

    def _identity(self, position: int) -> str:
        name = self._names[position]
        try:
            size = os.stat(self._root / name).st_size
        except OSError:  # reading it says why
            size = -1
        return f"{name}\0{size}"


@dataclass(frozen=True, eq=False)
class EncodedPart(Labelled):
    """Labelled images of a source before any of them is decoded: chosen from, then decoded or streamed.

    images: N encoded images
    labels: int64 [N], positions in ``class_names``
    class_names: one name a class
    name: the data set's
    place: the folder or file that they lie in
    notes: what was found out or passed over, one sentence each
    """

    images: EncodedImages
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    place: Path
    notes: tuple[str, ...] = ()

    def subset(self, index: Tensor) -> Self:
        return replace(self, images=self.images.select(index), labels=self.labels[index])
