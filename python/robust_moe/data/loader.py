"""Batches of images: what the loaders of images in memory and of streamed ones share, and the former."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_moe.data.augment import AugmentConfig, apply_augmentation
from robust_moe.data.image_set import ImageSet, LabelledImages
from robust_moe.data.order import BatchOrder, Planned
from robust_moe.data.transfer import send

__all__ = ["Batch", "BatchLoader", "Fetched", "Loader"]

RESIDENT_SHARE = 0.5  # of the GPU memory that is free: what the images may take and still leave room for training


class Batch(NamedTuple):
    """One step's images, all on the loader's device."""

    images: Tensor  # float32 [B, C, H, W] in [0, 1]
    labels: Tensor  # int64 [B]
    index: Tensor  # type: ignore[assignment]  # int64 [B]: positions in the image set; hides tuple.index


class Fetched(NamedTuple):
    """A planned batch whose images have been read, on the loader's device."""

    planned: Planned
    pixels: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]
    index: Tensor  # type: ignore[assignment]  # int64 [B]: positions in the image set; hides tuple.index


class Loader(ABC):
    """Batches of a set of images, in an order and with changes that depend on (seed, epoch, batch number) alone.

    With ``augment.flip_order`` "alternating" an image that one epoch mirrors the next does not: two epochs show both
    sides of every image (Jordan, 2024, arXiv:2404.00498). With several ranks, each takes every ``world_size``-th image
    of the same global batches; the order and what is drawn for an image do not depend on ``world_size``.

    images: the set
    batch_size: images a global batch, over all ranks
    device: where the batches go
    shuffle: a new order each epoch; otherwise the set's
    augment: random changes; None: none
    seed: of order and changes
    rank, world_size: this process among how many
    drop_last: leave out the incomplete last batch
    """

    def __init__(
        self,
        images: LabelledImages,
        batch_size: int,
        *,
        device: torch.device | str,
        shuffle: bool = False,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        _, height, width = images.shape
        self.order = BatchOrder(
            len(images),
            (height, width),
            batch_size,
            shuffle=shuffle,
            augment=augment,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        self.device = torch.device(device)
        # a tensor, not a number: CUDA multiplies by a number's rounded inverse, and images would depend on the device
        self._white = torch.tensor(255.0, device=self.device)

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        return len(self.order)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` (0, 1, ...) from number ``start_batch`` on, 0..len(self)."""
        if epoch < 0:
            raise ValueError(f"epoch: expected >= 0, got {epoch}")
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch: expected 0..{len(self)}, got {start_batch}")
        return self._batches(epoch, start_batch)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        for planned, pixels, labels, index in self._fetch(epoch, self.order.epoch(epoch, start_batch)):
            images = pixels.to(torch.float32).div_(self._white)
            if planned.draw is not None:
                images = apply_augmentation(images, planned.draw)
            yield Batch(images, labels, index)

    @abstractmethod
    def _fetch(self, epoch: int, batches: Iterable[Planned]) -> Iterator[Fetched]:
        """The planned batches with their images, in order. Of what was drawn for an image, ``planned.draw`` is left
        with what is still to be done."""


class BatchLoader(Loader):
    """The loader of an :class:`ImageSet`, without worker processes: the images stay uint8; they move to the device once
    if they fit there, and otherwise batch by batch."""

    def __init__(self, images: ImageSet, batch_size: int, **options: Any) -> None:
        super().__init__(images, batch_size, **options)
        home = self.device if _fits(images.images, self.device) else torch.device("cpu")
        self._images, self._labels = images.images.to(home), images.labels.to(home)

    def _fetch(self, epoch: int, batches: Iterable[Planned]) -> Iterator[Fetched]:
        for planned in batches:
            (index,) = send([planned.positions], self._images.device)
            pixels, labels = self._images[index], self._labels[index]
            if pixels.device != self.device:  # too large for the device: the copy overlaps with the step before
                pixels, labels, index = send([pixels, labels, index], self.device)
            yield Fetched(planned, pixels, labels, index)


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= RESIDENT_SHARE * free
