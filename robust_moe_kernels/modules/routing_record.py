"""What one forward of a mixture-of-experts layer decided."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RoutingRecord"]


@dataclass(frozen=True)
class RoutingRecord:
    """``layer.routing``: the last forward's decision, still attached to its graph, replaced by the next forward."""

    scores: Tensor  # [B, E] softmax of the logits
    indices: Tensor  # [B, k] int64, best expert first
    weights: Tensor  # [B, k] factor of each chosen expert
    logits: Tensor  # [B, E] after noise
    clean_logits: Tensor  # [B, E] before noise
    noise_scale: Tensor | None  # [B, 1] standard deviation of the noise; None when none was added
    mean_scores: Tensor  # [E] P
    argmax_fraction: Tensor  # [E] f
    mean_entropy: Tensor  # []
    mean_square_lse: Tensor  # []
    nonfinite: Tensor  # [] int32, rows with NaN or infinite logits
    invalid: Tensor | None = None  # [] int32, experts out of range that a reroute named; None on a CPU or without one

    @classmethod
    def fixed(cls, x: Tensor, expert: int, num_experts: int) -> RoutingRecord:
        """The record of a forward in which every sample went to one expert and no gate ran: scores are one-hot."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        scores = x.new_zeros(x.shape[0], num_experts, dtype=kind)
        scores[:, expert] = 1.0
        one_hot = x.new_zeros(num_experts, dtype=kind)
        one_hot[expert] = 1.0
        zero = x.new_zeros((), dtype=kind)
        indices = torch.full((x.shape[0], 1), expert, device=x.device)
        return cls(
            scores=scores,
            indices=indices,
            weights=torch.ones_like(indices, dtype=kind),
            logits=scores,
            clean_logits=scores,
            noise_scale=None,
            mean_scores=one_hot,
            argmax_fraction=one_hot,
            mean_entropy=zero,
            mean_square_lse=zero,
            nonfinite=x.new_zeros((), dtype=torch.int32),
        )
