"""Signs that a run has gone wrong: weights that are no longer numbers, routing that has collapsed."""

from __future__ import annotations

import torch
from torch import nn

from robust_moe.evaluation.scorer import COLLAPSE_SHARE, LayerRouting

__all__ = ["describe_collapse", "state_is_finite"]


def state_is_finite(model: nn.Module) -> bool:
    """Whether every parameter and floating buffer is free of NaN and infinity. Reads the host once."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    # the sum of |x| is NaN or infinite as soon as one element is, and needs no mask in memory
    return not tensors or bool(torch.isfinite(torch.stack([tensor.double().abs().sum() for tensor in tensors])).all())


def describe_collapse(name: str, shares: LayerRouting) -> str:
    """The warning for a layer whose routing has collapsed."""
    expert = max(range(len(shares.first)), key=shares.first.__getitem__)
    return (
        f"{name}: routing has collapsed: expert {expert} is the first choice of {shares.first[expert]:.0%} of the "
        f"images (more than {COLLAPSE_SHARE:.0%}); a larger model.moe.balance_weight spreads them"
    )
