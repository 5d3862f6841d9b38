"""Class-balanced splits."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe.data.image_set import stratified_counts
from robust_moe.data.seeding import generator

__all__ = ["stratified_split"]


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
