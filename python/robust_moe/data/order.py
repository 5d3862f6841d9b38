"""Which images a batch has and what is drawn for them: functions of (seed, epoch, batch number) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe.data.augment import AugmentConfig, AugmentDraw, draw_augmentation
from robust_moe.data.seeding import generator

__all__ = ["BatchOrder", "Planned"]


class Planned(NamedTuple):
    """This rank's part of a global batch, before an image of it is read."""

    positions: Tensor  # int64 [B]: in the image set
    draw: AugmentDraw | None  # of these images; None: nothing is changed


class BatchOrder:
    """The batches of every epoch, the same for images in memory and for streamed ones.

    A batch is planned for all ranks, and each takes every ``world_size``-th image of it: an image has the same place
    and changes in the same way however many ranks share the work.

    Args:
        count: images of the set.
        side: (height, width) of an image in a batch, in pixels.
        batch_size, shuffle, augment, seed, rank, world_size, drop_last: as of :class:`~robust_moe.data.loader.Loader`.

    Raises:
        ValueError: a rank or a batch size that does not fit.
    """

    def __init__(
        self,
        count: int,
        side: tuple[int, int],
        batch_size: int,
        *,
        shuffle: bool,
        augment: AugmentConfig | None,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size={world_size}, got {rank}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: expected a positive multiple of world_size={world_size}, got {batch_size}")
        rest = count % batch_size
        if drop_last and 0 < count < batch_size:
            raise ValueError(f"batch_size: expected <= {count} images with drop_last=True, got {batch_size}")
        if not drop_last and 0 < rest < world_size:
            raise ValueError(
                f"batch_size: expected an image for each of {world_size} ranks in the last batch, got {rest} of "
                f"{count} images left over; use drop_last=True or another batch size"
            )
        self.count, self.side, self.batch_size = count, side, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self._mirrored = None  # bool [N]: images that an alternating flip mirrors in even epochs
        if augment is not None and augment.flip and augment.flip_order == "alternating":
            self._mirrored = torch.rand(count, generator=generator(seed, "flip")) < 0.5

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        whole, rest = divmod(self.count, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start_batch: int) -> Iterator[Planned]:
        """This rank's parts of the batches of epoch ``epoch`` (0, 1, ...) from number ``start_batch`` on."""
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=generator(self.seed, "order", epoch))
        mine = slice(self.rank, None, self.world_size)
        for number in range(start_batch, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            draw = None
            if self.augment is not None:
                draws = generator(self.seed, "augment", epoch, number)
                draw = draw_augmentation(self.augment, len(whole), *self.side, draws)
                if self._mirrored is not None:
                    draw = draw._replace(flip=self._mirrored[whole] ^ bool(epoch % 2))
                draw = draw.select(mine)
            yield Planned(whole[mine], draw)
