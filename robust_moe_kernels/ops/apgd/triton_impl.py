"""Auto-PGD's steps in Triton.

Bound by memory: the ℓ∞ step reads x, previous, grad, x0 and writes out once, 20 bytes an fp32 element, where eager
PyTorch runs some twenty kernels; tracking moves the bytes of the samples it keeps and of no others. Compiled without
multiply-add contraction (``enable_fp_fusion=False``), so the ℓ∞ step equals the reference bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.triton_support import Build, clamp, flag_nonfinite, flag_pointer, on_device, scalar

__all__ = ["apgd_step", "apgd_track", "builds", "why_not"]

why_not = triton_support.why_not

_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_BLOCK = 1024  # elements a program: 4 a thread, one 16-byte access of fp32
_TINY = tl.constexpr(1e-12)


@triton.jit
def _step_linf_kernel(
    x_ptr,  # [B, size] float32 or float64
    previous_ptr,  # [B, size] as x
    grad_ptr,  # [B, size] as x
    x0_ptr,  # [B, size] as x
    eta_ptr,  # [B] as x
    out_ptr,  # [B, size] as x
    flag_ptr,  # [] uint8; unused unless FLAG
    size,
    eps: tl.float64,
    share: tl.float64,
    rest: tl.float64,
    FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK consecutive elements of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    index = sample * size + place
    x = tl.load(x_ptr + index, mask=mask, other=0.0)
    previous = tl.load(previous_ptr + index, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
    x0 = tl.load(x0_ptr + index, mask=mask, other=0.0)
    if FLAG:
        flag_nonfinite(flag_ptr, grad, index)
    eta = tl.load(eta_ptr + sample)
    low = x0 - scalar(eps, x.dtype)
    high = x0 + scalar(eps, x.dtype)
    step = tl.where(grad > 0, eta, tl.where(grad < 0, -eta, 0.0)).to(x.dtype)
    z = clamp(clamp(x + step, low, high), 0.0, 1.0)
    moved = (x + (z - x) * scalar(share, x.dtype)) + (x - previous) * scalar(rest, x.dtype)
    tl.store(out_ptr + index, clamp(clamp(moved, low, high), 0.0, 1.0), mask=mask)


@triton.jit
def _divide(a, b):
    """a / b, correctly rounded: Triton's own / on float32 is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _l2_offset(x, grad, x0, eta, divisor):
    """z - x0 before the projection of z."""
    return (x + eta * _divide(grad, divisor)) - x0


@triton.jit
def _l2_moved(x, previous, x0, offset, divisor, reach, share, rest):
    """The next iterate - x0 before its projection."""
    z = clamp(x0 + _divide(offset, divisor) * reach, 0.0, 1.0)
    return ((x + (z - x) * share) + (x - previous) * rest) - x0


@triton.jit
def _step_l2_kernel(
    x_ptr,  # [B, size] float32 or float64
    previous_ptr,  # [B, size] as x
    grad_ptr,  # [B, size] as x
    x0_ptr,  # [B, size] as x
    eta_ptr,  # [B] as x
    out_ptr,  # [B, size] as x
    flag_ptr,  # [] uint8; unused unless FLAG
    size,
    eps: tl.float64,
    share: tl.float64,
    rest: tl.float64,
    FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one sample, in four passes; all but the first find it in the cache. Norms are summed in fp64."""
    sample = tl.program_id(0).to(tl.int64)
    row = sample * size
    lane = tl.arange(0, BLOCK)
    kind: tl.constexpr = x_ptr.dtype.element_ty
    radius = scalar(eps, kind)
    tiny = scalar(_TINY, kind)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        grad = tl.load(grad_ptr + row + start + lane, mask=start + lane < size, other=0.0).to(tl.float64)
        square += grad * grad
        if FLAG:
            flag_nonfinite(flag_ptr, grad, row + start + lane)
    steepness = tl.sqrt(tl.sum(square, 0)).to(kind) + tiny
    eta = tl.load(eta_ptr + sample)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        index = row + start + lane
        mask = start + lane < size
        x = tl.load(x_ptr + index, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
        x0 = tl.load(x0_ptr + index, mask=mask, other=0.0)
        offset = _l2_offset(x, grad, x0, eta, steepness).to(tl.float64)
        square += offset * offset
    inner = tl.sqrt(tl.sum(square, 0)).to(kind)
    reach = clamp(inner, 0.0, radius)
    inner += tiny
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        index = row + start + lane
        mask = start + lane < size
        x = tl.load(x_ptr + index, mask=mask, other=0.0)
        previous = tl.load(previous_ptr + index, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
        x0 = tl.load(x0_ptr + index, mask=mask, other=0.0)
        offset = _l2_offset(x, grad, x0, eta, steepness)
        moved = _l2_moved(x, previous, x0, offset, inner, reach, scalar(share, kind), scalar(rest, kind)).to(tl.float64)
        square += moved * moved
    outer = tl.sqrt(tl.sum(square, 0)).to(kind)
    length = clamp(outer, 0.0, radius)
    outer += tiny
    for start in range(0, size, BLOCK):
        index = row + start + lane
        mask = start + lane < size
        x = tl.load(x_ptr + index, mask=mask, other=0.0)
        previous = tl.load(previous_ptr + index, mask=mask, other=0.0)
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
        x0 = tl.load(x0_ptr + index, mask=mask, other=0.0)
        offset = _l2_offset(x, grad, x0, eta, steepness)
        moved = _l2_moved(x, previous, x0, offset, inner, reach, scalar(share, kind), scalar(rest, kind))
        tl.store(out_ptr + index, clamp(x0 + _divide(moved, outer) * length, 0.0, 1.0), mask=mask)


@triton.jit
def _track_kernel(
    x_ptr,  # [B, size] float32 or float64
    grad_ptr,  # [B, size] as x
    improved_ptr,  # [B] uint8
    fooled_ptr,  # [B] uint8
    x_best_ptr,  # [B, size] as x
    grad_best_ptr,  # [B, size] as x
    x_fooled_ptr,  # [B, size] as x
    size,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK consecutive elements of one sample. A masked access moves no bytes."""
    sample = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = sample * size + place
    # as far as the sample is taken: all of it, or nothing
    improved = place < size * (tl.load(improved_ptr + sample) != 0).to(tl.int64)
    fooled = place < size * (tl.load(fooled_ptr + sample) != 0).to(tl.int64)
    x = tl.load(x_ptr + index, mask=improved | fooled, other=0.0)
    grad = tl.load(grad_ptr + index, mask=improved, other=0.0)
    tl.store(x_best_ptr + index, x, mask=improved)
    tl.store(grad_best_ptr + index, grad, mask=improved)
    tl.store(x_fooled_ptr + index, x, mask=fooled)


def apgd_step(
    x: Tensor, previous: Tensor, grad: Tensor, x0: Tensor, eta: Tensor, eps: float, share: float, norm: str,
    nonfinite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    samples, size = x.shape[0], x.numel() // x.shape[0]
    arguments = (x, previous, grad, x0, eta, out, flag_pointer(nonfinite, x), size, eps, share, 1.0 - share)
    constants = {"FLAG": nonfinite is not None, "BLOCK": _BLOCK}
    with on_device(x):
        if norm == "Linf":
            grid = (samples, triton.cdiv(size, _BLOCK))
            _step_linf_kernel[grid](*arguments, **constants, **_OPTIONS)
        else:
            _step_l2_kernel[(samples,)](*arguments, **constants, **_OPTIONS)
    return out


def apgd_track(
    x: Tensor, grad: Tensor, improved: Tensor, fooled: Tensor, x_best: Tensor, grad_best: Tensor, x_fooled: Tensor
) -> None:
    if x.numel() == 0:
        return
    samples, size = x.shape[0], x.numel() // x.shape[0]
    rows = improved.view(torch.uint8), fooled.view(torch.uint8)
    grid = (samples, triton.cdiv(size, _BLOCK))
    with on_device(x):
        _track_kernel[grid](x, grad, *rows, x_best, grad_best, x_fooled, size, BLOCK=_BLOCK, **_OPTIONS)


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    for image in ("fp32", "fp64"):
        names = ("x_ptr", "previous_ptr", "grad_ptr", "x0_ptr", "eta_ptr", "out_ptr")
        for flag in (False, True):
            step = dict.fromkeys(names, f"*{image}") | {"flag_ptr": "*u8" if flag else f"*{image}", "size": "i32"}
            step |= dict.fromkeys(("eps", "share", "rest"), "fp64") | dict.fromkeys(("FLAG", "BLOCK"), "constexpr")
            yield Build(_step_linf_kernel, step, {"FLAG": flag, "BLOCK": _BLOCK}, _OPTIONS)
            yield Build(_step_l2_kernel, step, {"FLAG": flag, "BLOCK": _BLOCK}, _OPTIONS)
        track = dict.fromkeys(_track_kernel.arg_names, f"*{image}")
        track |= {"improved_ptr": "*u8", "fooled_ptr": "*u8", "size": "i32", "BLOCK": "constexpr"}
        yield Build(_track_kernel, track, {"BLOCK": _BLOCK}, _OPTIONS)
