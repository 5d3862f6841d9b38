"""Batches from images in memory, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe.data.augment import AugmentConfig, apply_augmentation, draw_augmentation
from robust_moe.data.image_set import ImageSet
from robust_moe.data.seeding import generator
from robust_moe.data.transfer import send

__all__ = ["Batch", "BatchLoader"]

RESIDENT_SHARE = 0.5  # of the GPU memory that is free: what the images may take and still leave room for training


class Batch(NamedTuple):
    """One step's images, all on the loader's device."""

    images: Tensor  # float32 [B, C, H, W] in [0, 1]
    labels: Tensor  # int64 [B]
    index: Tensor  # type: ignore[assignment]  # int64 [B]: positions in the image set; hides tuple.index


class BatchLoader:
    """Batches of an :class:`ImageSet`, in an order and with changes that depend on (seed, epoch, batch number) alone.

    With ``augment.flip_order`` "alternating" an image that one epoch mirrors the next does not: two epochs show both
    sides of every image (Jordan, 2024, arXiv:2404.00498).

    The images stay uint8; they move to the device once if they fit there, and otherwise batch by batch. With several
    ranks, each takes every ``world_size``-th image of the same global batches; the order and what is drawn for an image
    do not depend on ``world_size``.

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
        images: ImageSet,
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
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size={world_size}, got {rank}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: expected a positive multiple of world_size={world_size}, got {batch_size}")
        rest = len(images) % batch_size
        if drop_last and 0 < len(images) < batch_size:
            raise ValueError(f"batch_size: expected <= {len(images)} images with drop_last=True, got {batch_size}")
        if not drop_last and 0 < rest < world_size:
            raise ValueError(
                f"batch_size: expected an image for each of {world_size} ranks in the last batch, got {rest} of "
                f"{len(images)} images left over; use drop_last=True or another batch size"
            )
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        # a tensor, not a number: CUDA multiplies by a number's rounded inverse, and images would depend on the device
        self._white = torch.tensor(255.0, device=self.device)
        self._mirrored = None  # bool [N]: images that an alternating flip mirrors in even epochs
        if augment is not None and augment.flip and augment.flip_order == "alternating":
            self._mirrored = torch.rand(len(images), generator=generator(seed, "flip")) < 0.5
        home = self.device if _fits(images.images, self.device) else torch.device("cpu")
        self._images, self._labels = images.images.to(home), images.labels.to(home)

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        count, rest = divmod(len(self._labels), self.batch_size)
        return count + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` (0, 1, ...) from number ``start_batch`` on, 0..len(self)."""
        if epoch < 0:
            raise ValueError(f"epoch: expected >= 0, got {epoch}")
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch: expected 0..{len(self)}, got {start_batch}")
        return self._batches(epoch, start_batch)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        total = len(self._labels)
        order = torch.arange(total)
        if self.shuffle:
            order = torch.randperm(total, generator=generator(self.seed, "order", epoch))
        for number in range(start_batch, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            mine = slice(self.rank, None, self.world_size)
            images, labels, index = self._gather(whole[mine])
            if self.augment is not None:
                # drawn for the global batch: an image changes in the same way however many ranks share the work
                height, width = images.shape[2:]
                draws = generator(self.seed, "augment", epoch, number)
                draw = draw_augmentation(self.augment, len(whole), height, width, draws)
                if self._mirrored is not None:
                    draw = draw._replace(flip=self._mirrored[whole] ^ bool(epoch % 2))
                images = apply_augmentation(images, draw.select(mine))
            yield Batch(images, labels, index)

    def _gather(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (index,) = send([index], self._images.device)
        images, labels = self._images[index], self._labels[index]
        if images.device != self.device:  # too large for the device: the copy overlaps with the step before
            images, labels, index = send([images, labels, index], self.device)
        return images.to(torch.float32).div_(self._white), labels, index


def _fits(images: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes <= RESIDENT_SHARE * free
