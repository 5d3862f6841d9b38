"""The three parts of a data set, and class-balanced splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_moe.data.image_set import ImageSet, stratified_counts
from robust_moe.data.seeding import generator
from robust_moe.data.streamed import StreamedSet

__all__ = ["Splits", "stratified_split"]


@dataclass(frozen=True, eq=False)
class Splits:
    """The three parts of a data set; ``val`` is held out of the training images and may be empty."""

    train: ImageSet | StreamedSet
    val: ImageSet
    test: ImageSet

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over or left out when the files were read, one sentence each."""
        return tuple(dict.fromkeys((*self.train.notes, *self.val.notes, *self.test.notes)))


def stratified_split(labels: Tensor, held: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out ``held`` of the images, every class in its share, chosen at random by ``seed``.

    labels: int64 [N]. Returns the positions (int64, ascending) of the rest [N - held] and of the held-out [held].
    """
    draw = generator(seed, "split")
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for c, count in enumerate(stratified_counts(labels, held)):
        members = torch.nonzero(labels == c).flatten()
        chosen[members[torch.randperm(len(members), generator=draw)[:count]]] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
