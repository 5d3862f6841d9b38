"""Dispatch and combine: samples gathered into rows sorted by expert, and summed back with weights.

Three linear maps that are each other's derivatives, so that any number of derivatives is exact:

    dispatch(x, w)[r] = w[p] * x[p // k]          p = order[r], the pair at row r
    combine(y, w)[b]  = sum_j w[b, j] * y[inverse[b*k + j]]
    row_dot(x, y)[p]  = <x[p // k], y[inverse[p]]>

    d dispatch: dx = combine(g, w), dw = row_dot(x, g)
    d combine:  dy = dispatch(g, w), dw = row_dot(g, y)
    d row_dot:  dx = combine(y, g), dy = dispatch(x, g)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.checks import (
    FLOATS,
    expect,
    expect_dtype,
    expect_same_device,
    expect_shape,
    expect_tensor,
)
from robust_moe_kernels.dispatch import AUTO, Op
from robust_moe_kernels.layout import dense, dense_format, rows_like
from robust_moe_kernels.operands import Operands, expect_order
from robust_moe_kernels.ops.routing import Route, expect_route

__all__ = ["PERMUTE", "combine", "dispatch"]

PERMUTE = Op(__package__, cpu=("native", "reference"), cuda=("triton", "native", "reference"))


def _check(data: Tensor, argument: str, per_sample: bool, route: Route) -> None:
    expect_tensor(data, argument)
    expect_dtype(data, argument, FLOATS)
    expect_route(route, data, argument)
    rows = route.order.shape[0] // route.top_k if per_sample else route.order.shape[0]
    expect(data.dim() >= 2 and data.shape[0] == rows, argument, f"shape [{rows}, ...]", list(data.shape))


def dispatch(x: Tensor, route: Route, impl: str = AUTO) -> Tensor:
    """Gather each sample's map once for every expert it is sent to.

    Args:
        x: [B, ...], any floating dtype, e.g. [B, C, H, W] contiguous or channels-last.
        route: of the same batch, from :func:`sort_by_expert`.
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".

    Returns:
        [R, ...], rows of expert e at ``route.offsets[e]:route.offsets[e+1]``; dtype and memory format of x.
        Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; on the CPU also a route whose order and
            inverse are not each other's.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    _check(x, "x", True, route)
    return torch.ops.robust_moe_kernels.dispatch(x, route.order, route.inverse, None, route.top_k, impl)


def combine(y: Tensor, route: Route, weights: Tensor, impl: str = AUTO) -> Tensor:
    """Sum each sample's rows with its weights: out[b] = sum_j weights[b, j] * y[row of (b, j)].

    Sums in slot order, in float32 (float64 for float64 rows); no zeros are written, no expert is masked.

    Args:
        y: [R, ...], any floating dtype.
        route: of the same batch, from :func:`sort_by_expert`.
        weights: [B, k], any floating dtype.
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".

    Returns:
        [B, ...], dtype and memory format of y. Differentiable in y and weights.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; on the CPU also a route whose order and
            inverse are not each other's.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    _check(y, "y", False, route)
    expect_tensor(weights, "weights")
    expect_dtype(weights, "weights", FLOATS)
    expect_shape(weights, "weights", (route.order.numel() // route.top_k, route.top_k), "[B, k]")
    expect_same_device(weights, "weights", y, "y")
    weights = weights.to(_accumulator(y))
    return torch.ops.robust_moe_kernels.combine(y, route.order, route.inverse, weights, route.top_k, impl)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_ROUTE = "Tensor order, Tensor inverse"
torch.library.define(
    "robust_moe_kernels::dispatch", f"(Tensor x, {_ROUTE}, Tensor? weights, int top_k, str impl) -> Tensor"
)
torch.library.define(
    "robust_moe_kernels::combine", f"(Tensor y, {_ROUTE}, Tensor? weights, int top_k, str impl) -> Tensor"
)
torch.library.define("robust_moe_kernels::row_dot", f"(Tensor x, Tensor y, {_ROUTE}, int top_k, str impl) -> Tensor")


_DISPATCH = Operands("x float [B, ...]; order int64 [R]; inverse int64 [R]; weights? sum [B, k]")
_COMBINE = Operands("y float [R, ...]; order int64 [R]; inverse int64 [R]; weights? sum [B, k]")
_ROW_DOT = Operands("x float [B, ...]; y x [R, ...]; order int64 [R]; inverse int64 [R]")


def _checked_route(order: Tensor, inverse: Tensor, top_k: int, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Order and inverse, contiguous; raises where they are no route of B samples with k experts each."""
    rows = sizes["R"]
    expect(top_k == sizes.get("k", top_k) and top_k >= 1, "top_k", f"k = {sizes.get('k', 'at least 1')}", top_k)
    expect(rows == sizes.get("B", rows // top_k) * top_k, "order", "shape [B * k]", [rows])
    return expect_order(order, inverse)


@torch.library.impl("robust_moe_kernels::dispatch", "default")
def _dispatch(x: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int, impl: str) -> Tensor:
    sizes = _DISPATCH(x, order, inverse, weights)
    order, inverse = _checked_route(order, inverse, top_k, sizes)
    x = dense(x)
    weights = None if weights is None else weights.contiguous()
    return PERMUTE.choose(impl, x).dispatch(x, order, inverse, weights, top_k)


@torch.library.register_fake("robust_moe_kernels::dispatch")
def _dispatch_fake(x: Tensor, order: Tensor, inverse: Tensor, weights: Any, top_k: int, impl: str) -> Tensor:
    _DISPATCH.expect_kinds(x, order, inverse, weights)
    return rows_like(dense(x), order.shape[0])


@torch.library.impl("robust_moe_kernels::combine", "default")
def _combine(y: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int, impl: str) -> Tensor:
    sizes = _COMBINE(y, order, inverse, weights)
    order, inverse = _checked_route(order, inverse, top_k, sizes)
    y = dense(y)
    weights = None if weights is None else weights.contiguous()
    return PERMUTE.choose(impl, y).combine(y, order, inverse, weights, top_k)


@torch.library.register_fake("robust_moe_kernels::combine")
def _combine_fake(y: Tensor, order: Tensor, inverse: Tensor, weights: Any, top_k: int, impl: str) -> Tensor:
    _COMBINE.expect_kinds(y, order, inverse, weights)
    return rows_like(dense(y), order.shape[0] // top_k)


@torch.library.impl("robust_moe_kernels::row_dot", "default")
def _row_dot(x: Tensor, y: Tensor, order: Tensor, inverse: Tensor, top_k: int, impl: str) -> Tensor:
    order, inverse = _checked_route(order, inverse, top_k, _ROW_DOT(x, y, order, inverse))
    layout = dense_format(y)
    x, y = x.contiguous(memory_format=layout), y.contiguous(memory_format=layout)
    return PERMUTE.choose(impl, x).row_dot(x, y, order, inverse, top_k)


@torch.library.register_fake("robust_moe_kernels::row_dot")
def _row_dot_fake(x: Tensor, y: Tensor, order: Tensor, inverse: Tensor, top_k: int, impl: str) -> Tensor:
    _ROW_DOT.expect_kinds(x, y, order, inverse)
    return x.new_empty((x.shape[0], top_k), dtype=_accumulator(x))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.top_k, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _d_dispatch(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, order, inverse, weights = ctx.saved_tensors
    ops, rest = torch.ops.robust_moe_kernels, (ctx.top_k, ctx.impl)
    d_x = ops.combine(gradient, order, inverse, weights, *rest) if ctx.needs_input_grad[0] else None
    d_weights = ops.row_dot(x, gradient, order, inverse, *rest) if ctx.needs_input_grad[3] else None
    return d_x, None, None, d_weights, None, None


def _d_combine(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    y, order, inverse, weights = ctx.saved_tensors
    ops, rest = torch.ops.robust_moe_kernels, (ctx.top_k, ctx.impl)
    d_y = ops.dispatch(gradient, order, inverse, weights, *rest) if ctx.needs_input_grad[0] else None
    d_weights = ops.row_dot(gradient, y, order, inverse, *rest) if ctx.needs_input_grad[3] else None
    return d_y, None, None, d_weights, None, None


def _d_row_dot(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, y, order, inverse = ctx.saved_tensors
    ops, rest = torch.ops.robust_moe_kernels, (ctx.top_k, ctx.impl)
    d_x = ops.combine(y, order, inverse, gradient, *rest) if ctx.needs_input_grad[0] else None
    d_y = ops.dispatch(x, order, inverse, gradient, *rest) if ctx.needs_input_grad[1] else None
    return d_x, d_y, None, None, None, None


torch.library.register_autograd("robust_moe_kernels::dispatch", _d_dispatch, setup_context=_save)
torch.library.register_autograd("robust_moe_kernels::combine", _d_combine, setup_context=_save)
torch.library.register_autograd("robust_moe_kernels::row_dot", _d_row_dot, setup_context=_save)
