"""Attack steps in Triton.

Bound by memory: the ℓ∞ step reads x, grad, x0 and writes out once, 16 bytes an fp32 element, against 68 in seven eager
kernels. Compiled without multiply-add contraction (``enable_fp_fusion=False``), so the ℓ∞ forms equal the reference
bit for bit.
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
from robust_moe_kernels.ops.attack_step import triton_loss
from robust_moe_kernels.ops.attack_step.triton_loss import cross_entropy, cross_entropy_backward
from robust_moe_kernels.triton_support import Build, clamp, flag_nonfinite, flag_pointer, on_device, scalar

__all__ = ["builds", "cross_entropy", "cross_entropy_backward", "pgd_step", "random_start", "why_not"]

why_not = triton_support.why_not

_ELEMENTWISE = {"num_warps": 4, "enable_fp_fusion": False}
_NORMALS = {"num_warps": 8, "enable_fp_fusion": False}  # with 4 the ℓ2 start spills on sm_100
_BLOCK = 1024  # elements a program; 8 a thread: one 16-byte access for bf16, two for fp32
_TINY = tl.constexpr(1e-12)
_TWO_POW_MINUS_24 = tl.constexpr(2.0**-24)


@triton.jit
def _pgd_linf_kernel(
    x_ptr,  # [n] float32 or float64
    grad_ptr,  # [n] any float
    x0_ptr,  # [n] as x
    out_ptr,  # [n] as x
    flag_ptr,  # [] uint8; unused unless FLAG
    n,
    eps: tl.float64,
    alpha: tl.float64,
    FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK consecutive elements."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    x = tl.load(x_ptr + index, mask=mask, other=0.0)
    x0 = tl.load(x0_ptr + index, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + index, mask=mask, other=0.0)
    if grad.dtype.primitive_bitwidth < 32:
        grad = grad.to(tl.float32)  # Triton 3.9's interpreter compares bfloat16 as bit patterns
    if FLAG:
        flag_nonfinite(flag_ptr, grad, index)
    radius = scalar(eps, x.dtype)
    length = scalar(alpha, x.dtype)
    step = tl.where(grad > 0, length, tl.where(grad < 0, -length, 0.0)).to(x.dtype)
    delta = clamp(x + step - x0, -radius, radius)
    tl.store(out_ptr + index, clamp(x0 + delta, 0.0, 1.0), mask=mask)


@triton.jit
def _pgd_l2_kernel(
    x_ptr,  # [B, size] float32 or float64
    grad_ptr,  # [B, size] any float
    x0_ptr,  # [B, size] as x
    out_ptr,  # [B, size] as x
    flag_ptr,  # [] uint8; unused unless FLAG
    size,
    eps: tl.float64,
    alpha: tl.float64,
    FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one sample, in three passes; the second and third find it in the cache. Norms are summed in fp64."""
    row = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        mask = start + lane < size
        grad = tl.load(grad_ptr + row + start + lane, mask=mask, other=0.0).to(tl.float64)
        square += grad * grad
        if FLAG:
            flag_nonfinite(flag_ptr, grad, row + start + lane)
    norm = clamp(tl.sqrt(tl.sum(square, 0)), _TINY, float("inf"))
    kind: tl.constexpr = x_ptr.dtype.element_ty
    scale = (1.0 / norm).to(kind)
    length = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        index = row + start + lane
        mask = start + lane < size
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(kind)
        x = tl.load(x_ptr + index, mask=mask, other=0.0)
        x0 = tl.load(x0_ptr + index, mask=mask, other=0.0)
        delta = (x + scalar(alpha, kind) * (grad * scale) - x0).to(tl.float64)
        length += delta * delta
    norm = clamp(tl.sqrt(tl.sum(length, 0)), _TINY, float("inf"))
    shrink = clamp(scalar(eps, tl.float64) / norm, 0.0, 1.0).to(kind)
    for start in range(0, size, BLOCK):
        index = row + start + lane
        mask = start + lane < size
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(kind)
        x = tl.load(x_ptr + index, mask=mask, other=0.0)
        x0 = tl.load(x0_ptr + index, mask=mask, other=0.0)
        delta = x + scalar(alpha, kind) * (grad * scale) - x0
        tl.store(out_ptr + index, clamp(x0 + delta * shrink, 0.0, 1.0), mask=mask)


@triton.jit
def _words(sample_index_ptr, sample, block, seed, stream):
    """Four random words a counter block (tl.philox is Philox4x32 with 10 rounds)."""
    index = tl.load(sample_index_ptr + sample)
    zero = (block * 0).to(tl.uint32)
    low = zero + (index & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), low, high, zero + stream.to(tl.uint32))


@triton.jit
def _uniform(word, kind: tl.constexpr):
    """[0, 1) from the upper 24 bits: exact."""
    return (word.to(tl.uint32, bitcast=True) >> 8).to(kind) * _TWO_POW_MINUS_24


@triton.jit
def _pick(lane, a, b, c, d):
    """The word that belongs to a pixel: its position modulo 4."""
    return tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))


@triton.jit(do_not_specialize=["seed", "stream"])
def _start_linf_kernel(
    x0_ptr,  # [B, size] float32 or float64
    sample_index_ptr,  # [B] int64
    out_ptr,  # [B, size] as x0
    size,
    eps: tl.float64,
    seed: tl.int64,
    stream: tl.int64,  # below 2^32
    BLOCK: tl.constexpr,
):
    """One program: BLOCK consecutive pixels of one sample. Each draws its block of four words and keeps one."""
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < size
    kind: tl.constexpr = x0_ptr.dtype.element_ty
    a, b, c, d = _words(sample_index_ptr, sample, pixel // 4, seed, stream)
    u = _uniform(_pick(pixel % 4, a, b, c, d), kind)
    x0 = tl.load(x0_ptr + sample * size + pixel, mask=mask, other=0.0)
    noise = (2.0 * u - 1.0).to(kind) * scalar(eps, kind)
    tl.store(out_ptr + sample * size + pixel, clamp(x0 + noise, 0.0, 1.0), mask=mask)


@triton.jit
def _normal(sample_index_ptr, sample, pixel, seed, stream, kind: tl.constexpr):
    """One standard normal a pixel (Box and Muller on words 0, 1 or 2, 3 of its block)."""
    a, b, c, d = _words(sample_index_ptr, sample, pixel // 4, seed, stream)
    lane = pixel % 4
    radius = tl.sqrt(-2.0 * tl.log(_uniform(tl.where(lane < 2, a, c), kind) + _TWO_POW_MINUS_24))
    angle = _uniform(tl.where(lane < 2, b, d), kind) * 6.283185307179586
    return (radius * tl.where(lane % 2 == 0, tl.cos(angle), tl.sin(angle))).to(kind)


@triton.jit(do_not_specialize=["seed", "stream"])
def _start_l2_kernel(
    x0_ptr,  # [B, size] float32 or float64
    sample_index_ptr,  # [B] int64
    length_ptr,  # [B] float64, distance of the start from x0
    out_ptr,  # [B, size] as x0
    size,
    seed: tl.int64,
    stream: tl.int64,
    BLOCK: tl.constexpr,
):
    """One program: one sample. The normals are drawn twice, for their norm and for the start, and never stored."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    kind: tl.constexpr = x0_ptr.dtype.element_ty
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        normal = _normal(sample_index_ptr, sample, start + lane, seed, stream, kind).to(tl.float64)
        square += tl.where(start + lane < size, normal * normal, 0.0)
    norm = clamp(tl.sqrt(tl.sum(square, 0)), _TINY, float("inf"))
    scale = (tl.load(length_ptr + sample) / norm).to(kind)
    for start in range(0, size, BLOCK):
        pixel = start + lane
        mask = pixel < size
        normal = _normal(sample_index_ptr, sample, pixel, seed, stream, kind)
        x0 = tl.load(x0_ptr + sample * size + pixel, mask=mask, other=0.0)
        tl.store(out_ptr + sample * size + pixel, clamp(x0 + normal * scale, 0.0, 1.0), mask=mask)


@triton.jit(do_not_specialize=["seed", "stream"])
def _length_kernel(
    sample_index_ptr,  # [B] int64
    length_ptr,  # [B] float64
    exponent: tl.float64,  # 1 / size
    eps: tl.float64,
    seed: tl.int64,
    stream: tl.int64,
):
    """One program: the ℓ2 radius of one sample, eps * U^(1/size)."""
    sample = tl.program_id(0).to(tl.int64)
    block = tl.zeros((1,), tl.int64) + 0xFFFFFFFF
    a, _b, _c, _d = _words(sample_index_ptr, sample, block, seed, stream)
    u = _uniform(a, tl.float64) + _TWO_POW_MINUS_24
    tl.store(length_ptr + sample + tl.arange(0, 1), eps * tl.exp(tl.log(u) * exponent))


def _linf_options(double: bool) -> dict[str, Any]:
    return (
        {**_ELEMENTWISE, "num_warps": 8} if double else _ELEMENTWISE
    )  # 4 spill 8 bytes in float64 (sm_80, Triton 3.9)


def pgd_step(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, alpha: float, norm: str, nonfinite: Tensor | None = None
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    tensors = (x, grad, x0, out, flag_pointer(nonfinite, x))
    constants = {"FLAG": nonfinite is not None, "BLOCK": _BLOCK}
    with on_device(x):
        if norm == "Linf":
            grid = (triton.cdiv(x.numel(), _BLOCK),)
            options = _linf_options(x.dtype == torch.float64)
            _pgd_linf_kernel[grid](*tensors, x.numel(), eps, alpha, **constants, **options)
        else:
            size = x.numel() // x.shape[0]
            _pgd_l2_kernel[(x.shape[0],)](*tensors, size, eps, alpha, **constants, **_ELEMENTWISE)
    return out


def random_start(x0: Tensor, sample_index: Tensor, eps: float, seed: int, stream: int, norm: str) -> Tensor:
    out = torch.empty_like(x0)
    if x0.numel() == 0:
        return out
    samples, size = x0.shape[0], x0.numel() // x0.shape[0]
    with on_device(x0):
        if norm == "Linf":
            grid = (samples, triton.cdiv(size, _BLOCK))
            _start_linf_kernel[grid](x0, sample_index, out, size, eps, seed, stream, BLOCK=_BLOCK, **_ELEMENTWISE)
        else:
            length = torch.empty(samples, dtype=torch.float64, device=x0.device)
            _length_kernel[(samples,)](sample_index, length, 1.0 / size, eps, seed, stream, **_ELEMENTWISE)
            _start_l2_kernel[(samples,)](x0, sample_index, length, out, size, seed, stream, BLOCK=_BLOCK, **_NORMALS)
    return out


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    yield from triton_loss.builds()
    pairs = (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp64", "fp64"))
    for (image, grad), flag in product(pairs, (False, True)):
        signature = {"x_ptr": f"*{image}", "grad_ptr": f"*{grad}", "x0_ptr": f"*{image}", "out_ptr": f"*{image}"}
        signature["flag_ptr"] = "*u8" if flag else f"*{image}"
        scalars = {"eps": "fp64", "alpha": "fp64", "FLAG": "constexpr", "BLOCK": "constexpr"}
        constants = {"FLAG": flag, "BLOCK": _BLOCK}
        yield Build(_pgd_linf_kernel, {**signature, "n": "i64", **scalars}, constants, _linf_options(image == "fp64"))
        yield Build(_pgd_l2_kernel, {**signature, "size": "i32", **scalars}, constants, _ELEMENTWISE)
    for image in ("fp32", "fp64"):
        pointers = {"x0_ptr": f"*{image}", "sample_index_ptr": "*i64"}
        counters = {"seed": "i64", "stream": "i64", "BLOCK": "constexpr"}
        linf = {**pointers, "out_ptr": f"*{image}", "size": "i32", "eps": "fp64", **counters}
        l2 = {**pointers, "length_ptr": "*fp64", "out_ptr": f"*{image}", "size": "i32", **counters}
        yield Build(_start_linf_kernel, linf, {"BLOCK": _BLOCK}, _ELEMENTWISE)
        yield Build(_start_l2_kernel, l2, {"BLOCK": _BLOCK}, _NORMALS)
    radius = {"sample_index_ptr": "*i64", "length_ptr": "*fp64", "exponent": "fp64", "eps": "fp64"}
    yield Build(_length_kernel, {**radius, "seed": "i64", "stream": "i64"}, {}, _ELEMENTWISE)
