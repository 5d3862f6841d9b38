"""The specification of the top-k gate, in plain PyTorch (2509.05086 section 3; the release's softmax-then-top-k)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels.ops.routing.reference_impl import sort_by_expert

__all__ = [
    "KEEP", "RENORMALIZE", "STRAIGHT_THROUGH", "backward", "forward", "forward_sorted", "pool_linear",
    "pool_linear_backward", "why_not",
]  # fmt: skip

KEEP, RENORMALIZE, STRAIGHT_THROUGH = 0, 1, 2  # what becomes of the kept scores; numbered as in csrc/gate/gate.h


def why_not(device_type: str) -> str | None:
    return None


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def best_experts(key: Tensor, top_k: int) -> Tensor:
    """Columns of the ``top_k`` largest of each row of key [B, E], int64 [B, k], largest first, of equal ones the lowest
    first."""
    return key.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


def forward(logits: Tensor, top_k: int, mode: int) -> tuple[Tensor, ...]:
    return outputs_of(logits, best_experts(ranking(logits), top_k), mode)


def ranking(logits: Tensor) -> Tensor:
    """What experts are chosen by [B, E]: the logits, as two of them may round to one score. A NaN ranks as minus
    infinity, so that indices stay valid."""
    values = logits.to(_accumulator(logits))
    return torch.where(values.isnan(), -torch.inf, values)


def entropies(scores: Tensor) -> Tensor:
    """Each row's entropy. Where a score has underflowed to 0 the gradient is finite, which that of s log(s) is not, and
    the softmax behind the scores multiplies it by 0."""
    return -(scores * scores.clamp_min(torch.finfo(scores.dtype).tiny).log()).sum(-1)


def outputs_of(logits: Tensor, indices: Tensor, mode: int) -> tuple[Tensor, ...]:
    """The gate's outputs for the experts ``indices`` [B, k]."""
    experts = logits.shape[1]
    rows = max(logits.shape[0], 1)
    values = logits.to(_accumulator(logits))
    scores = values.softmax(-1)
    kept = scores.gather(1, indices)
    if mode == KEEP:
        weights = kept
    elif mode == RENORMALIZE:
        weights = kept / kept.sum(-1, keepdim=True)
    else:
        weights = torch.ones_like(kept)
    first = indices[:, :1] == torch.arange(experts, device=indices.device)
    lse = values.logsumexp(-1)
    entropy = entropies(scores)
    return (
        scores,
        indices,
        weights,
        scores.sum(0) / rows,
        first.sum(0).to(scores.dtype) / rows,
        entropy.sum() / rows,
        lse.square().sum() / rows,
        (~values.isfinite()).any(-1).sum().to(torch.int32),
    )


def forward_sorted(logits: Tensor, top_k: int, mode: int) -> tuple[Tensor, ...]:
    outputs = forward(logits, top_k, mode)
    return *outputs, *sort_by_expert(outputs[1].view(-1), logits.shape[1], top_k)


def backward(
    logits: Tensor,
    scores: Tensor,
    indices: Tensor,
    d_scores: Tensor | None,
    d_weights: Tensor | None,
    d_mean_scores: Tensor | None,
    d_mean_entropy: Tensor | None,
    d_mean_square_lse: Tensor | None,
    mode: int,
) -> Tensor:
    rows = max(logits.shape[0], 1)
    slope = torch.zeros_like(scores) if d_scores is None else d_scores.clone()
    if d_mean_scores is not None:
        slope += d_mean_scores / rows
    if d_weights is not None:
        d_kept = d_weights
        if mode == RENORMALIZE:
            kept = scores.gather(1, indices)
            total = kept.sum(-1, keepdim=True)
            d_kept = (d_weights - (d_weights * kept / total).sum(-1, keepdim=True)) / total
        slope = slope.scatter_add(1, indices, d_kept)
    d_logits = scores * (slope - (scores * slope).sum(-1, keepdim=True))
    lse = logits.to(scores.dtype).logsumexp(-1, keepdim=True)
    if d_mean_entropy is not None:
        log_scores = torch.where(scores > 0, logits.to(scores.dtype) - lse, 0.0)
        entropy = -(scores * log_scores).sum(-1, keepdim=True)
        d_logits -= scores * (log_scores + entropy) * (d_mean_entropy / rows)
    if d_mean_square_lse is not None:
        d_logits += scores * (2.0 * lse) * (d_mean_square_lse / rows)
    return d_logits.to(logits.dtype)


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    means = x.to(weight.dtype).mean((2, 3))
    return torch.nn.functional.linear(means, weight, bias), means


def pool_linear_backward(d_logits: Tensor, weight: Tensor, d_x: Tensor) -> None:
    """Fills ``d_x`` [B, C, H, W]."""
    d_x.copy_(((d_logits @ weight) / d_x.shape[2:].numel())[:, :, None, None])
