"""Dispatch and combine over the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.layout import rows_like

__all__ = ["combine", "dispatch", "row_dot", "why_not"]

why_not = native.why_not_cuda


def _run(
    kernel: str, data: Tensor, samples: Tensor | None, rows: Tensor | None, order: Tensor, inverse: Tensor,
    weights: Tensor | None, out: Tensor, top_k: int,
) -> Tensor:  # fmt: skip
    batch = order.numel() // top_k
    size = data.shape[1:].numel()
    pointers = map(native.address, (samples, rows, order, inverse, weights, out))
    native.run(kernel, data, *pointers, batch, top_k, size, native.dtype_code(data))
    return out


def dispatch(samples: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    out = rows_like(samples, order.numel())
    return _run("dispatch_rows", samples, samples, None, order, inverse, weights, out, top_k)


def combine(rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    out = rows_like(rows, order.numel() // top_k)
    return _run("combine_rows", rows, None, rows, order, inverse, weights, out, top_k)


def row_dot(samples: Tensor, rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    kind = torch.float64 if samples.dtype == torch.float64 else torch.float32
    out = samples.new_empty(samples.shape[0], top_k, dtype=kind)
    return _run("row_dot", samples, samples, rows, order, inverse, None, out, top_k)
