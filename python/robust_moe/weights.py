"""Which parameters of a model are weights in the narrow sense, and what experts' were called in older files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

__all__ = ["by_expert", "filters_and_matrices", "stacked_name"]


def filters_and_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of two dimensions at least, in the model's order: no bias, no scale or shift of a normalisation."""
    return [p for p in model.parameters() if p.ndim > 1]


def stacked_name(name: str) -> tuple[str, int | None]:
    """What a parameter was called in older checkpoints, which have the experts of a layer in one tensor, and which
    entry of its first dimension it was; None: it was a tensor of its own."""
    found = re.fullmatch(r"((?:.*\.)?experts)\.(\d+)\.(.*)", name)
    return (name, None) if found is None else (f"{found[1]}.{found[3]}", int(found[2]))


def by_expert(state: Mapping[str, Tensor], names: Iterable[str]) -> Mapping[str, Tensor]:
    """``state`` for a model with these names: where one of an expert is missing and the stacked one of an older
    checkpoint is there, which the model has not, that expert's part of it."""
    own = set(names)
    found = dict(state)
    taken = set()
    for name in own - state.keys():
        stack, expert = stacked_name(name)
        whole = state.get(stack)
        if expert is not None and whole is not None and stack not in own and whole.dim() > 0 and expert < len(whole):
            found[name] = whole[expert]
            taken.add(stack)
    return {name: value for name, value in found.items() if name not in taken}
