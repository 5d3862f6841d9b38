"""Optimisers. One is a line in :data:`OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robust_moe.config import OptimConfig, choose
from robust_moe.engine.parameter_groups import parameter_groups

__all__ = ["OPTIMIZERS", "build_optimizer", "keep_with_parameters"]

Groups = list[dict[str, Any]]  # parameters, and options that are not the optimiser's for all

# Fused on a GPU: one kernel for all, of three reads and two writes a weight (estimated; foreach makes four passes).
# foreach on a CPU: there SGD takes 220 ms for 84 M parameters, of 366 one by one and 423 fused (measured).


def _sgd(groups: Groups, config: OptimConfig, how: dict[str, bool]) -> Optimizer:
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        **how,
    )


def _adam(groups: Groups, config: OptimConfig, how: dict[str, bool]) -> Optimizer:
    return torch.optim.Adam(groups, lr=config.lr, weight_decay=config.weight_decay, **how)


def _adamw(groups: Groups, config: OptimConfig, how: dict[str, bool]) -> Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, **how)


OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig, dict[str, bool]], Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,  # betas 0.9 and 0.999, weight decay as an L2 penalty
    "adamw": _adamw,  # likewise, weight decay apart from the gradient
}


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool = False) -> Optimizer:
    """The optimiser of ``config`` for every parameter of ``model``; one without a gradient is left alone in a step.
    ``fused``: as one kernel, and not as PyTorch's foreach operations."""
    how = {"fused": True} if fused else {"foreach": True}
    return choose(OPTIMIZERS, config.name, "optim.name")(parameter_groups(model, config), config, how)


def keep_with_parameters(optimizer: Optimizer) -> None:
    """Put counts of steps where the optimiser wants them: a state that was saved from foreach, which counts on the CPU,
    may go on fused, which counts on the parameters' device, and the other way round."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if isinstance(step, Tensor):
                home = parameter.device if group.get("fused") else torch.device("cpu")
                optimizer.state[parameter]["step"] = step.to(home, torch.float32)
