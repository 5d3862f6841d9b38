"""Training on the images as they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from robust_moe.data import Batch
from robust_moe.methods.base import Forward, Method, Objective

__all__ = ["Standard"]


class Standard(Method):
    """Empirical risk minimisation: mean cross-entropy, no attack."""

    heeds = frozenset({"label_smoothing"})
    distributed = True

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        yield Objective(partial(self.classify, model, forward), inputs=(batch.images, batch.labels))
