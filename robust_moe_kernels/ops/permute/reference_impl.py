"""The specification of dispatch and combine, in plain PyTorch.

Samples are [B, ...], rows are [R, ...] with R = B*k; ``order`` [R] names each row's pair, ``inverse`` [R] each pair's
row, pair p = b*k + j. Weights are in the accumulation type: float32, or float64 for float64 data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels.layout import rows_like

__all__ = ["combine", "dispatch", "row_dot", "why_not"]


def why_not(device_type: str) -> str | None:
    return None


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _column(weights: Tensor, like: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (like.dim() - 1))


def dispatch(samples: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    rows = samples.index_select(0, order // top_k)
    if weights is not None:
        scale = weights.reshape(-1).index_select(0, order)
        rows = _column(scale, rows) * rows.to(scale.dtype)
    return rows_like(samples, order.numel()).copy_(rows)


def combine(rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    slots = inverse.view(-1, top_k)
    total = rows.new_empty(0)
    for j in range(top_k):
        term = rows.index_select(0, slots[:, j]).to(_accumulator(rows))
        if weights is not None:
            term = _column(weights[:, j], rows) * term
        total = term if j == 0 else total + term
    return rows_like(rows, order.numel() // top_k).copy_(total)


def row_dot(samples: Tensor, rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    batch, size = samples.shape[0], samples.shape[1:].numel()
    kind = _accumulator(samples)
    pairs = rows.index_select(0, inverse).reshape(batch, top_k, size).double()
    return (samples.reshape(batch, 1, size).double() * pairs).sum(-1).to(kind)
