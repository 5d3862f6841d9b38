"""The gradient of a routed residual block, composed of the engine's raw operations.

Only what is asked for is computed. Where the norms at the block's end are in evaluation and frozen, as in an attack,
one operation goes through the end and through them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.modules.ranks import sum_over_ranks
from robust_moe_kernels.ops.expert_block import (
    column_sums,
    head_backward,
    head_norm_backward,
    norm_backward,
    norm_finalise_backward,
    scale_shift,
    share_count,
    sum_rows,
)
from robust_moe_kernels.ops.expert_conv import conv_dgrad, conv_plan, conv_wgrad, plan_key

__all__ = ["FIXED", "PER_LAYER", "Backward", "Layer", "Plan", "TilePlans"]

FIXED = 8  # arguments of the autograd function before the layers' tensors
PER_LAYER = 8  # convolution weight; norm weight, bias, running mean, variance, batches; folded scale, shift or None


@dataclass(frozen=True)
class Layer:
    """A convolution and its batch norm: what is not a tensor."""

    geometry: Geometry
    eps: float
    momentum: float
    training: bool  # of the norm: batch statistics, or the running ones
    over_ranks: bool = False  # batch statistics of the rows of all ranks


@dataclass(frozen=True)
class Plan:
    """A block: its layers in order, the one of the skip last if there is one."""

    layers: tuple[Layer, ...]
    downsample: bool

    @property
    def depth(self) -> int:
        """Layers of the main path."""
        return len(self.layers) - self.downsample


class TilePlans:
    """Plans of a block's products, each made once for all products that can share it; see ``plan_key``."""

    def __init__(self, offsets: Tensor, rows: int, made: dict[Hashable, list[Tensor]]) -> None:
        self.offsets, self.rows, self.made = offsets, rows, made
        # Which products may share is no part of a compiled graph: there each makes its own.
        self.needed = not torch.compiler.is_compiling()

    def of(self, weight: Tensor, size: torch.Size, backward: bool, layer: Layer) -> list[Tensor]:
        """For a convolution of maps of ``size`` by filters ``weight``, or for its input gradient."""
        if not self.needed:
            return []
        height, width = size
        key = plan_key(weight, self.rows, height, width, backward, layer.geometry)
        if key is None:  # nor do the block's other products need one
            self.needed = False
            return []
        if key not in self.made:
            self.made[key] = conv_plan(weight, self.offsets, self.rows, height, width, backward, layer.geometry, AUTO)
        return self.made[key]


class Backward:
    """One backward pass; the attributes are what the forward saved."""

    def __init__(self, ctx: Any) -> None:
        self.plan: Plan = ctx.plan
        self.needs = ctx.needs_input_grad
        self.size, self.skip_size = ctx.size, ctx.skip_size
        count = len(self.plan.layers)
        saved = ctx.saved_tensors  # once: checkpointing refuses to unpack again
        self.x, self.x_skip, self.weights, *index, self.offsets = saved[:7]
        self.order, self.sample, self.inverse = index
        rest = saved[7:]
        self.zs, rest = rest[:count], rest[count:]
        self.tables, rest = [rest[i : i + 4] for i in range(0, 4 * count, 4)], rest[4 * count :]
        self.filters, rest = rest[:count], rest[count:]
        made = {}
        for key, size in ctx.tile_plans:
            made[key], rest = list(rest[:size]), rest[size:]
        (self.counted,) = rest  # offsets of the rows that the norms count
        self.tiles = TilePlans(self.offsets, len(self.order), made)
        self.gradients: list[Tensor | None] = [None] * (FIXED + PER_LAYER * count)

    def run(self, d_out: Tensor) -> tuple[Tensor | None, ...]:
        plan, depth = self.plan, self.plan.depth
        scale, shift, *_ = self.tables[depth - 1]
        skip, skip_scale, skip_shift = self.x, None, None
        if plan.downsample:
            skip, (skip_scale, skip_shift, *_) = self.zs[-1], self.tables[-1]
        head = (
            d_out, self.zs[depth - 1], scale, shift, skip, skip_scale, skip_shift, self.order, self.inverse,
            self.offsets, self.weights, AUTO,
        )  # fmt: skip
        fixed = not any(self._norm_learns(i) for i in range(depth - 1, len(plan.layers)))
        if fixed:
            d_main, d_rows, d_weights = head_norm_backward(*head)
        else:
            d_rows, d_weights = head_backward(*head)
            d_main = d_rows
        self.gradients[2] = d_weights if self.needs[2] else None
        pooled = self.skip_size is not None
        wants_x, wants_skip = self.needs[0], self.needs[1] if pooled else self.needs[0]
        d_x = self._main_path(d_main, wants_x, fixed)
        d_skip = self._skip_path(d_rows, wants_skip, fixed) if plan.downsample else (d_rows if wants_skip else None)
        if pooled:
            self.gradients[0], self.gradients[1] = self._sum_rows(d_x, None), self._sum_rows(d_skip, None)
        else:
            self.gradients[0] = self._sum_rows(d_x, d_skip)
        return tuple(self.gradients)

    def _sum_rows(self, rows: Tensor | None, other: Tensor | None) -> Tensor | None:
        """Each sample's gradient from those of its rows, of one path or of both."""
        top_k = self.weights.shape[1]
        if rows is None or other is None:
            rows = other if rows is None else rows
            if rows is None:
                return None
            return torch.ops.robust_moe_kernels.combine(rows, self.order, self.inverse, None, top_k, AUTO)
        return sum_rows(rows, other, self.inverse, top_k, AUTO)

    def _main_path(self, d: Tensor, wants_x: bool, past_norm: bool) -> Tensor | None:
        """``past_norm``: d is the gradient before the last norm already."""
        depth = self.plan.depth
        for i in reversed(range(depth)):
            if not (wants_x or self._layers_want(0, i + 1)):
                return None
            d_z = d if past_norm and i == depth - 1 else self._through_norm(i, d, relu=i < depth - 1)
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

    def _skip_path(self, d: Tensor, wants_x: bool, past_norm: bool) -> Tensor | None:
        i = self.plan.depth
        if not (wants_x or self._layers_want(i, i + 1)):
            return None
        d_z = d if past_norm else self._through_norm(i, d, relu=False)
        if self.needs[self._argument(i)]:
            self._filter_gradient(i, self.x if self.skip_size is None else self.x_skip, d_z, self.sample)
        return self._through_conv(i, d_z, self.skip_size or self.size) if wants_x else None

    def _argument(self, i: int) -> int:
        """Position of layer i's first tensor among the function's arguments."""
        return FIXED + PER_LAYER * i

    def _layers_want(self, first: int, last: int) -> bool:
        return any(self.needs[self._argument(first) : self._argument(last)])

    def _norm_wants(self, i: int) -> bool:
        """Whether layer i's norm has weights that want a gradient."""
        return self.needs[self._argument(i) + 1] or self.needs[self._argument(i) + 2]

    def _norm_learns(self, i: int) -> bool:
        """Whether more than a product with its scale leads through layer i's norm."""
        return self.plan.layers[i].training or self._norm_wants(i)

    def _through_norm(self, i: int, d: Tensor, relu: bool) -> Tensor:
        """Gradient before layer i's batch norm from the one after it (and its ReLU); keeps those of weight and bias."""
        scale, shift, mean, rstd = self.tables[i]
        z = self.zs[i]
        mask = (scale, shift) if relu else (None, None)
        q = r = None
        if self._norm_learns(i):
            training = self.plan.layers[i].training
            shares = column_sums(d, z, self.offsets, *mask, share_count(z, self.offsets), AUTO)
            pixels = z.shape[2] * z.shape[3]
            found = norm_finalise_backward(shares, self.offsets, pixels, scale, mean, rstd, training, AUTO)
            if self._norm_wants(i):
                at = self._argument(i)
                self.gradients[at + 1], self.gradients[at + 2] = found[:2]
            if training and self.plan.layers[i].over_ranks:  # weight and bias have the gradient of this rank's loss
                shares = sum_over_ranks(shares.sum(1, keepdim=True))
                found = norm_finalise_backward(shares, self.counted, pixels, scale, mean, rstd, training, AUTO)
            if training:
                q, r = found[2:]
        return norm_backward(d, z, self.offsets, scale, q, r, *mask, AUTO)

    def _filter_gradient(self, i: int, source: Tensor, d_z: Tensor, index: Tensor | None) -> None:
        geometry = self.plan.layers[i].geometry
        self.gradients[self._argument(i)] = conv_wgrad(
            source, d_z, self.offsets, index, self.filters[i], geometry, AUTO
        )

    def _through_conv(self, i: int, d_z: Tensor, size: torch.Size) -> Tensor:
        layer = self.plan.layers[i]
        tiles = self.tiles.of(self.filters[i], size, True, layer)
        return conv_dgrad(d_z, self.filters[i], self.offsets, tiles, size[0], size[1], layer.geometry, AUTO)
