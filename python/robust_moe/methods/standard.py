"""Training on clean images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from robust_moe.data import Batch
from robust_moe.methods.base import TRAINING, Forward, Method, Objective
from robust_moe.methods.options import LabelSmoothing
from robust_moe.methods.table import METHODS

__all__ = ["Standard"]


@METHODS.register("standard")
class Standard(Method):
    """Empirical risk minimisation: mean cross-entropy, no attack."""

    @dataclass(frozen=True, kw_only=True)
    class Config(LabelSmoothing, Method.Config):
        """Settings of standard training."""

        def passes(self, attack_steps: int) -> int:
            return self.trained(TRAINING)

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        yield Objective(partial(self.classify, model, forward), inputs=(batch.images, batch.labels))
