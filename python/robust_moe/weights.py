"""Which parameters of a model are weights in the narrow sense: filters and matrices."""

from __future__ import annotations

from torch import nn

__all__ = ["filters_and_matrices"]


def filters_and_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of two dimensions at least, in the model's order: no bias, no scale or shift of a normalisation."""
    return [p for p in model.parameters() if p.ndim > 1]
