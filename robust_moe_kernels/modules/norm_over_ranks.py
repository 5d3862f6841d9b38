"""A batch norm in training whose statistics are those of every rank's rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["norm_over_ranks"]


def norm_over_ranks(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(the norm of this rank's ``x``, float64 [] values per channel on all ranks); the running statistics move.

    A rank may have no rows; all have to call this. Where no rank has any the running statistics stay, and a single
    value in all has variance 0, as in :class:`~robust_moe_kernels.modules.expert_norms.ExpertBatchNorm2d`. Gradients
    are those of the sum of the ranks' losses to ``x``, and of this rank's loss to weight and bias; not to be
    differentiated again.

    Args:
        x: [N, C, ...], N >= 0, as many positions behind C on every rank.
        running_mean, running_var, weight, bias: [C] or None.
        momentum: share of the new statistics in the running ones.
    """
    out, mean, variance, count = _Norm.apply(x, weight, bias, eps)
    with torch.no_grad():
        if running_mean is not None:
            moved = running_mean.lerp(mean.to(running_mean.dtype), momentum)
            running_mean.copy_(torch.where(count > 0, moved, running_mean))
        if running_var is not None:
            unbiased = variance * (count / (count - 1).clamp_min(1))
            moved = running_var.lerp(unbiased.to(running_var.dtype), momentum)
            running_var.copy_(torch.where(count > 1, moved, running_var))
    return out, count


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        kept = [0, *range(2, x.dim())]
        sums = torch.stack([_sum(x, kept), torch.linalg.vector_norm(x, 2, kept, dtype=torch.float64).square()])
        count = sums.new_full((2, 1), x.numel() // x.shape[1])
        everything = torch.cat([sums, count], 1)
        dist.all_reduce(everything)
        (total, square), count = everything[:, :-1], everything[0, -1]
        mean = total / count.clamp_min(1)
        # A difference of float64 sums: no cancellation to speak of.
        variance = (square / count.clamp_min(1) - mean.square()).clamp_min(0)
        rstd = torch.where(count == 1, 0.0, (variance + eps).rsqrt())
        scale = rstd if weight is None else weight.double() * rstd
        shift = -mean * scale if bias is None else bias.double() - mean * scale
        kind = torch.promote_types(x.dtype, torch.float32)
        out = (x * _spread(scale.to(kind), x) + _spread(shift.to(kind), x)).to(x.dtype)
        ctx.save_for_backward(x, weight, scale, mean, rstd, count)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, scale, mean, rstd, count = ctx.saved_tensors
        d_out = torch.zeros_like(x) if d_out is None else d_out  # the other ranks wait for the sums
        kept = [0, *range(2, x.dim())]
        kind = torch.promote_types(x.dtype, torch.float32)
        total = _sum(d_out, kept)
        d_weight = (_sum(d_out.to(kind) * x.to(kind), kept) - mean * total) * rstd
        everywhere = torch.stack([total, d_weight])
        dist.all_reduce(everywhere)
        d_x = None
        if ctx.needs_input_grad[0]:
            q = -scale * rstd * everywhere[1] / count.clamp_min(1)
            r = -scale * everywhere[0] / count.clamp_min(1) - q * mean
            p, q, r = (_spread(table.to(kind), x) for table in (scale, q, r))
            d_x = (p * d_out + q * x + r).to(x.dtype)
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        own = None if weight is None else weight.dtype
        return d_x, d_weight.to(own) if wants_weight else None, total.to(own) if wants_bias else None, None


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims, dtype=torch.float64)


def _spread(table: Tensor, x: Tensor) -> Tensor:
    """[C] to be multiplied with x [N, C, ...]."""
    return table.view(1, -1, *[1] * (x.dim() - 2))
