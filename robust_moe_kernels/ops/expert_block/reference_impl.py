"""The specification of what stands between the convolutions of routed residual blocks, in plain PyTorch.

Maps are rows [R, C, H, W] sorted by expert; statistics, scales and shifts are [E, C].
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels.layout import channels_last_empty, expert_of_row

__all__ = [
    "column_sums", "head_backward", "head_forward", "head_norm_backward", "norm_backward", "norm_finalise",
    "norm_finalise_backward", "scale_shift", "sum_rows", "why_not", "why_not_case",
]  # fmt: skip


def why_not(device_type: str) -> str | None:
    return None


def why_not_case(*operands: Tensor) -> str | None:
    return None


def _spread(table: Tensor, expert: Tensor) -> Tensor:
    """[E, C] -> [R, C, 1, 1], each row its expert's; of 16 bits as float32, so that no product with it is rounded."""
    return table.to(torch.promote_types(table.dtype, torch.float32)).index_select(0, expert)[:, :, None, None]


def _open(z: Tensor, scale: Tensor | None, shift: Tensor | None, expert: Tensor) -> Tensor | float:
    """1 where a ReLU after the batch norm of z lets through, else 0."""
    if scale is None or shift is None:
        return 1.0
    return (z * _spread(scale, expert) + _spread(shift, expert) > 0).to(z.dtype)


def column_sums(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, shares: int
) -> Tensor:
    expert = expert_of_row(offsets, value.shape[0])
    masked = value * _open(other, scale, shift, expert)
    shape = (2, shares, offsets.numel() - 1, value.shape[1])
    out = torch.zeros(shape, dtype=torch.float64, device=value.device)
    per_row = masked.double().sum((2, 3)), (masked.double() * other.double()).sum((2, 3))
    for sums, rows in zip(out, per_row, strict=True):
        sums[0].index_add_(0, expert, rows)
    return out


def _added(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and sums of products [E, C]: the shares in order."""
    total = shares[:, 0]
    for share in shares.unbind(1)[1:]:
        total = total + share
    return total[0], total[1]


def _count(offsets: Tensor, pixels: int) -> Tensor:
    """Values per channel [E, 1] that each expert's batch norm sees."""
    return offsets.diff()[:, None].double() * pixels


def norm_finalise(
    shares: Tensor,
    offsets: Tensor,
    pixels: int,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor,
    eps: float,
    momentum: float,
) -> tuple[Tensor, ...]:
    total, square = _added(shares)
    count = _count(offsets, pixels)
    mean = total / count.clamp_min(1)
    # A difference of float64 sums: no cancellation to speak of.
    variance = (square / count.clamp_min(1) - mean.square()).clamp_min(0)
    rstd = torch.where(count == 1, 0.0, (variance + eps).rsqrt())
    scale = weight.double() * rstd
    shift = bias.double() - mean * scale
    kind = torch.promote_types(weight.dtype, torch.float32)
    scale, shift, mean, rstd, variance = (table.to(kind) for table in (scale, shift, mean, rstd, variance))
    moved = running_mean.lerp(mean.to(running_mean.dtype), momentum)
    next_mean = torch.where(count > 0, moved, running_mean)
    unbiased = variance * (count / (count - 1).clamp_min(1)).to(kind)
    moved = running_var.lerp(unbiased.to(running_var.dtype), momentum)
    next_var = torch.where(count > 1, moved, running_var)
    next_tracked = tracked + (count > 0).flatten().to(tracked.dtype)
    return scale, shift, mean, rstd, next_mean, next_var, next_tracked


def norm_finalise_backward(
    shares: Tensor, offsets: Tensor, pixels: int, scale: Tensor, mean: Tensor, rstd: Tensor, training: bool
) -> list[Tensor]:
    total, product = _added(shares)
    d_weight = (product - mean * total) * rstd
    gradients = [d_weight, total]
    if training:
        count = _count(offsets, pixels).clamp_min(1)
        q = -scale * rstd * d_weight / count
        gradients += [q, -scale * total / count - q * mean]
    return [gradient.to(scale.dtype) for gradient in gradients]


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


def _head_gradient(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient at the ReLU's input, not rounded to the maps' dtype yet, and that of the weights."""
    rows = _head_rows(z, scale, shift, x, skip_scale, skip_shift, order, offsets, weights.shape[1])
    d_pairs = d_out.index_select(0, order // weights.shape[1])
    inner = (rows.double() * d_pairs.double()).sum((1, 2, 3)).index_select(0, inverse)
    weight = weights.reshape(-1).index_select(0, order)[:, None, None, None].to(rows.dtype)
    return weight * d_pairs * (rows > 0), inner.view_as(weights).to(weights.dtype)


def head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head = (z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights)
    d_rows, d_weights = _head_gradient(d_out, *head)
    return channels_last_empty(z, tuple(z.shape)).copy_(d_rows), d_weights


def head_norm_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = (z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights)
    d_rows, d_weights = _head_gradient(d_out, *head)
    expert = expert_of_row(offsets, z.shape[0])
    d_z = channels_last_empty(z, tuple(z.shape)).copy_(_spread(scale, expert) * d_rows)
    if skip_scale is not None:
        d_rows = _spread(skip_scale, expert) * d_rows
    return d_z, channels_last_empty(z, tuple(z.shape)).copy_(d_rows), d_weights


def sum_rows(rows: Tensor, other: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    kind = torch.promote_types(rows.dtype, torch.float32)
    pairs = (rows.to(kind) + other.to(kind)).index_select(0, inverse).unflatten(0, (-1, top_k))
    total = pairs[:, 0]
    for j in range(1, top_k):
        total = total + pairs[:, j]
    return channels_last_empty(rows, tuple(total.shape)).copy_(total)
