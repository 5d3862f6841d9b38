"""Grouped convolution of rows sorted by expert: every expert's rows with its own filters, in one call.

Three raw operations (``conv_forward``, ``conv_dgrad``, ``conv_wgrad``) that a fused block composes as it needs them, a
fourth (``conv_plan``) that prepares what several of the first two share, and ``expert_conv``, the differentiable
function made of them. All maps are channels-last. No operation waits for the device, except the reference.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.checks import FLOATS, expect, expect_dtype, expect_same_device, expect_tensor
from robust_moe_kernels.dispatch import AUTO, Op
from robust_moe_kernels.layout import Geometry, channels_last, channels_last_empty, pair_of
from robust_moe_kernels.operands import Operands, expect_index, expect_offsets
from robust_moe_kernels.ops.expert_conv import reference_impl
from robust_moe_kernels.second_derivatives import another_follows, plain_gradients

__all__ = ["EXPERT_CONV", "conv_dgrad", "conv_forward", "conv_plan", "conv_wgrad", "expert_conv", "plan_key"]

EXPERT_CONV = Op(__package__, cpu=("native", "reference"), cuda=("triton", "reference"))


def expert_conv(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    impl: str = AUTO,
) -> Tensor:
    """Convolve each expert's rows with its own filters.

    Args:
        x: rows [R, I, H, W] sorted by expert, any floating dtype; computed channels-last.
        weight: [E, O, I, kh, kw], dtype of x. Fastest where the output channels lie innermost in memory
            (``modules.experts`` keeps them so).
        offsets: [E+1] int64, rows ``offsets[e]:offsets[e+1]`` are expert e's; ``offsets[E] == R``.
        stride, padding (zeros), dilation: (vertical, horizontal).
        impl: "auto", "reference", "native" (CPU) or "triton", both for float32, float16 and bfloat16. The CPU computes
            bfloat16 by its own instructions where it has them (AMX, AVX512-BF16); otherwise, and float16, as float32,
            rounded.

    Returns:
        [R, O, H', W'], channels-last. Differentiable in x and weight; an expert without rows has gradient 0.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; on the CPU also offsets out of range.
        ImplementationUnavailable: a named implementation cannot run here, or not on these operands.
    """
    expect_tensor(x, "x")
    expect_dtype(x, "x", FLOATS)
    expect(x.dim() == 4, "x", "shape [R, I, H, W]", list(x.shape))
    expect_tensor(weight, "weight")
    expect_dtype(weight, "weight", (x.dtype,))
    ok = weight.dim() == 5 and weight.shape[2] == x.shape[1] and min(weight.shape) >= 1
    expect(ok, "weight", f"shape [E, O, {x.shape[1]}, kh, kw], all >= 1", list(weight.shape))
    expect_tensor(offsets, "offsets")
    expect_dtype(offsets, "offsets", (torch.int64,))
    expect(offsets.shape == (weight.shape[0] + 1,), "offsets", f"shape [{weight.shape[0] + 1}]", list(offsets.shape))
    expect_same_device(weight, "weight", x, "x")
    expect_same_device(offsets, "offsets", x, "x")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        ok = isinstance(pair, tuple | list) and len(pair) == 2 and all(type(n) is int and n >= least for n in pair)
        expect(ok, name, f"two integers >= {least}", repr(pair))
    geometry = Geometry(pair_of(stride), pair_of(padding), pair_of(dilation))
    size = geometry.output_size(x.shape[2], x.shape[3], weight.shape[3:])
    expect(min(size) >= 1, "x", "maps that give an output of at least 1x1", f"{list(x.shape)} -> {list(size)}")
    return _Conv.apply(x, weight, offsets, geometry, impl)


_FILTERS = "weight{0} [E, O, I, kh, kw]; offsets int64 [E+1]"
_PLAN = Operands(_FILTERS.format(" float"))
_FORWARD = Operands(f"x float [N, I, H, W]; {_FILTERS.format(' x')}; sample? int64 [R]")
_DGRAD = Operands(f"d_out float [R, O, H, W]; {_FILTERS.format(' d_out')}")
_WGRAD = Operands(f"x float [N, I, H, W]; {_FILTERS.format(' x')}; d_out x [R, O, h, w]; sample? int64 [R]")


def _checked_geometry(
    numbers: list[int], height: int, width: int, weight: Tensor, output: torch.Size | None = None
) -> Geometry:
    """The geometry of a convolution of maps of that height and width; raises where a number is out of range, the output
    would be empty or is not of the size ``output``, or there are no filters."""
    ok = len(numbers) == 6 and all(least <= n < 2**31 for n, least in zip(numbers, (1, 1, 0, 0, 1, 1), strict=True))
    expect(ok, "geometry", "stride >= 1, padding >= 0 and dilation >= 1, each two integers below 2^31", numbers)
    expect(min(weight.shape) >= 1, "weight", "shape [E, O, I, kh, kw], all >= 1", list(weight.shape))
    geometry = Geometry.of_numbers(numbers)
    size = geometry.output_size(height, width, weight.shape[3:])
    ok = min(height, width, *size) >= 1 and max(height, width, *size) < 2**31
    expect(ok, "x", "maps that give an output of at least 1x1", f"{[height, width]} -> {list(size)}")
    if output is not None:
        expect(size == tuple(output), "d_out", f"maps of {list(size)} pixels", list(output))
    return geometry


def _checked_sample(sample: Tensor | None, maps: int, rows: int) -> Tensor | None:
    """Contiguous ``sample``; raises where it names a map that there is not, or rows are not maps in their order."""
    if sample is not None:
        return expect_index(sample, "sample", maps)
    expect(maps == rows, "x", f"{rows} maps, one per row, or a sample for each row", maps)
    return None


_G = "int[] geometry, str impl"
torch.library.define(
    "robust_moe_kernels::expert_conv_plan",
    f"(Tensor weight, Tensor offsets, int rows, int height, int width, bool backward, {_G}) -> Tensor[]",
)
torch.library.define(
    "robust_moe_kernels::expert_conv_forward",
    f"(Tensor x, Tensor weight, Tensor offsets, Tensor? sample, Tensor[] plan, {_G}) -> Tensor",
)
torch.library.define(
    "robust_moe_kernels::expert_conv_dgrad",
    f"(Tensor d_out, Tensor weight, Tensor offsets, Tensor[] plan, int height, int width, {_G}) -> Tensor",
)
torch.library.define(
    "robust_moe_kernels::expert_conv_wgrad",
    f"(Tensor x, Tensor d_out, Tensor offsets, Tensor? sample, Tensor weight, {_G}) -> Tensor",
)


@torch.library.impl("robust_moe_kernels::expert_conv_plan", "default")
def _plan(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: list[int], impl: str
) -> list[Tensor]:
    _PLAN(weight, offsets)
    shape = _checked_geometry(geometry, height, width, weight)
    expect(rows >= 0, "rows", "R >= 0", rows)
    offsets = expect_offsets(offsets, rows)
    return EXPERT_CONV.choose(impl, weight).plan(weight, offsets, rows, height, width, backward, shape)


@torch.library.register_fake("robust_moe_kernels::expert_conv_plan")
def _plan_fake(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: list[int], impl: str
) -> list[Tensor]:
    _PLAN.expect_kinds(weight, offsets)
    module = EXPERT_CONV.choose(impl, weight)
    return module.plan_like(weight, offsets, rows, height, width, backward, Geometry.of_numbers(geometry))


@torch.library.impl("robust_moe_kernels::expert_conv_forward", "default")
def _forward(
    x: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor], geometry: list[int],
    impl: str,
) -> Tensor:  # fmt: skip
    sizes = _FORWARD(x, weight, offsets, sample)
    shape = _checked_geometry(geometry, sizes["H"], sizes["W"], weight)
    rows = sizes.get("R", sizes["N"])
    sample, offsets = _checked_sample(sample, sizes["N"], rows), expect_offsets(offsets, rows)
    return EXPERT_CONV.choose(impl, x, weight).forward(channels_last(x), weight, offsets, sample, plan, shape)


@torch.library.register_fake("robust_moe_kernels::expert_conv_forward")
def _forward_fake(
    x: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor], geometry: list[int],
    impl: str,
) -> Tensor:  # fmt: skip
    _FORWARD.expect_kinds(x, weight, offsets, sample)
    return Geometry.of_numbers(geometry).output_like(x, weight, x.shape[0] if sample is None else sample.shape[0])


@torch.library.impl("robust_moe_kernels::expert_conv_dgrad", "default")
def _dgrad(
    d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int, geometry: list[int],
    impl: str,
) -> Tensor:  # fmt: skip
    sizes = _DGRAD(d_out, weight, offsets)
    shape = _checked_geometry(geometry, height, width, weight, d_out.shape[2:])
    offsets = expect_offsets(offsets, sizes["R"])
    chosen = EXPERT_CONV.choose(impl, d_out, weight)
    return chosen.dgrad(channels_last(d_out), weight, offsets, plan, height, width, shape)


@torch.library.register_fake("robust_moe_kernels::expert_conv_dgrad")
def _dgrad_fake(
    d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int, geometry: list[int],
    impl: str,
) -> Tensor:  # fmt: skip
    _DGRAD.expect_kinds(d_out, weight, offsets)
    return channels_last_empty(d_out, (d_out.shape[0], weight.shape[2], height, width))


@torch.library.impl("robust_moe_kernels::expert_conv_wgrad", "default")
def _wgrad(
    x: Tensor, d_out: Tensor, offsets: Tensor, sample: Tensor | None, weight: Tensor, geometry: list[int], impl: str
) -> Tensor:
    sizes = _WGRAD(x, weight, offsets, d_out, sample)
    shape = _checked_geometry(geometry, sizes["H"], sizes["W"], weight, d_out.shape[2:])
    sample = _checked_sample(sample, sizes["N"], sizes["R"])
    offsets = expect_offsets(offsets, sizes["R"])
    chosen = EXPERT_CONV.choose(impl, x, weight)
    return chosen.wgrad(channels_last(x), channels_last(d_out), offsets, sample, weight, shape)


@torch.library.register_fake("robust_moe_kernels::expert_conv_wgrad")
def _wgrad_fake(
    x: Tensor, d_out: Tensor, offsets: Tensor, sample: Tensor | None, weight: Tensor, geometry: list[int], impl: str
) -> Tensor:
    _WGRAD.expect_kinds(x, weight, offsets, d_out, sample)
    return torch.empty_like(weight)


_OPS = torch.ops.robust_moe_kernels


def _numbers(geometry: Geometry) -> list[int]:
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry: expected a Geometry, got {type(geometry).__name__}")
    return geometry.numbers()


def plan_key(
    weight: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry, impl: str = AUTO
) -> Hashable | None:
    """What a product's plan depends on beside ``offsets``: products with equal keys and offsets may share a plan.

    A residual block's products mostly do: two convolutions of equal geometry and size of map have one key, whatever
    ``sample`` they gather by; so has the input gradient of a convolution with stride 1 whose padding is half of what
    its filter spans (3x3 with padding 1, 1x1 with none): it reads the same windows, taps in opposite order. Keys
    differ where the channels call for another tile, and between a forward pass and an input gradient of any other
    geometry.

    Args:
        weight: [E, O, I, kh, kw], the product's filters.
        rows: R.
        height, width: of the convolution's input map, for an input gradient too.
        backward: whether the product is the input gradient.
        geometry: the convolution's.
        impl: as the product's own.

    Returns:
        A hashable value, or None where products need no plan: pass them an empty list.
    """
    return EXPERT_CONV.choose(impl, weight).plan_key(weight, rows, height, width, backward, geometry)


def conv_plan(
    weight: Tensor, offsets: Tensor, rows: int, height: int, width: int, backward: bool, geometry: Geometry,
    impl: str = AUTO,
) -> list[Tensor]:  # fmt: skip
    """What products with the same ``plan_key`` (whose arguments these are) and ``offsets`` [E+1] share; may be []."""
    return _OPS.expert_conv_plan(weight, offsets, rows, height, width, backward, _numbers(geometry), impl)


def conv_forward(
    x: Tensor, weight: Tensor, offsets: Tensor, sample: Tensor | None, plan: list[Tensor], geometry: Geometry,
    impl: str = AUTO,
) -> Tensor:  # fmt: skip
    """The convolution without derivatives.

    Args:
        x: [N, I, H, W], the rows themselves or what they are gathered from.
        weight: [E, O, I, kh, kw], dtype of x.
        offsets: [E+1] int64; rows ``offsets[e]:offsets[e+1]`` are expert e's.
        sample: [R] int64, the row of x that each row is; None: rows are x in its order.
        plan: what ``conv_plan`` made for this product or one that shares it; []: made here, where one is needed.
        geometry: the convolution's.
        impl: as of ``expert_conv``.

    Returns:
        [R, O, H', W'], channels-last.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; on the CPU also offsets or a sample out
            of range.
    """
    return _OPS.expert_conv_forward(x, weight, offsets, sample, plan, _numbers(geometry), impl)


def conv_dgrad(
    d_out: Tensor, weight: Tensor, offsets: Tensor, plan: list[Tensor], height: int, width: int, geometry: Geometry,
    impl: str = AUTO,
) -> Tensor:  # fmt: skip
    """The rows' gradient [R, I, height, width], channels-last, from that of the output [R, O, H', W']; the other
    arguments are those of ``conv_forward``."""
    return _OPS.expert_conv_dgrad(d_out, weight, offsets, plan, height, width, _numbers(geometry), impl)


def conv_wgrad(
    x: Tensor, d_out: Tensor, offsets: Tensor, sample: Tensor | None, weight: Tensor, geometry: Geometry,
    impl: str = AUTO,
) -> Tensor:  # fmt: skip
    """The filters' gradient, in the shape, dtype and memory order of ``weight``, whose numbers are not read; 0 for an
    expert without rows. Arguments as of ``conv_forward`` and ``conv_dgrad``."""
    return _OPS.expert_conv_wgrad(x, d_out, offsets, sample, weight, _numbers(geometry), impl)


class _Conv(torch.autograd.Function):
    """``expert_conv``; computes only the gradients that are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, geometry: Geometry, impl: str) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.geometry, ctx.impl = geometry, impl
        return conv_forward(x, weight, offsets, None, [], geometry, impl)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        if another_follows():
            plain = partial(reference_impl.forward, offsets=offsets, sample=None, plan=[], geometry=ctx.geometry)
            return *plain_gradients(plain, (x, weight), d_out), None, None, None
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = conv_dgrad(d_out, weight, offsets, [], x.shape[2], x.shape[3], ctx.geometry, ctx.impl)
        if ctx.needs_input_grad[1]:
            d_weight = conv_wgrad(x, d_out, offsets, None, weight, ctx.geometry, ctx.impl)
        return d_x, d_weight, None, None, None
