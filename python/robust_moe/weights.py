"""Which parameters of a model are weights in the narrow sense, and what experts' were called in older files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["filters_and_matrices", "stacked_name", "unstacked"]


def filters_and_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of two dimensions at least, in the model's order: no bias, no scale or shift of a normalisation."""
    return [p for p in model.parameters() if p.ndim > 1]


def stacked_name(name: str) -> tuple[str, int | None]:
    """What a parameter was called in checkpoints before format 3, which had the experts of a layer in one tensor, and
    which entry of its first dimension it was; None: it was a tensor of its own."""
    found = re.fullmatch(r"((?:.*\.)?experts)\.(\d+)\.(.*)", name)
    return (name, None) if found is None else (f"{found[1]}.{found[3]}", int(found[2]))


def unstacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state of before format 3 by the names of today: each expert's tensors on their own."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        stack = re.fullmatch(r"((?:.*\.)?experts)\.(?!networks\.|\d+\.)(.*)", name)
        if stack is None or value.dim() == 0:
            found[name] = value
        else:
            found |= {f"{stack[1]}.{expert}.{stack[2]}": one for expert, one in enumerate(value.unbind())}
    return found
