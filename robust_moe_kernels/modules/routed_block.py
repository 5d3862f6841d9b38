"""A routed residual block and its gradient, composed of the engine's raw operations.

Forward: convolution gathers each row's sample as it reads; batch-norm statistics per expert; ReLU; the last operation
adds the skip, applies the ReLU and sums a sample's k rows. No dispatched copy of the input, no output rows. Saved for
the backward are the input, the convolutions' outputs and [E, C] tables; what lies between is computed again, at a pass
over memory each. Only the gradients that are asked for are computed, and only what they need is saved: with frozen
parameters and norms in evaluation (``attack_mode``) no weight gradient exists, and neither means nor deviations are
kept, nor the input where a downsampling skip makes it needless.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.modules.interception import version
from robust_moe_kernels.modules.plain_block import KEPT, plain_block
from robust_moe_kernels.modules.ranks import offsets_over_ranks, sum_over_ranks
from robust_moe_kernels.modules.routed_backward import FIXED, PER_LAYER, Backward, Layer, Plan, TilePlans
from robust_moe_kernels.ops.expert_block import column_sums, head_forward, norm_finalise, scale_shift, share_count
from robust_moe_kernels.ops.expert_conv import conv_forward
from robust_moe_kernels.ops.routing import Route
from robust_moe_kernels.second_derivatives import another_follows, plain_gradients

__all__ = ["Layer", "Plan", "fold_norm", "routed_block"]


@dataclass
class _Norm:
    """A batch norm as a scale and shift, with what its gradient needs; all [E, C]."""

    scale: Tensor
    shift: Tensor
    mean: Tensor | None = None  # None: folded beforehand, or in evaluation with frozen weight and bias
    rstd: Tensor | None = None
    moved: tuple[Tensor, ...] = ()  # in training, the running statistics after this batch


def _table_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _scale_shift_of(weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean) * rstd * weight + bias as x * scale + shift; mean and rstd in float64, and so the result."""
    scale = weight.double() * rstd
    return scale, bias.double() - mean * scale


def fold_norm(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation as scale and shift, the bits that ``routed_block`` would compute in each forward.

    Args:
        weight, bias, running_mean, running_variance: [E, C], any floating dtype.
        eps: the norm's.

    Returns:
        (scale, shift), [E, C] float32 (float64 for a float64 norm), computed in float64, without gradient.
    """
    with torch.no_grad():
        rstd = (running_variance.double() + eps).rsqrt()
        scale, shift = _scale_shift_of(weight, bias, running_mean.double(), rstd)
        kind = _table_dtype(weight)
        return scale.to(kind), shift.to(kind)


def _normalize(
    z: Tensor, offsets: Tensor, counted: Tensor, numbers: tuple[Tensor, ...], folded: tuple[Tensor | None, ...],
    layer: Layer, wants_gradient: bool,
) -> _Norm:  # fmt: skip
    """A norm of z by its weight, bias, running mean, running variance and number of batches, or as it was folded;
    ``counted``: the offsets of the rows that its statistics are of, in training."""
    weight, bias, running_mean, running_variance, tracked = numbers
    scale, shift = folded
    if scale is not None and shift is not None:
        return _Norm(scale, shift)
    if layer.training:
        shares = column_sums(z, z, offsets, None, None, share_count(z, offsets), AUTO)
        if layer.over_ranks:
            shares = sum_over_ranks(shares.sum(1, keepdim=True))
        scale, shift, mean, rstd, *moved = norm_finalise(
            shares, counted, z.shape[2] * z.shape[3], weight, bias, running_mean, running_variance, tracked, layer.eps,
            layer.momentum, AUTO,
        )  # fmt: skip
        return _Norm(scale, shift, mean, rstd, tuple(moved))
    if not wants_gradient:
        return _Norm(*fold_norm(weight, bias, running_mean, running_variance, layer.eps))
    mean, rstd = running_mean.double(), (running_variance.double() + layer.eps).rsqrt()
    scale, shift = _scale_shift_of(weight, bias, mean, rstd)
    kind = _table_dtype(weight)
    return _Norm(scale.to(kind), shift.to(kind), mean.to(kind), rstd.to(kind))


class _RoutedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_skip: Tensor | None,
        weights: Tensor,
        order: Tensor,
        sample: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        plan: Plan,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # or zeros are made for each statistic
        layers = [tensors[i : i + PER_LAYER] for i in range(0, len(tensors), PER_LAYER)]
        tiles = TilePlans(offsets, order.shape[0], {})
        zs, norms = [], []
        over_ranks = any(layer.over_ranks and layer.training for layer in plan.layers)
        counted = offsets_over_ranks(offsets) if over_ranks else offsets
        source: Tensor = x
        index: Tensor | None = sample
        for i, (layer, parameters) in enumerate(zip(plan.layers, layers, strict=True)):
            if i == plan.depth:  # the skip
                source, index = x if x_skip is None else x_skip, sample
            made = tiles.of(parameters[0], source.shape[2:], False, layer)
            z = conv_forward(source, parameters[0], offsets, index, made, layer.geometry, AUTO)
            first = FIXED + PER_LAYER * i + 1
            wants_gradient = any(ctx.needs_input_grad[first : first + 2])
            norm = _normalize(z, offsets, counted, parameters[1:6], parameters[6:], layer, wants_gradient)
            zs.append(z)
            norms.append(norm)
            if i < plan.depth - 1:
                source, index = scale_shift(z, offsets, norm.scale, norm.shift, True, AUTO), None
        last = norms[plan.depth - 1]
        skip, skip_scale, skip_shift = x, None, None
        if plan.downsample:
            skip, skip_scale, skip_shift = zs[-1], norms[-1].scale, norms[-1].shift
        out = head_forward(
            zs[plan.depth - 1],
            last.scale,
            last.shift,
            skip,
            skip_scale,
            skip_shift,
            order,
            inverse,
            offsets,
            weights,
            AUTO,
        )
        tables = [table for norm in norms for table in (norm.scale, norm.shift, norm.mean, norm.rstd)]
        filters = [parameters[0] for parameters in layers]
        ctx.plan = plan
        ctx.size, ctx.skip_size = x.shape[2:], None if x_skip is None else x_skip.shape[2:]
        ctx.tile_plans = [(key, len(made)) for key, made in tiles.made.items()]
        wgrads = ctx.needs_input_grad[FIXED::PER_LAYER]  # layer by layer, whether its filters want a gradient
        reads_x = wgrads[0] or not plan.downsample or (x_skip is None and wgrads[-1])
        reads_skip = x_skip is not None and wgrads[-1]
        maps = (x if reads_x else None, x_skip if reads_skip else None)
        made = [tensor for tensors in tiles.made.values() for tensor in tensors]
        # For derivatives of the gradient alone, which need what the norms were made of as well.
        numbers = [
            kept for layer, parameters in zip(plan.layers, layers, strict=True) for kept in _kept(layer, parameters)
        ]
        # They may move before a backward, which does not read them.
        if not torch.compiler.is_compiling():
            ctx.numbers, ctx.versions = numbers, _versions(numbers)
        ctx.save_for_backward(*maps, weights, order, sample, inverse, offsets, *zs, *tables, *filters, *made, counted)
        statistics = [moved for norm in norms for moved in norm.moved]
        ctx.mark_non_differentiable(*statistics)
        return out, *statistics

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * len(ctx.needs_input_grad)
        return _twice_differentiable(ctx, d_out) if another_follows() else Backward(ctx).run(d_out)


def _kept(layer: Layer, parameters: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """What ``plain_block`` needs of a norm: a norm in training moves its running statistics, and reads none."""
    _, weight, bias, mean, variance, _, scale, shift = parameters
    return [weight, bias, None if layer.training else mean, None if layer.training else variance, scale, shift]


def _versions(tensors: list[Tensor | None]) -> list[int]:
    return [-1 if tensor is None else version(tensor) for tensor in tensors]


def _twice_differentiable(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient in plain PyTorch, for another derivative."""
    saved = ctx.saved_tensors
    x, x_skip, weights, *route = saved[:7]
    if any(layer.over_ranks and layer.training for layer in ctx.plan.layers):
        raise RuntimeError("a derivative of the gradient through batch norms over several ranks was asked for")
    if x is None or (x_skip is None and ctx.skip_size is not None):
        raise RuntimeError(
            "a derivative of the gradient through experts whose parameters are frozen, with a downsampling skip, was"
            ' asked for: use impl="reference" on the layer, or robust_moe_kernels.modules.general_path()'
        )
    count = len(ctx.plan.layers)
    filters, numbers = saved[7 + 5 * count : 7 + 6 * count], ctx.numbers
    if _versions(numbers) != ctx.versions:
        raise RuntimeError(
            "a number of an expert's norm has been modified by an inplace operation since the forward whose gradient is"
            " to be differentiated"
        )
    layers = [(filters[i], *numbers[6 * i : 6 * i + 6]) for i in range(count)]
    inputs = [x, x_skip, weights, *(tensor for layer in layers for tensor in layer)]
    found = plain_gradients(partial(plain_block, ctx.plan, route), inputs, d_out)
    gradients: list[Tensor | None] = [*found[:3], *[None] * (FIXED - 3)]
    for i in range(count):
        of_layer = found[3 + KEPT * i : 3 + KEPT * (i + 1)]
        gradients += [*of_layer[:3], *[None] * (PER_LAYER - 3)]
    return tuple(gradients)


def routed_block(
    x: Tensor, x_skip: Tensor | None, weights: Tensor, route: Route, plan: Plan, tensors: list[Tensor | None]
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """A routed residual block: sum over each sample's k experts of weight * relu(main(x) + skip(x)).

    Args:
        x: [B, C, H, W].
        x_skip: what a downsampling skip reads, if it is not x itself (a pooled x): [B, C, H', W'].
        weights: [B, k], in x's dtype (float32 for lower precisions).
        route: of the same batch.
        plan: the block.
        tensors: for each layer, convolution weight [E, O, I, kh, kw]; norm weight, bias, running mean and variance
            [E, O], number of batches [E]; what ``fold_norm`` made of the four, which then takes their place, or None
            twice.

    Returns:
        [B, O, H', W'] channels-last, differentiable in x, x_skip, weights and the layers' weights and biases (a
        folded norm's excepted); and for each layer in training what this batch makes of its norm's running mean,
        running variance and number of batches, whose own tensors are left alone.
    """
    where = (route.order, route.sample, route.inverse, route.offsets)
    out, *flat = _RoutedBlock.apply(x, x_skip, weights, *where, plan, *tensors)
    return out, list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
