"""The search over the experts that the gates of a model can be driven to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from robust_moe.attacks.apgd import merge
from robust_moe.attacks.base import Found
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.routes import CleanGates, Goal

__all__ = ["Climber", "worst_route"]


class Climber(Protocol):
    """What the search needs of an attack."""

    restarts: int

    def start(self, x0: Tensor, sample_index: Tensor | None, seed: int, restart: int) -> Tensor:
        """First iterate."""
        ...


def worst_route(
    attack: Climber,
    passes: Passes,
    x0: Tensor,
    sample_index: Tensor | None,
    seed: int,
    gates: CleanGates,
    candidates: Sequence[Tensor],
    climb: Callable[[Passes, Tensor, Tensor, Goal], Found],
    found: Found,
) -> Found:
    """The worst of ``found`` and of a climb to each candidate, from each of the attack's starts.

    Each layer's candidates are tried in turn, the other layers left to their gates. Then they are joined greedily: each
    image keeps the first layer's candidate that did most harm while the second layer's are tried, and so on. Of the
    climbs that fool an image the first counts. Where ``passes.reads``, fooled images take no part in further climbs,
    and several climbs of those left run as one batch that fits in ``passes.room``; what is found does not depend on it,
    but for rounding.

    Args:
        candidates: for each layer int64 [B, T, m], the experts to try: of a layer that routes tokens the m-th candidate
            of an image is an expert for each of its tokens, all of them driven together.
        climb: from starts, clean images and goals to what was found; its passes have the batch's labels.
        found: images, success and classification loss so far; not written to.
    """
    search = _Search(passes, x0, gates, candidates, climb, Found(*(tensor.clone() for tensor in found)))
    for restart in range(attack.restarts):
        search.climb_all(attack.start(x0, sample_index, seed, restart))
    return search.found


@dataclass(eq=False)
class _Search:
    """The arguments of :func:`worst_route` and what was found so far, which it writes to."""

    passes: Passes
    x0: Tensor
    gates: CleanGates
    candidates: Sequence[Tensor]
    climb: Callable[[Passes, Tensor, Tensor, Goal], Found]
    found: Found

    def climb_all(self, start: Tensor) -> None:
        """To every candidate of every layer, and to the most harmful ones joined."""
        layers = range(len(self.candidates))
        none = torch.full_like(self.gates.ranked[0][:, 0, :1], -1).expand(-1, len(layers))  # [B, L]
        alone = none.clone()
        self._try(start, [(layer, rank) for layer in layers for rank in range(self._width(layer))], none, alone)
        held = none.clone()
        held[:, 0] = alone[:, 0]
        for layer in layers[1:]:
            self._try(start, [(layer, rank) for rank in range(self._width(layer))], held.clone(), held)

    def _width(self, layer: int) -> int:
        return self.candidates[layer].shape[2]

    def _try(self, start: Tensor, trials: list[tuple[int, int]], held: Tensor, worst: Tensor) -> None:
        """Climb to the candidate of each (layer, rank) while the other layers are held; write the most harmful into
        that layer's column of ``worst`` [B, L]. In this and in ``held`` there are ranks; -1: the layer is free."""
        passes, y = self.passes, self.passes.y
        left = torch.arange(len(y), device=y.device)
        harm = torch.full_like(worst, -torch.inf, dtype=torch.float64)
        while trials:
            if passes.reads:
                left = (~self.found.fooled).nonzero()[:, 0]
                if not len(left):
                    return
            together = trials[: max(passes.room // max(len(left), 1), 1)]
            trials = trials[len(together) :]
            ranks = []
            for layer, rank in together:
                driven = held[left]
                driven[:, layer] = rank
                ranks.append(driven)
            times = len(together)
            goal = self._goal(torch.cat(ranks), left.repeat(times))
            starts, clean = (torch.cat([images[left]] * times) for images in (start, self.x0))
            every = self.climb(replace(passes, y=y[left].repeat(times)), starts, clean, goal)
            parts = zip(*(tensor.split(len(left)) for tensor in every), strict=True)
            for (layer, rank), part in zip(together, map(Found._make, parts), strict=True):
                old = Found(*(tensor[left] for tensor in self.found))
                for whole, new in zip(self.found, merge(old, part), strict=True):
                    whole[left] = new
                more = part.loss.double() > harm[left, layer]
                harm[left, layer] = torch.where(more, part.loss.double(), harm[left, layer])
                worst[left, layer] = torch.where(more, rank, worst[left, layer])

    def _goal(self, ranks: Tensor, images: Tensor) -> Goal:
        """The candidates of the given ``ranks`` [n, L] for the ``images`` [n]."""
        experts = []
        for candidates, rank in zip(self.candidates, ranks.unbind(1), strict=True):
            there = candidates[images]  # [n, T, m]
            place = rank.clamp_min(0)[:, None, None].expand(-1, there.shape[1], 1)
            experts.append(torch.where(rank[:, None] < 0, -1, there.gather(2, place)[:, :, 0]))
        return Goal(tuple(experts), tuple(spread[images] for spread in self.gates.spread))
