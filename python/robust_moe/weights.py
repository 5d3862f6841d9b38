"""Which parameters of a model are weights in the narrow sense: filters and matrices."""

from __future__ import annotations

from torch import nn

from robust_moe_kernels.modules.experts import Experts

__all__ = ["filters_and_matrices"]


def filters_and_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of two dimensions at least, in the model's order: no bias, no scale or shift of a normalisation.

    Stacked parameters have the experts as their first dimension, which does not count: filters [E, O, I, kh, kw] are
    weights, the experts' scales and biases [E, C] are not.
    """
    stacked = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    return [p for p in model.parameters() if p.ndim - (id(p) in stacked) > 1]
