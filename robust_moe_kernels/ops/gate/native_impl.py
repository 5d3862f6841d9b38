"""The top-k gate over the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.layout import dense_format
from robust_moe_kernels.ops.routing.native_impl import sort_by_expert

__all__ = ["backward", "forward", "forward_sorted", "pool_linear", "pool_linear_backward", "why_not"]

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


def _map_strides(maps: Tensor) -> tuple[int, int]:
    """Distance between two channels and between two pixels of a dense map."""
    channels_last = dense_format(maps) == torch.channels_last
    return (1, maps.shape[1]) if channels_last else (maps.shape[2:].numel(), 1)


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    logits, means = weight.new_empty(batch, weight.shape[0]), weight.new_empty(batch, channels)
    sizes = (batch, channels, x.shape[2:].numel(), weight.shape[0], *_map_strides(x))
    addresses = map(native.address, (x, weight, bias, logits, means))
    native.run("pool_linear", x, *addresses, *sizes, native.dtype_code(x), native.dtype_code(weight))
    return logits, means


def pool_linear_backward(d_logits: Tensor, weight: Tensor, d_x: Tensor) -> None:
    """Fills ``d_x`` [B, C, H, W]."""
    sizes = (*d_x.shape[:2], d_x.shape[2:].numel(), weight.shape[0], *_map_strides(d_x))
    addresses = map(native.address, (d_logits, weight, d_x))
    native.run("pool_linear_backward", d_x, *addresses, *sizes, native.dtype_code(d_x), native.dtype_code(weight))
