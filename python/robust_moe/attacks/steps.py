"""Attacks by gradient steps: the loop over restarts and steps, and which of their images is kept."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robust_moe.attacks.base import MOST_STEPS, Attack, Found, per_sample
from robust_moe.attacks.graph import StepGraphs
from robust_moe.attacks.passes import Passes
from robust_moe.settings import setting

__all__ = ["StepAttack"]


def keep_worse(old: Found | None, new: Found) -> Found:
    """For each sample the worse of two (fooled first, then by loss; ``old`` where they are even)."""
    if old is None:
        return new
    worse = (new.fooled & ~old.fooled) | ((new.fooled == old.fooled) & (new.loss > old.loss))
    images = torch.where(per_sample(worse, new.images), new.images, old.images)
    return Found(images, new.fooled | old.fooled, torch.where(worse, new.loss, old.loss))


class StepAttack(Attack):
    """``restarts`` times, a start and then ``steps`` gradient steps; each sample keeps its worst restart
    (misclassified first, then by loss). A subclass gives :meth:`start` and :meth:`step`.

    Args:
        best: keep each sample's worst iterate (by the same rule, the start included) and not its last.
        graph: on a GPU, replay a restart's steps as one CUDA graph from the second batch of a shape on: ``"auto"``
            (where it can be had), ``True`` (or an error), ``False``; see :class:`~robust_moe.attacks.graph.StepGraphs`.
        steps, restarts, seed, eot_iter, mode: see :class:`Attack`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Attack.Config):
        """Settings of attacks by gradient steps."""

        eot_iter: int = setting(
            1,
            "forwards and backwards a gradient is averaged over, for models that draw random numbers",
            at_least=1,
            at_most=MOST_STEPS,
        )
        graph: Literal["auto", True, False] = setting(
            "auto", "on a GPU, replay the steps as one CUDA graph; auto: where possible"
        )

    def __init__(self, *, best: bool = False, graph: str | bool = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        self.best = best
        self.graphs = StepGraphs(graph)

    @property
    def passes(self) -> tuple[int, int]:
        steps = self.restarts * self.steps * self.eot_iter
        return steps + (self.restarts if self.best or self.restarts > 1 else 0), steps

    @abstractmethod
    def start(self, x0: Tensor, sample_index: Tensor | None, seed: int, restart: int) -> Tensor:
        """First iterate, [B, ...] in the ball around ``x0`` and in [0, 1]."""

    @abstractmethod
    def step(self, x: Tensor, grad: Tensor, x0: Tensor, nonfinite: Tensor | None = None) -> Tensor:
        """Next iterate from the gradient of the loss at ``x``; again in the ball and in [0, 1]. Sets ``nonfinite``, a
        bool scalar, in place where an element of the gradient is NaN or infinite."""

    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        """Costs ``steps`` forwards and backwards a restart, and one forward more where iterates are compared."""
        worst: Found | None = None
        for restart in range(self.restarts):
            x, *seen = self._climb(passes, self.start(x0, sample_index, seed, restart), x0)
            if seen:
                worst = keep_worse(worst, Found(*seen))
            if self.restarts == 1 and not self.best:
                return x
            worst = keep_worse(worst, Found(x, *passes.score(x)))
        assert worst is not None  # there is a restart
        return worst.images

    def climb(self, passes: Passes, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        """All steps from the start ``x``: the last iterate, and with ``best`` the worst before it as :class:`Found`
        has it. Draws on nothing but its arguments, so that it may be captured as a CUDA graph."""
        worst: Found | None = None
        for _ in range(self.steps):
            seen = passes.examine(x)
            if self.best:
                worst = keep_worse(worst, Found(x, passes.fooled(seen.logits), seen.loss))
            x = self.step(x, seen.grad, x0, passes.tally.nonfinite)
        passes.tally.settle()
        return (x, *(worst or ()))

    def key(self) -> dict[str, object]:
        """By name, the settings that :meth:`climb` depends on: a captured graph is replayed where all are equal."""
        return {name: value for name, value in vars(self).items() if name not in ("seed", "graphs")}

    def _climb(self, passes: Passes, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        if self.steps == 0:  # nothing to capture
            return self.climb(passes, x, x0)
        return self.graphs.run(self.climb, passes, x, x0, self.key())
