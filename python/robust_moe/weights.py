"""Which parameters of a model are weights in the narrow sense, and what experts' were called in older files."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["filters_and_matrices", "stacked_name"]


def filters_and_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of two dimensions at least, in the model's order: no bias, no scale or shift of a normalisation, and
    none that a module names in ``no_weight_decay()``, as timm's transformers name class token and positions."""
    others: set[int] = set()
    for module in model.modules():
        if callable(named := getattr(module, "no_weight_decay", None)):
            own = dict(module.named_parameters())
            others |= {id(own[name]) for name in named() if name in own}
    return [p for p in model.parameters() if p.ndim > 1 and id(p) not in others]


def stacked_name(name: str) -> tuple[str, int | None]:
    """What a parameter was called in older checkpoints, which have the experts of a layer in one tensor, and which
    entry of its first dimension it was; None: it was a tensor of its own."""
    found = re.fullmatch(r"((?:.*\.)?experts)\.(\d+)\.(.*)", name)
    return (name, None) if found is None else (f"{found[1]}.{found[3]}", int(found[2]))
