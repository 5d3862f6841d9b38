"""Labelled images, those in memory, and the checks and resizing that every source shares."""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DataError",
    "ImageSet",
    "Labelled",
    "LabelledImages",
    "check_labels",
    "expect_room",
    "import_extra",
    "listed",
    "physical_memory",
    "resize",
    "stratified_counts",
]


class DataError(RuntimeError):
    """Data that cannot be used; the message names the file (and row), what was expected and what came."""

    settings: tuple[str, ...] = ()  # KEY=VALUE with which the same command goes, where that is known


class Labelled(ABC):
    """Labelled images, read or not.

    labels: int64 [N], positions in ``class_names``
    class_names: one name a class
    name: the data set's, e.g. ``cifar10``
    notes: what was passed over or left out when it was read, one sentence each
    """

    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @abstractmethod
    def subset(self, index: Tensor) -> Self:
        """The images at ``index`` (int64 [M]), in that order."""

    def head_index(self, count: int) -> Tensor:
        """Positions, int64, of ``count`` images: the first of every class, in the classes' shares of this set, in its
        order; of all if it has no more than ``count``.

        Balanced, so that it means something for a set that is sorted by class too; a pure function of the set, so that
        runs with different seeds are measured on the same images.
        """
        if count < 1:
            raise ValueError(f"count: expected at least 1, got {count}")
        if count >= len(self):
            return torch.arange(len(self))
        wanted = stratified_counts(self.labels, count)
        kept = [torch.nonzero(self.labels == c).flatten()[:n] for c, n in enumerate(wanted)]
        return torch.cat(kept).sort().values

    def head(self, count: int) -> Self:
        """The images at :meth:`head_index`; the set itself if it has no more than ``count``."""
        index = self.head_index(count)
        return self if len(index) == len(self) else self.subset(index)


class LabelledImages(Labelled):
    """Labelled images of one shape, in memory or streamed."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""

    @property
    def channels(self) -> int:
        return self.shape[0]

    @abstractmethod
    def decoded(self) -> ImageSet:
        """These images in memory. Raises :class:`DataError` where they cannot be read, or are more than memory."""


class Origin(Protocol):
    """What images were decoded from, as :class:`~robust_moe.data.encoded.EncodedImages`."""

    def select(self, index: Tensor) -> Self:
        """The images at ``index`` (int64 [M]), in that order."""

    def identities(self) -> Tensor:
        """int64 [N], of each image."""


@dataclass(frozen=True, eq=False)
class ImageSet(LabelledImages):
    """Labelled images in memory, kept as bytes.

    images: uint8 [N, C, H, W], 0..255
    labels: int64 [N], positions in ``class_names``
    class_names: one name a class
    name: the data set's, e.g. ``cifar10``
    notes: what was passed over or left out when it was read, one sentence each
    origin: the encoded images that these were decoded from, N; None: they were not
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    notes: tuple[str, ...] = ()
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels: expected int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.num_classes:
            raise ValueError(
                f"labels: expected 0..{self.num_classes - 1}, got {int(self.labels.min())}..{int(self.labels.max())}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, index: Tensor) -> Self:
        origin = None if self.origin is None else self.origin.select(index)
        return replace(self, images=self.images[index], labels=self.labels[index], origin=origin)

    def decoded(self) -> ImageSet:
        return self


def stratified_counts(labels: Tensor, count: int) -> list[int]:
    """How many of ``count`` images each class gets so that every class keeps its share of ``labels`` (int64 [N]).

    Largest remainders, ties to the lowest class: the counts sum to ``count`` exactly and none exceeds its class.
    """
    total = len(labels)
    if not 0 <= count <= total:
        raise ValueError(f"count: expected 0..{total}, got {count}")
    sizes = torch.bincount(labels).tolist()
    counts = [size * count // total for size in sizes] if total else []
    by_remainder = sorted(range(len(sizes)), key=lambda c: (-(sizes[c] * count % total), c))
    for c in by_remainder[: count - sum(counts)]:
        counts[c] += 1
    return counts


def resize(images: Tensor, size: int | None) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, size, size], bilinear (antialiased when shrinking); ``None``: unchanged."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    expect_room(images.shape[0] * images.shape[1] * size * size, f"data.image_size={size} of {len(images):,} images")
    out = images.new_empty(*images.shape[:2], size, size)
    for chunk, target in zip(images.split(2048), out.split(2048), strict=True):  # bounds the float copy
        scaled = F.interpolate(chunk.float(), size=(size, size), mode="bilinear", antialias=True)
        target.copy_(scaled.round_().clamp_(0, 255))
    return out


def check_labels(labels: Tensor, num_classes: int, file: object, unit: str = "row") -> None:
    """Raise :class:`DataError` for the first label outside ``0..num_classes-1``."""
    bad = torch.nonzero((labels < 0) | (labels >= num_classes)).flatten()
    if len(bad):
        row = int(bad[0])
        raise DataError(f"{file}: {unit} {row}: expected a label in 0..{num_classes - 1}, got {int(labels[row])}")


def physical_memory() -> float:
    """Bytes of this machine's memory; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def expect_room(count: int, what: str, refusal: type[Exception] = DataError, cure: str = "") -> None:
    """Raise ``refusal`` where ``what`` takes ``count`` bytes and this machine has less memory, before it is
    allocated; ``cure``: what helps, the end of the sentence."""
    if count > (whole := physical_memory()):
        end = f"; {cure}" if cure else ""
        raise refusal(f"{what}: expected at most this machine's memory of {whole:,.0f} bytes, got {count:,}{end}")


def listed(names: Sequence[str], separator: str = ", ", most: int = 20) -> str:
    """The first ``most`` of the names, and how many follow."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def import_extra(module: str, package: str, purpose: str) -> ModuleType:
    """Import a package that only the trainer's extra installs; :class:`DataError` says how to get it.

    torchvision raises RuntimeError, not ImportError, beside a PyTorch build that is not its own.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{purpose}: expected {package} to import (pip install 'robust-moe-kernels[train]'), got: {error}"
        ) from error
