"""Training on the images as they are."""

from __future__ import annotations

from torch import Tensor, nn

from robust_moe.data import Batch
from robust_moe.methods.base import Method

__all__ = ["Standard"]


class Standard(Method):
    """Empirical risk minimisation: no attack."""

    def images(self, model: nn.Module, batch: Batch, step_seed: int) -> tuple[Tensor, None]:
        return batch.images, None
