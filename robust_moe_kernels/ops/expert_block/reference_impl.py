"""The specification of what stands between the convolutions of routed residual blocks, in plain PyTorch.

Maps are rows [R, C, H, W] sorted by expert; statistics, scales and shifts are [E, C].
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels.layout import channels_last_empty, expert_of_row

__all__ = ["column_sums", "head_backward", "head_forward", "norm_backward", "scale_shift", "why_not", "why_not_case"]


def why_not(device_type: str) -> str | None:
    return None


def why_not_case(*operands: Tensor) -> str | None:
    return None


def _spread(table: Tensor, expert: Tensor) -> Tensor:
    """[E, C] -> [R, C, 1, 1], each row its expert's."""
    return table.index_select(0, expert)[:, :, None, None]


def _open(z: Tensor, scale: Tensor | None, shift: Tensor | None, expert: Tensor) -> Tensor | float:
    """1 where a ReLU after the batch norm of z lets through, else 0."""
    if scale is None or shift is None:
        return 1.0
    return (z * _spread(scale, expert) + _spread(shift, expert) > 0).to(z.dtype)


def column_sums(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    expert = expert_of_row(offsets, value.shape[0])
    masked = value * _open(other, scale, shift, expert)
    zeros = torch.zeros(offsets.numel() - 1, value.shape[1], dtype=torch.float64, device=value.device)
    per_row = masked.double().sum((2, 3)), (masked.double() * other.double()).sum((2, 3))
    sums, products = (zeros.index_add(0, expert, rows) for rows in per_row)
    return sums, products


def scale_shift(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    expert = expert_of_row(offsets, z.shape[0])
    value = z * _spread(scale, expert) + _spread(shift, expert)
    return channels_last_empty(z, tuple(z.shape)).copy_(value.relu() if relu else value)


def norm_backward(
    d: Tensor,
    z: Tensor,
    offsets: Tensor,
    p: Tensor,
    q: Tensor | None,
    r: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    expert = expert_of_row(offsets, z.shape[0])
    out = _spread(p, expert) * (d * _open(z, scale, shift, expert))
    if q is not None and r is not None:
        out = out + _spread(q, expert) * z + _spread(r, expert)
    return channels_last_empty(z, tuple(z.shape)).copy_(out)


def _head_rows(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, offsets: Tensor, top_k: int,
) -> Tensor:  # fmt: skip
    expert = expert_of_row(offsets, z.shape[0])
    if skip_scale is None or skip_shift is None:
        skip = x.index_select(0, order // top_k)
    else:
        skip = x * _spread(skip_scale, expert) + _spread(skip_shift, expert)
    return (z * _spread(scale, expert) + _spread(shift, expert) + skip).relu()


def head_forward(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> Tensor:  # fmt: skip
    rows = _head_rows(z, scale, shift, x, skip_scale, skip_shift, order, offsets, weights.shape[1])
    pairs = rows.index_select(0, inverse).unflatten(0, tuple(weights.shape))
    out = (pairs * weights[:, :, None, None, None].to(pairs.dtype)).sum(1)
    return channels_last_empty(z, tuple(out.shape)).copy_(out)


def head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = _head_rows(z, scale, shift, x, skip_scale, skip_shift, order, offsets, weights.shape[1])
    d_pairs = d_out.index_select(0, order // weights.shape[1])
    inner = (rows.double() * d_pairs.double()).sum((1, 2, 3)).index_select(0, inverse)
    weight = weights.reshape(-1).index_select(0, order)[:, None, None, None].to(rows.dtype)
    d_rows = channels_last_empty(z, tuple(z.shape)).copy_(weight * d_pairs * (rows > 0))
    return d_rows, inner.view_as(weights).to(weights.dtype)
