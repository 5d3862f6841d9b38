"""Dispatch and combine in Triton: bound by memory, each element read and written once.

A row is one sample's map, whole and dense in either memory format, so both formats are the same copy. Compiled without
multiply-add contraction: dispatch and combine equal the reference bit for bit in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.layout import rows_like
from robust_moe_kernels.triton_support import Build, on_device

__all__ = ["builds", "combine", "dispatch", "row_dot", "why_not"]

why_not = triton_support.why_not

_BLOCK = 1024  # elements a program; a 512-channel 4x4 map is 8 programs
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_COMBINE = {**_OPTIONS, "maxnreg": 64}  # left to itself, the assembler spills two registers (float64, sm_100)


@triton.jit
def _dispatch_kernel(
    samples_ptr,  # [B, size]
    order_ptr,  # [R] int64
    weights_ptr,  # [B, k] float32 or float64; unused unless HAS_WEIGHTS
    out_ptr,  # [R, size]
    size,
    top_k,
    count,  # pairs that the samples have
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    pair = tl.load(order_ptr + row)
    there = (pair >= 0) & (pair < count)  # the host has not looked: what is not there is NaN
    value = tl.load(samples_ptr + pair // top_k * size + column, mask=mask & there, other=float("nan"))
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + pair, mask=there, other=0.0)
        value = (weight * value.to(weight.dtype)).to(value.dtype)
    tl.store(out_ptr + row * size + column, value, mask=mask)


@triton.jit
def _combine_kernel(
    rows_ptr,  # [R, size]
    inverse_ptr,  # [R] int64
    weights_ptr,  # [B, k] in KIND; unused unless HAS_WEIGHTS
    out_ptr,  # [B, size]
    size,
    top_k,
    count,  # rows
    HAS_WEIGHTS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample, summed over its k rows in slot order."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    total = tl.zeros((BLOCK,), KIND)
    for j in range(top_k):
        row = tl.load(inverse_ptr + sample * top_k + j)
        there = (row >= 0) & (row < count)
        value = tl.load(rows_ptr + row * size + column, mask=mask & there, other=float("nan")).to(KIND)
        if HAS_WEIGHTS:
            value = tl.load(weights_ptr + sample * top_k + j) * value
        total = tl.where(j == 0, value, total + value)  # not 0 + value: -0.0 stays -0.0, as in the reference
    tl.store(out_ptr + sample * size + column, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_dot_kernel(
    samples_ptr,  # [B, size]
    rows_ptr,  # [R, size]
    inverse_ptr,  # [R] int64
    out_ptr,  # [B, k] float32 or float64
    size,
    top_k,
    count,  # rows
    BLOCK: tl.constexpr,
):
    """One program: the inner product of one pair, summed in fp64."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(inverse_ptr + pair)
    there = (row >= 0) & (row < count)
    row = tl.where(there, row, 0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        mask = start + lane < size
        x = tl.load(samples_ptr + pair // top_k * size + start + lane, mask=mask, other=0.0).to(tl.float64)
        y = tl.load(rows_ptr + row * size + start + lane, mask=mask, other=0.0).to(tl.float64)
        total += x * y
    total = tl.where(there, tl.sum(total, 0), float("nan"))
    tl.store(out_ptr + pair, total.to(out_ptr.dtype.element_ty))


def _grid(rows: int, size: int) -> tuple[int, int]:
    return rows, triton.cdiv(size, _BLOCK)


def dispatch(samples: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    out = rows_like(samples, order.numel())
    if out.numel():
        size = out.shape[1:].numel()
        with on_device(out):
            _dispatch_kernel[_grid(out.shape[0], size)](
                samples, order, order if weights is None else weights, out, size, top_k, len(samples) * top_k,
                HAS_WEIGHTS=weights is not None, BLOCK=_BLOCK, **_OPTIONS,
            )  # fmt: skip
    return out


def combine(rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    out = rows_like(rows, order.numel() // top_k)
    if out.numel():
        size = out.shape[1:].numel()
        with on_device(out):
            _combine_kernel[_grid(out.shape[0], size)](
                rows, inverse, inverse if weights is None else weights, out, size, top_k, len(rows),
                HAS_WEIGHTS=weights is not None, KIND=tl.float64 if rows.dtype == torch.float64 else tl.float32,
                BLOCK=_BLOCK, **_COMBINE,
            )  # fmt: skip
    return out


def row_dot(samples: Tensor, rows: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    kind = torch.float64 if samples.dtype == torch.float64 else torch.float32
    out = samples.new_empty(samples.shape[0], top_k, dtype=kind)
    if out.numel():
        with on_device(out):
            _row_dot_kernel[(out.numel(),)](
                samples, rows, inverse, out, samples.shape[1:].numel(), top_k, len(rows), BLOCK=_BLOCK, **_OPTIONS
            )
    return out


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    for data, kind in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        sizes = {"size": "i32", "top_k": "i32", "count": "i32"}
        for weighted in (False, True):
            weights = f"*{kind}" if weighted else "*i64"
            flags = {"HAS_WEIGHTS": weighted, "BLOCK": _BLOCK}
            signature = {"samples_ptr": f"*{data}", "order_ptr": "*i64", "weights_ptr": weights, "out_ptr": f"*{data}"}
            signature |= {**sizes, **dict.fromkeys(flags, "constexpr")}
            yield Build(_dispatch_kernel, signature, flags, _OPTIONS)
            flags = {"HAS_WEIGHTS": weighted, "KIND": tl.float64 if kind == "fp64" else tl.float32, "BLOCK": _BLOCK}
            signature = {"rows_ptr": f"*{data}", "inverse_ptr": "*i64", "weights_ptr": weights, "out_ptr": f"*{data}"}
            signature |= {**sizes, **dict.fromkeys(flags, "constexpr")}
            yield Build(_combine_kernel, signature, flags, _COMBINE)
        signature = {"samples_ptr": f"*{data}", "rows_ptr": f"*{data}", "inverse_ptr": "*i64", "out_ptr": f"*{kind}"}
        yield Build(_row_dot_kernel, {**signature, **sizes, "BLOCK": "constexpr"}, {"BLOCK": _BLOCK}, _OPTIONS)
