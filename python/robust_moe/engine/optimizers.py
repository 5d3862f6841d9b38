"""Optimisers. One is a line in :data:`OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from robust_moe.config import OptimConfig, choose

__all__ = ["OPTIMIZERS", "build_optimizer"]

# foreach on a CPU too: SGD takes 220 ms for 84 M parameters, of 366 one by one and 423 fused


def _sgd(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def _adam(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Optimizer:
    return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=True)


def _adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=True)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], OptimConfig], Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,  # betas 0.9 and 0.999, weight decay as an L2 penalty
    "adamw": _adamw,  # likewise, weight decay apart from the gradient
}


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser of ``config`` for every parameter of ``model``; one without a gradient is left alone in a step."""
    return choose(OPTIMIZERS, config.name, "optim.name")(model.parameters(), config)
