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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.ops.expert_block import column_sums, head_backward, head_forward, norm_backward, scale_shift
from robust_moe_kernels.ops.expert_conv import conv_dgrad, conv_forward, conv_wgrad
from robust_moe_kernels.ops.routing import Route

__all__ = ["Layer", "Plan", "fold_norm", "routed_block"]

_FIXED = 7  # arguments of the autograd function before the layers' tensors
_PER_LAYER = 7  # convolution weight; norm weight, bias, running mean, running variance; folded scale, shift or None


@dataclass(frozen=True)
class Layer:
    """A convolution and its batch norm: what is not a tensor."""

    geometry: tuple[int, ...]  # stride, padding, dilation, each (vertical, horizontal)
    eps: float
    training: bool  # of the norm: batch statistics, or the running ones


@dataclass(frozen=True)
class Plan:
    """A block: its layers in order, the one of the skip last if there is one."""

    layers: tuple[Layer, ...]
    downsample: bool

    @property
    def depth(self) -> int:
        """Layers of the main path."""
        return len(self.layers) - self.downsample


@dataclass
class _Norm:
    """A batch norm as a scale and shift, with what its gradient and its running statistics need; all [E, C]."""

    scale: Tensor
    shift: Tensor
    mean: Tensor | None = None  # None: folded beforehand, or in evaluation with frozen weight and bias
    rstd: Tensor | None = None
    variance: Tensor | None = None  # biased, of the batch; None in evaluation


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
    z: Tensor, offsets: Tensor, parameters: tuple[Tensor | None, ...], layer: Layer, wants_gradient: bool
) -> _Norm:
    weight, bias, running_mean, running_variance, scale, shift = parameters
    if scale is not None:
        return _Norm(scale, shift)
    if not (layer.training or wants_gradient):
        return _Norm(*fold_norm(weight, bias, running_mean, running_variance, layer.eps))
    if layer.training:
        count = _count(z, offsets)
        total, square = column_sums(z, z, offsets, None, None, AUTO)
        mean = total / count.clamp_min(1)
        # A difference of float64 sums: no cancellation to speak of.
        variance = (square / count.clamp_min(1) - mean.square()).clamp_min(0)
        rstd = torch.where(count == 1, 0.0, (variance + layer.eps).rsqrt())  # a single value: see StackedBatchNorm2d
    else:
        mean, variance = running_mean.double(), None
        rstd = (running_variance.double() + layer.eps).rsqrt()
    tables = (*_scale_shift_of(weight, bias, mean, rstd), mean, rstd, variance)
    return _Norm(*(None if table is None else table.to(_table_dtype(weight)) for table in tables))


def _count(z: Tensor, offsets: Tensor) -> Tensor:
    """Values per channel [E, 1] that each expert's batch norm sees."""
    return offsets.diff()[:, None].double() * (z.shape[2] * z.shape[3])


class _RoutedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_skip: Tensor | None,
        weights: Tensor,
        order: Tensor,
        inverse: Tensor,
        offsets: Tensor,
        plan: Plan,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        sample = order // weights.shape[1]
        layers = [tensors[i : i + _PER_LAYER] for i in range(0, len(tensors), _PER_LAYER)]
        zs, norms = [], []
        source, index = x, sample
        for i, (layer, parameters) in enumerate(zip(plan.layers, layers, strict=True)):
            if i == plan.depth:  # the skip
                source, index = x if x_skip is None else x_skip, sample
            z = conv_forward(source, parameters[0], offsets, index, [], list(layer.geometry), AUTO)
            first = _FIXED + _PER_LAYER * i + 1
            wants_gradient = any(ctx.needs_input_grad[first : first + 2])
            norm = _normalize(z, offsets, parameters[1:], layer, wants_gradient)
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
        wgrads = ctx.needs_input_grad[_FIXED::_PER_LAYER]  # layer by layer, whether its filters want a gradient
        reads_x = wgrads[0] or not plan.downsample or (x_skip is None and wgrads[-1])
        reads_skip = x_skip is not None and wgrads[-1]
        maps = (x if reads_x else None, x_skip if reads_skip else None)
        ctx.save_for_backward(*maps, weights, order, inverse, offsets, *zs, *tables, *filters)
        statistics = []
        for z, norm, layer in zip(zs, norms, plan.layers, strict=True):
            if layer.training:
                statistics += [norm.mean, norm.variance, _count(z, offsets)]
        ctx.mark_non_differentiable(*statistics)
        return out, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _Backward(ctx).run(d_out)


class _Backward:
    """One backward pass; the attributes are what the forward saved."""

    def __init__(self, ctx: Any) -> None:
        self.plan: Plan = ctx.plan
        self.needs = ctx.needs_input_grad
        self.size, self.skip_size = ctx.size, ctx.skip_size
        count = len(self.plan.layers)
        self.x, self.x_skip, self.weights, self.order, self.inverse, self.offsets, *rest = ctx.saved_tensors
        self.zs, rest = rest[:count], rest[count:]
        self.tables, self.filters = [rest[i : i + 4] for i in range(0, 4 * count, 4)], rest[4 * count :]
        self.sample = self.order // self.weights.shape[1]
        self.gradients: list[Tensor | None] = [None] * (_FIXED + _PER_LAYER * count)

    def run(self, d_out: Tensor) -> tuple[Tensor | None, ...]:
        plan, depth = self.plan, self.plan.depth
        scale, shift, *_ = self.tables[depth - 1]
        skip, skip_scale, skip_shift = self.x, None, None
        if plan.downsample:
            skip, (skip_scale, skip_shift, *_) = self.zs[-1], self.tables[-1]
        d_rows, d_weights = head_backward(
            d_out, self.zs[depth - 1], scale, shift, skip, skip_scale, skip_shift, self.order, self.inverse,
            self.offsets, self.weights, AUTO,
        )  # fmt: skip
        self.gradients[2] = d_weights if self.needs[2] else None
        pooled = self.skip_size is not None
        wants_x, wants_skip = self.needs[0], self.needs[1] if pooled else self.needs[0]
        d_x = self._main_path(d_rows, wants_x)
        d_skip = self._skip_path(d_rows, wants_skip) if plan.downsample else (d_rows if wants_skip else None)
        if pooled:
            self.gradients[1] = None if d_skip is None else self._sum_rows(d_skip)
        elif d_x is not None and d_skip is not None:
            d_x += d_skip
        self.gradients[0] = None if d_x is None else self._sum_rows(d_x)
        return tuple(self.gradients)

    def _sum_rows(self, rows: Tensor) -> Tensor:
        top_k = self.weights.shape[1]
        return torch.ops.robust_moe_kernels.combine(rows, self.order, self.inverse, None, top_k, AUTO)

    def _main_path(self, d: Tensor, wants_x: bool) -> Tensor | None:
        for i in reversed(range(self.plan.depth)):
            if not (wants_x or self._layers_want(0, i + 1)):
                return None
            d_z = self._through_norm(i, d, relu=i < self.plan.depth - 1)
            if self.needs[self._argument(i)]:
                if i == 0:
                    source, index = self.x, self.sample
                else:
                    scale, shift, *_ = self.tables[i - 1]
                    source, index = scale_shift(self.zs[i - 1], self.offsets, scale, shift, True, AUTO), None
                self._filter_gradient(i, source, d_z, index)
            if i == 0:
                return self._through_conv(i, d_z, self.size) if wants_x else None
            if wants_x or self._layers_want(0, i):
                d = self._through_conv(i, d_z, self.zs[i - 1].shape[2:])
        raise AssertionError("a block has at least one layer")

    def _skip_path(self, d: Tensor, wants_x: bool) -> Tensor | None:
        i = self.plan.depth
        if not (wants_x or self._layers_want(i, i + 1)):
            return None
        d_z = self._through_norm(i, d, relu=False)
        if self.needs[self._argument(i)]:
            self._filter_gradient(i, self.x if self.skip_size is None else self.x_skip, d_z, self.sample)
        return self._through_conv(i, d_z, self.skip_size or self.size) if wants_x else None

    def _argument(self, i: int) -> int:
        """Position of layer i's first tensor among the function's arguments."""
        return _FIXED + _PER_LAYER * i

    def _layers_want(self, first: int, last: int) -> bool:
        return any(self.needs[self._argument(first) : self._argument(last)])

    def _through_norm(self, i: int, d: Tensor, relu: bool) -> Tensor:
        """Gradient before layer i's batch norm from the one after it (and its ReLU); keeps those of weight and bias."""
        scale, shift, mean, rstd = self.tables[i]
        z = self.zs[i]
        mask = (scale, shift) if relu else (None, None)
        wants = self.needs[self._argument(i) + 1] or self.needs[self._argument(i) + 2]
        q = r = None
        training = self.plan.layers[i].training
        if training or wants:
            total, product = column_sums(d, z, self.offsets, *mask, AUTO)
            d_weight = (product - mean * total) * rstd
            self.gradients[self._argument(i) + 1] = d_weight.to(scale.dtype) if wants else None
            self.gradients[self._argument(i) + 2] = total.to(scale.dtype) if wants else None
            if training:
                count = _count(z, self.offsets).clamp_min(1)
                q64 = -scale * rstd * d_weight / count
                r = (-scale * total / count - q64 * mean).to(scale.dtype)
                q = q64.to(scale.dtype)
        return norm_backward(d, z, self.offsets, scale, q, r, *mask, AUTO)

    def _filter_gradient(self, i: int, source: Tensor, d_z: Tensor, index: Tensor | None) -> None:
        geometry = list(self.plan.layers[i].geometry)
        self.gradients[self._argument(i)] = conv_wgrad(
            source, d_z, self.offsets, index, self.filters[i], geometry, AUTO
        )

    def _through_conv(self, i: int, d_z: Tensor, size: torch.Size) -> Tensor:
        geometry = list(self.plan.layers[i].geometry)
        return conv_dgrad(d_z, self.filters[i], self.offsets, [], *size, geometry, AUTO)


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
            [E, O]; what ``fold_norm`` made of those four, which then takes their place, or None twice.

    Returns:
        [B, O, H', W'] channels-last, differentiable once in x, x_skip, weights and the layers' weights and biases (a
        folded norm's excepted); and for each layer in training (mean, biased variance, count): what its batch norm
        saw, [E, O] and [E, 1].
    """
    out, *flat = _RoutedBlock.apply(x, x_skip, weights, route.order, route.inverse, route.offsets, plan, *tensors)
    return out, list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
