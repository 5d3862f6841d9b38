"""Between the convolutions of routed residual blocks, in Triton: batch norm per expert, ReLU, skip and weighted sum.

All are bound by memory: each map is read and written once. Compiled without multiply-add contraction, so that what a
forward's ReLU lets through is what the backward's mask, computed again from the same numbers, lets through, and that
float32 results without a sum equal the reference bit for bit. Sums run in float64, over fixed shares of an expert's
pixels; a second kernel adds the shares in order: no atomics, the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.layout import channels_last_empty
from robust_moe_kernels.ops.expert_block.triton_kernels import (
    head_backward_kernel,
    head_forward_kernel,
    norm_backward_kernel,
    scale_shift_kernel,
    sum_rows_kernel,
)
from robust_moe_kernels.ops.expert_block.triton_norms import (
    norm_finalise_backward_kernel,
    norm_finalise_kernel,
    sums_kernel,
)
from robust_moe_kernels.triton_support import Build, on_device

__all__ = [
    "builds", "column_sums", "head_backward", "head_forward", "head_norm_backward", "norm_backward", "norm_finalise",
    "norm_finalise_backward", "scale_shift", "sum_rows", "why_not", "why_not_case",
]  # fmt: skip

why_not = triton_support.why_not


def why_not_case(*operands: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``: every floating dtype can."""
    return None


_ELEMENTS = 1024  # of a program's tile of pixels x channels: 8 a thread; with 16 several builds spill
_SUM_PIXELS = 16  # pixels that a summing program reads at once
_NORMS = 256  # of a program that finishes sums
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def _head_options(double: bool) -> dict[str, Any]:
    """Left to itself, the assembler spills a few registers of a block's end to fit more programs on a multiprocessor;
    in float64 it does so up to 128 (Triton 3.6)."""
    return {**_OPTIONS, "maxnreg": 168 if double else 128}


def _shape(channels: int) -> dict[str, int]:
    """A tile's pixels and channels: 64 or 128 channels are whole lines of memory in every dtype."""
    block = 64 if channels <= 64 else 128
    return {"BLOCK_P": _ELEMENTS // block, "BLOCK_C": block}


def _maps(z: Tensor, offsets: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """(pixels, channels, experts) and the constants that follow from them."""
    experts = offsets.numel() - 1
    _, channels, height, width = z.shape
    constants = {"EXPERTS": max(16, triton.next_power_of_2(experts)), **_shape(channels)}
    return (height * width, channels, experts), constants


def _grid(rows: int, sizes: tuple[int, int, int], constants: dict[str, int]) -> tuple[int, int]:
    pixels, channels, _ = sizes
    return rows, triton.cdiv(pixels, constants["BLOCK_P"]) * triton.cdiv(channels, constants["BLOCK_C"])


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not read."""
    return other if tensor is None else tensor.contiguous()


def column_sums(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, shares: int
) -> Tensor:
    experts, channels = offsets.numel() - 1, value.shape[1]
    out = value.new_empty(2, shares, experts, channels, dtype=torch.float64)
    if out.numel():
        block = _shape(channels)["BLOCK_C"]
        with on_device(value):
            sums_kernel[triton.cdiv(channels, block), experts, shares](
                value, other, offsets, _or(scale, offsets), _or(shift, offsets), out[0], out[1], value.shape[0],
                value.shape[2] * value.shape[3], channels, shares, MASKED=scale is not None, BLOCK_P=_SUM_PIXELS,
                BLOCK_C=block, **_OPTIONS,
            )  # fmt: skip
    return out


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
    kind = torch.promote_types(weight.dtype, torch.float32)
    tables = [torch.empty_like(weight, dtype=kind) for _ in range(4)]
    moved = (torch.empty_like(running_mean), torch.empty_like(running_var), torch.empty_like(tracked))
    if weight.numel():
        with on_device(weight):
            norm_finalise_kernel[(triton.cdiv(weight.numel(), _NORMS),)](
                shares, offsets, weight, bias, running_mean, running_var, tracked, *tables, *moved, eps, momentum,
                shares.shape[1], pixels, weight.shape[1], weight.numel(), BLOCK=_NORMS, **_OPTIONS,
            )  # fmt: skip
    return *tables, *moved


def norm_finalise_backward(
    shares: Tensor, offsets: Tensor, pixels: int, scale: Tensor, mean: Tensor, rstd: Tensor, training: bool
) -> list[Tensor]:
    outputs = [torch.empty_like(scale) for _ in range(4 if training else 2)]
    if scale.numel():
        with on_device(scale):
            norm_finalise_backward_kernel[(triton.cdiv(scale.numel(), _NORMS),)](
                shares, offsets, scale, mean, rstd, *[*outputs, offsets, offsets][:4], shares.shape[1], pixels,
                scale.shape[1], scale.numel(), TRAINING=training, BLOCK=_NORMS, **_OPTIONS,
            )  # fmt: skip
    return outputs


def scale_shift(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    out = channels_last_empty(z, tuple(z.shape))
    if out.numel():
        sizes, constants = _maps(z, offsets)
        with on_device(z):
            scale_shift_kernel[_grid(z.shape[0], sizes, constants)](
                z, offsets, scale.contiguous(), shift.contiguous(), out, *sizes, RELU=relu, **constants, **_OPTIONS
            )
    return out


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
    out = channels_last_empty(z, tuple(z.shape))
    if out.numel():
        sizes, constants = _maps(z, offsets)
        tables = [_or(table, offsets) for table in (p, q, r, scale, shift)]
        with on_device(z):
            norm_backward_kernel[_grid(z.shape[0], sizes, constants)](
                d, z, offsets, *tables, out, *sizes, CENTERED=q is not None, MASKED=scale is not None, **constants,
                **_OPTIONS,
            )  # fmt: skip
    return out


def head_forward(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> Tensor:  # fmt: skip
    batch, top_k = weights.shape
    out = channels_last_empty(z, (batch, *z.shape[1:]))
    if out.numel():
        sizes, constants = _maps(z, offsets)
        skip = _or(skip_scale, offsets), _or(skip_shift, offsets)
        with on_device(z):
            head_forward_kernel[_grid(batch, sizes, constants)](
                z, scale.contiguous(), shift.contiguous(), x, *skip, inverse, offsets, weights.contiguous(), out, top_k,
                *sizes, NORMED=skip_scale is not None, **constants,
                **_head_options(z.dtype == torch.float64),
            )  # fmt: skip
    return out


def head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d_rows = channels_last_empty(z, tuple(z.shape))
    return d_rows, _head_backward(d_out, z, scale, shift, x, skip_scale, skip_shift, order, offsets, weights, d_rows)


def head_norm_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_z, d_rows = (channels_last_empty(z, tuple(z.shape)) for _ in range(2))
    head = (z, scale, shift, x, skip_scale, skip_shift, order, offsets, weights)
    return d_z, d_rows, _head_backward(d_out, *head, d_rows, d_z)


def _head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, offsets: Tensor, weights: Tensor, d_rows: Tensor,
    d_z: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fills ``d_rows``, and ``d_z`` if there is one; returns the gradient of the weights."""
    d_weights = weights.new_empty(weights.shape)
    if d_weights.numel():
        sizes, constants = _maps(z, offsets)
        skip = _or(skip_scale, offsets), _or(skip_shift, offsets)
        with on_device(z):
            head_backward_kernel[(z.shape[0],)](
                d_out, z, scale.contiguous(), shift.contiguous(), x, *skip, order, offsets, weights.contiguous(),
                offsets if d_z is None else d_z, d_rows, d_weights, weights.shape[1], *sizes,
                NORMED=skip_scale is not None, SCALED=d_z is not None, **constants,
                **_head_options(z.dtype == torch.float64),
            )  # fmt: skip
    return d_weights


def sum_rows(rows: Tensor, other: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    out = channels_last_empty(rows, (inverse.numel() // top_k, *rows.shape[1:]))
    if out.numel():
        size = out.shape[1:].numel()
        with on_device(rows):
            sum_rows_kernel[out.shape[0], triton.cdiv(size, _ELEMENTS)](
                rows, other, inverse, out, size, top_k,
                KIND=tl.float64 if rows.dtype == torch.float64 else tl.float32, BLOCK=_ELEMENTS, **_OPTIONS,
            )  # fmt: skip
    return out


_INDICES = ("offsets_ptr", "order_ptr", "inverse_ptr", "tracked_ptr", "next_tracked_ptr")
_SUMS = ("sums_ptr", "products_ptr", "shares_ptr")
_MAPS = (
    "value_ptr", "other_ptr", "z_ptr", "x_ptr", "d_ptr", "d_out_ptr", "d_z_ptr", "d_rows_ptr", "rows_ptr", "out_ptr",
)  # fmt: skip


def _build(kernel: Any, data: str, table: str, constants: dict[str, Any], unused: tuple[str, ...] = ()) -> Build:
    """``unused``: the arguments in whose place the offsets are handed over."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in _INDICES or name in unused:
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = "*fp64" if name in _SUMS else f"*{data if name in _MAPS else table}"
        else:
            signature[name] = "fp64" if name in ("eps", "momentum") else "i32"
    divisible = tuple(name for name in signature if name.endswith("_ptr") or name == "channels")
    options = _head_options(data == "fp64") if kernel in (head_forward_kernel, head_backward_kernel) else _OPTIONS
    return Build(kernel, signature, constants, options, divisible)


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    for table in ("fp32", "fp64"):
        yield _build(norm_finalise_kernel, "", table, {"BLOCK": _NORMS})
        yield _build(norm_finalise_backward_kernel, "", table, {"TRAINING": True, "BLOCK": _NORMS})
        constants = {"TRAINING": False, "BLOCK": _NORMS}
        yield _build(norm_finalise_backward_kernel, "", table, constants, ("q_ptr", "r_ptr"))
    types = [("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")]
    for data, table in types:
        yield _build(sum_rows_kernel, data, table, {"KIND": tl.dtype(table), "BLOCK": _ELEMENTS})
    for (data, table), channels in product(types, (64, 128)):
        tile = {"EXPERTS": 16, **_shape(channels)}
        for flag in (False, True):
            unused = () if flag else ("scale_ptr", "shift_ptr")
            blocks = {"BLOCK_P": _SUM_PIXELS, "BLOCK_C": channels}
            yield _build(sums_kernel, data, table, {"MASKED": flag, **blocks}, unused)
            yield _build(scale_shift_kernel, data, table, {"RELU": flag, **tile})
            for centered in (False, True):
                without = unused + (() if centered else ("q_ptr", "r_ptr"))
                constants = {"CENTERED": centered, "MASKED": flag, **tile}
                yield _build(norm_backward_kernel, data, table, constants, without)
            unused = () if flag else ("skip_scale_ptr", "skip_shift_ptr")
            yield _build(head_forward_kernel, data, table, {"NORMED": flag, **tile}, unused)
            for scaled in (False, True):
                without = unused + (() if scaled else ("d_z_ptr",))
                yield _build(head_backward_kernel, data, table, {"NORMED": flag, "SCALED": scaled, **tile}, without)
