"""Global average pool and linear layer in Triton: a program is one sample, so a launch each way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_moe_kernels.layout import dense_format
from robust_moe_kernels.triton_support import Build, on_device, triton_type

__all__ = ["pool_builds", "pool_linear", "pool_linear_backward"]

_PIXELS, _CHANNELS = 16, 64  # a program's tile of a map: 8 numbers a thread
_EXPERTS = 16  # most logits of a program
# Left to itself, the assembler spills 4 bytes in float64 to fit more programs on a multiprocessor (Triton 3.6).
_OPTIONS = {"num_warps": 4, "maxnreg": 128}


@triton.jit(do_not_specialize=("pixels", "experts"))
def pool_linear_kernel(
    x_ptr,  # [B, channels, pixels] by the two strides, any float
    weight_ptr,  # [E, channels]
    bias_ptr,  # [E]; unused unless HAS_BIAS
    logits_ptr,  # [B, E] as weight
    means_ptr,  # [B, channels] as weight
    pixels, channels, experts, channel_stride, pixel_stride,
    HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: EXPERTS logits of one sample; the first of a sample's writes its means."""
    kind: tl.constexpr = logits_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1).to(tl.int64) * EXPERTS + tl.arange(0, EXPERTS)
    start = x_ptr + sample * channels * pixels
    logits = tl.zeros((EXPERTS,), kind)
    for first_c in range(0, channels, BLOCK_C):
        c = first_c + tl.arange(0, BLOCK_C).to(tl.int64)
        sums = tl.zeros((BLOCK_P, BLOCK_C), kind)
        for first_p in range(0, pixels, BLOCK_P):
            p = first_p + tl.arange(0, BLOCK_P).to(tl.int64)
            mask = (p < pixels)[:, None] & (c < channels)[None, :]
            place = (p * pixel_stride)[:, None] + (c * channel_stride)[None, :]
            sums += tl.load(start + place, mask=mask, other=0.0).to(kind)
        means = tl.sum(sums, 0) / pixels
        tl.store(means_ptr + sample * channels + c, means, mask=(c < channels) & (tl.program_id(1) == 0))
        mask = (e < experts)[:, None] & (c < channels)[None, :]
        weight = tl.load(weight_ptr + (e * channels)[:, None] + c[None, :], mask=mask, other=0.0)
        logits += tl.sum(weight * means[None, :], 1)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + e, mask=e < experts, other=0.0)
    tl.store(logits_ptr + sample * experts + e, logits, mask=e < experts)


@triton.jit(do_not_specialize=("pixels", "experts"))
def pool_linear_backward_kernel(
    d_logits_ptr,  # [B, E]
    weight_ptr,  # [E, channels]
    d_x_ptr,  # [B, channels, pixels] by the two strides
    pixels, channels, experts, channel_stride, pixel_stride,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of one sample, every pixel with the same gradient."""
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), weight_ptr.dtype.element_ty)
    weight_at = weight_ptr + c
    for e in range(experts):
        total += tl.load(d_logits_ptr + sample * experts + e) * tl.load(weight_at, mask=c < channels, other=0.0)
        weight_at += channels
    value = (total / pixels).to(d_x_ptr.dtype.element_ty)
    start = d_x_ptr + sample * channels * pixels
    for first_p in range(0, pixels, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P).to(tl.int64)
        place = (p * pixel_stride)[:, None] + (c * channel_stride)[None, :]
        mask = (p < pixels)[:, None] & (c < channels)[None, :]
        tl.store(start + place, tl.broadcast_to(value[None, :], (BLOCK_P, BLOCK_C)), mask=mask)


def _sizes(maps: Tensor, experts: int) -> tuple[int, int, int, int, int]:
    """(pixels, channels, experts, distance between channels, between pixels) of dense maps."""
    channels, pixels = maps.shape[1], maps.shape[2:].numel()
    strides = (1, channels) if dense_format(maps) == torch.channels_last else (pixels, 1)
    return pixels, channels, experts, *strides


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(logits [B, E], means over height and width [B, C]) of x [B, C, H, W], both in the dtype of the weight [E, C]."""
    batch, experts = x.shape[0], weight.shape[0]
    logits, means = weight.new_empty(batch, experts), weight.new_empty(batch, x.shape[1])
    if batch:
        block = min(_EXPERTS, triton.next_power_of_2(experts))
        with on_device(x):
            pool_linear_kernel[batch, triton.cdiv(experts, block)](
                x, weight, weight if bias is None else bias, logits, means, *_sizes(x, experts),
                HAS_BIAS=bias is not None, EXPERTS=block, BLOCK_P=_PIXELS, BLOCK_C=_CHANNELS, **_OPTIONS,
            )  # fmt: skip
    return logits, means


def pool_linear_backward(d_logits: Tensor, weight: Tensor, d_x: Tensor) -> None:
    """Fills ``d_x`` [B, C, H, W]."""
    if d_x.numel():
        with on_device(d_x):
            pool_linear_backward_kernel[d_x.shape[0], triton.cdiv(d_x.shape[1], _CHANNELS)](
                d_logits, weight, d_x, *_sizes(d_x, weight.shape[0]), BLOCK_P=_PIXELS, BLOCK_C=_CHANNELS, **_OPTIONS
            )


def pool_builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test: both memory formats, 1 to 16 experts a program."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x, kind = triton_type(dtype), "fp64" if dtype == torch.float64 else "fp32"
        for unit in ("channel_stride", "pixel_stride"):
            sizes = dict.fromkeys(("pixels", "channels", "experts", "channel_stride", "pixel_stride"), "i32")
            sizes[unit] = "constexpr"
            divisible = ("x_ptr", "weight_ptr", "d_x_ptr", "channels", "pixel_stride", "channel_stride")
            tile = {unit: 1, "BLOCK_P": _PIXELS, "BLOCK_C": _CHANNELS}
            for experts in (4, 16):
                constants = {"HAS_BIAS": True, "EXPERTS": experts, **tile}
                pointers = dict.fromkeys(("weight_ptr", "bias_ptr", "logits_ptr", "means_ptr"), f"*{kind}")
                signature = {"x_ptr": f"*{x}", **pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
                known = tuple(name for name in divisible if name in signature and name != unit)
                yield Build(pool_linear_kernel, signature, constants, _OPTIONS, known)
            pointers = {"d_logits_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "d_x_ptr": f"*{x}"}
            signature = {**pointers, **sizes, **dict.fromkeys(tile, "constexpr")}
            known = tuple(name for name in divisible if name in signature and name != unit)
            yield Build(pool_linear_backward_kernel, signature, tile, _OPTIONS, known)
