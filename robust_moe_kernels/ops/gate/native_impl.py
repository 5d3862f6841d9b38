"""The top-k gate over the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native

__all__ = ["backward", "forward", "why_not"]

why_not = native.why_not_cuda


def forward(logits: Tensor, top_k: int, mode: int) -> tuple[Tensor, ...]:
    rows, experts = logits.shape
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits.new_empty(rows, experts, dtype=kind)
    indices = logits.new_empty(rows, top_k, dtype=torch.int64)
    weights = logits.new_empty(rows, top_k, dtype=kind)
    means = [logits.new_empty(shape, dtype=kind) for shape in ((experts,), (experts,), (), ())]
    nonfinite = logits.new_empty((), dtype=torch.int32)
    outputs = (scores, indices, weights, *means, nonfinite)
    blocks = native.extension().gate_blocks(rows, experts) if native.on_gpu(logits) else 1
    partial = logits.new_empty(blocks, 2 * experts + 3, dtype=torch.float64) if blocks > 1 else None
    native.run(
        "gate_forward",
        logits,
        logits.data_ptr(),
        rows,
        experts,
        top_k,
        mode,
        native.dtype_code(logits),
        *map(native.address, (*outputs, partial)),
        blocks,
    )
    return outputs


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
    d_logits = torch.empty_like(logits)
    gradients = (d_scores, d_weights, d_mean_scores, d_mean_entropy, d_mean_square_lse)
    native.run(
        "gate_backward",
        logits,
        *map(native.address, (logits, scores, indices, *gradients, d_logits)),
        logits.shape[0],
        logits.shape[1],
        indices.shape[1],
        mode,
        native.dtype_code(logits),
    )
    return d_logits
