"""Sums of probabilities, returned as logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MIXES", "log_mixture"]

MIXES = ("logits", "probabilities")  # what a mixture of models sums


def log_mixture(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """log sum_j w_j p_j, finite wherever a p_j of positive weight has a finite logarithm.

    The largest term is taken out of the sum, so probabilities far below the smallest float do not vanish. The sum is
    linear in the weights, so a weight of exactly 0 has a gradient too, p_j / sum; where the others' probabilities are
    next to nothing that is bounded by about 1e34 (float64: 1e277). Weights below that bound's inverse may count as 0.

    Args:
        log_probabilities: [B, k, C], float32 or float64.
        weights: [B, k] >= 0, same dtype; a row that does not sum to 1 gives logits that are shifted by its logarithm.

    Returns:
        [B, C]; the softmax of it are the mixed probabilities. Differentiable in both.
    """
    weights = weights[:, :, None]
    with torch.no_grad():
        largest = (weights.log() + log_probabilities).amax(1, keepdim=True)
    # a positive weight w has a term of at most 1, so exp(...) <= 1 / w; the bound is met by weights of (almost) 0 only
    bound = 0.9 * math.log(torch.finfo(weights.dtype).max)
    terms = weights * (log_probabilities - largest).clamp_max(bound).exp()
    return largest[:, 0] + terms.sum(1).log()
