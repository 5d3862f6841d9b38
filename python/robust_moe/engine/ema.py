"""Moving averages of weights (Izmailov et al., 2018; in adversarial training Gowal et al., 2020, arXiv:2010.03593)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.config import RunConfig
from robust_moe.engine.checkpoint import load_model_state
from robust_moe.engine.sharding import here

__all__ = ["WeightAverage", "average_decay"]


def average_decay(run: RunConfig, steps_per_epoch: int) -> float:
    """Decay of the average a batch; 0: none is kept.

    ``run.ema_decay``, or of ``run.ema_epochs`` = T epochs of s batches ``exp(-1 / (T s))``: then the average looks back
    over the same share of the data whatever the batch size. Times so short or so long that this rounds to 0 or 1 still
    average: with the number next to it.
    """
    if run.ema_epochs == 0:
        return run.ema_decay
    decay = math.exp(-1.0 / (run.ema_epochs * steps_per_epoch))
    return min(max(decay, math.nextafter(0.0, 1.0)), math.nextafter(1.0, 0.0))


class WeightAverage:
    """An exponential moving average of a model's weights and floating buffers, batch-norm statistics among them.

    ``average <- d * average + (1 - d) * weights`` after every batch, with d = min(decay, (1 + t) / (10 + t)) at the
    t-th: the first, untrained weights are forgotten in the beginning. Whole numbers (a batch norm's count) are copied.

    Args:
        model: what is averaged; the average starts at its present weights.
        decay: in [0, 1), a batch.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.batches = 0

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Start anew, at the present weights of ``model``."""
        self.batches = 0
        for mine, new in zip(_tensors(self.model), _tensors(model), strict=True):
            mine.copy_(new)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of ``model``; never waits for the device."""
        self.batches += 1
        decay = min(self.decay, (1 + self.batches) / (10 + self.batches))
        mine, new = _tensors(self.model), _tensors(model)
        floating = [(old, value) for old, value in zip(mine, new, strict=True) if old.is_floating_point()]
        torch._foreach_lerp_([old for old, _ in floating], [value for _, value in floating], 1.0 - decay)
        for old, value in zip(mine, new, strict=True):
            if not old.is_floating_point():
                old.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any], source: str | Path) -> None:
        load_model_state(self.model, state["model"], source)
        self.batches = state["batches"]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [here(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
