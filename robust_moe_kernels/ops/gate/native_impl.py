"""The top-k gate over the compiled extension (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.layout import dense_format
from robust_moe_kernels.ops.routing.native_impl import sort_by_expert

__all__ = ["backward", "forward", "forward_sorted", "pool_linear", "pool_linear_backward", "why_not"]

why_not = native.why_not_cpu


def forward(logits: Tensor, top_k: int, mode: int) -> tuple[Tensor, ...]:
    rows, experts = logits.shape
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = torch.empty(rows, experts, dtype=kind)
    indices = torch.empty(rows, top_k, dtype=torch.int64)
    weights = torch.empty(rows, top_k, dtype=kind)
    mean_scores, argmax_fraction = torch.empty(experts, dtype=kind), torch.empty(experts, dtype=kind)
    mean_entropy, mean_square_lse = torch.empty((), dtype=kind), torch.empty((), dtype=kind)
    nonfinite = torch.empty((), dtype=torch.int32)
    outputs = (scores, indices, weights, mean_scores, argmax_fraction, mean_entropy, mean_square_lse, nonfinite)
    native.extension().gate_forward_cpu(
        logits.data_ptr(),
        rows,
        experts,
        top_k,
        mode,
        native.dtype_code(logits),
        native.threads(),
        *(output.data_ptr() for output in outputs),
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
    native.extension().gate_backward_cpu(
        logits.data_ptr(),
        scores.data_ptr(),
        indices.data_ptr(),
        *(0 if gradient is None else gradient.data_ptr() for gradient in gradients),
        d_logits.data_ptr(),
        logits.shape[0],
        logits.shape[1],
        indices.shape[1],
        mode,
        native.dtype_code(logits),
        native.threads(),
    )
    return d_logits


def _map_strides(maps: Tensor) -> tuple[int, int]:
    """Distance between two channels and between two pixels of a dense map."""
    channels_last = dense_format(maps) == torch.channels_last
    return (1, maps.shape[1]) if channels_last else (maps.shape[2:].numel(), 1)


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    logits, means = weight.new_empty(batch, weight.shape[0]), weight.new_empty(batch, channels)
    addresses = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr())
    sizes = (batch, channels, x.shape[2:].numel(), weight.shape[0], *_map_strides(x))
    codes = (native.dtype_code(x), native.dtype_code(weight), native.threads())
    native.extension().pool_linear_cpu(*addresses, logits.data_ptr(), means.data_ptr(), *sizes, *codes)
    return logits, means


def pool_linear_backward(d_logits: Tensor, weight: Tensor, d_x: Tensor) -> None:
    """Fills ``d_x`` [B, C, H, W]."""
    sizes = (*d_x.shape[:2], d_x.shape[2:].numel(), weight.shape[0], *_map_strides(d_x))
    codes = (native.dtype_code(d_x), native.dtype_code(weight), native.threads())
    addresses = (d_logits.data_ptr(), weight.data_ptr(), d_x.data_ptr())
    native.extension().pool_linear_backward_cpu(*addresses, *sizes, *codes)
