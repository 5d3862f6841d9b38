"""The Triton kernels between the convolutions of routed residual blocks; ``triton_impl`` launches them, and the batch
norms' sums of ``triton_norms``.

Only the number of channels is specialised: it decides the width of loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "head_backward_kernel", "head_forward_kernel", "norm_backward_kernel", "scale_shift_kernel",
    "sum_rows_kernel",
]  # fmt: skip


@triton.jit
def _expert_of(offsets_ptr, row, experts, EXPERTS: tl.constexpr):
    """The expert that a sorted row belongs to."""
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
    expert = tl.sum(((ends <= row) & (e < experts)).to(tl.int64), 0)
    return tl.minimum(expert, experts - 1)  # a row behind all experts: a pair whose expert was out of range


@triton.jit
def _within(index, count):
    """(index, whether it is one of ``count``), an index out of range being 0 instead: the host has not looked, and what
    it would have reached is to be NaN."""
    there = (index >= 0) & (index < count)
    return tl.where(there, index, 0), there


@triton.jit
def _tile(pixels, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's part of a map: channels [1, BLOCK_C], offsets and mask [BLOCK_P, BLOCK_C]."""
    across = (channels + BLOCK_C - 1) // BLOCK_C
    p = (tl.program_id(1) // across).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = (tl.program_id(1) % across).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return c, p * channels + c, (p < pixels) & (c < channels)


@triton.jit(do_not_specialize=("pixels", "experts"))
def scale_shift_kernel(
    z_ptr,  # [R, pixels, channels]
    offsets_ptr,  # [E + 1] int64
    scale_ptr, shift_ptr,  # [E, channels]
    out_ptr,  # [R, pixels, channels]
    pixels, channels, experts,
    RELU: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one row's map."""
    row = tl.program_id(0).to(tl.int64)
    c, offset, mask = _tile(pixels, channels, BLOCK_P, BLOCK_C)
    table = _expert_of(offsets_ptr, row, experts, EXPERTS) * channels + c
    scale = tl.load(scale_ptr + table, mask=c < channels, other=0.0)
    shift = tl.load(shift_ptr + table, mask=c < channels, other=0.0)
    place = row * pixels * channels + offset
    value = tl.load(z_ptr + place, mask=mask, other=0.0).to(scale.dtype) * scale + shift
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # not a maximum: NaN stays NaN
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("pixels", "experts"))
def norm_backward_kernel(
    d_ptr, z_ptr,  # [R, pixels, channels]
    offsets_ptr,  # [E + 1] int64
    p_ptr, q_ptr, r_ptr,  # [E, channels]; q and r unused unless CENTERED
    scale_ptr, shift_ptr,  # [E, channels]; unused unless MASKED
    out_ptr,  # [R, pixels, channels]
    pixels, channels, experts,
    CENTERED: tl.constexpr, MASKED: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one row's map."""
    row = tl.program_id(0).to(tl.int64)
    c, offset, mask = _tile(pixels, channels, BLOCK_P, BLOCK_C)
    table = _expert_of(offsets_ptr, row, experts, EXPERTS) * channels + c
    place = row * pixels * channels + offset
    p = tl.load(p_ptr + table, mask=c < channels, other=0.0)
    d = tl.load(d_ptr + place, mask=mask, other=0.0).to(p.dtype)
    if CENTERED or MASKED:
        z = tl.load(z_ptr + place, mask=mask, other=0.0).to(p.dtype)
    if MASKED:
        scale = tl.load(scale_ptr + table, mask=c < channels, other=0.0)
        shift = tl.load(shift_ptr + table, mask=c < channels, other=0.0)
        d = tl.where(z * scale + shift > 0, d, 0.0)
    value = p * d
    if CENTERED:
        q = tl.load(q_ptr + table, mask=c < channels, other=0.0)
        r = tl.load(r_ptr + table, mask=c < channels, other=0.0)
        value = value + q * z + r
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _head_line(
    z_ptr, scale_ptr, shift_ptr, x_ptr, skip_scale_ptr, skip_shift_ptr, row, sample, expert, size, channels, c, offset,
    mask, NORMED: tl.constexpr,
):  # fmt: skip
    """relu(z*scale + shift + skip) of a tile; the skip is the sample's x or, NORMED, the row's x*scale + shift."""
    table = expert * channels + c
    scale = tl.load(scale_ptr + table, mask=c < channels, other=0.0)
    shift = tl.load(shift_ptr + table, mask=c < channels, other=0.0)
    value = tl.load(z_ptr + row * size + offset, mask=mask, other=0.0).to(scale.dtype) * scale + shift
    if NORMED:
        x = tl.load(x_ptr + row * size + offset, mask=mask, other=0.0).to(scale.dtype)
        skip_scale = tl.load(skip_scale_ptr + table, mask=c < channels, other=0.0)
        skip_shift = tl.load(skip_shift_ptr + table, mask=c < channels, other=0.0)
        value += x * skip_scale + skip_shift
    else:
        value += tl.load(x_ptr + sample * size + offset, mask=mask, other=0.0).to(scale.dtype)
    return tl.where(value < 0, 0.0, value)


@triton.jit(do_not_specialize=("pixels", "experts", "top_k"))
def head_forward_kernel(
    z_ptr,  # [R, pixels, channels]
    scale_ptr, shift_ptr,  # [E, channels]
    x_ptr,  # [B, pixels, channels]; NORMED: [R, pixels, channels]
    skip_scale_ptr, skip_shift_ptr,  # [E, channels]; unused unless NORMED
    inverse_ptr,  # [R] int64
    offsets_ptr,  # [E + 1] int64
    weights_ptr,  # [B, k]
    out_ptr,  # [B, pixels, channels]
    top_k, pixels, channels, experts,
    NORMED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one sample's output, its k rows added in slot order."""
    sample = tl.program_id(0).to(tl.int64)
    c, offset, mask = _tile(pixels, channels, BLOCK_P, BLOCK_C)
    size = pixels.to(tl.int64) * channels
    total = tl.zeros((BLOCK_P, BLOCK_C), scale_ptr.dtype.element_ty)
    for j in range(top_k):
        row, there = _within(tl.load(inverse_ptr + sample * top_k + j), tl.num_programs(0).to(tl.int64) * top_k)
        expert = _expert_of(offsets_ptr, row, experts, EXPERTS)
        line = _head_line(
            z_ptr, scale_ptr, shift_ptr, x_ptr, skip_scale_ptr, skip_shift_ptr, row, sample, expert, size, channels, c,
            offset, mask, NORMED,
        )  # fmt: skip
        weight = tl.where(there, tl.load(weights_ptr + sample * top_k + j), float("nan"))
        total += weight.to(line.dtype) * line
    tl.store(out_ptr + sample * size + offset, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("pixels", "experts", "top_k"))
def head_backward_kernel(
    d_out_ptr,  # [B, pixels, channels]
    z_ptr,  # [R, pixels, channels]
    scale_ptr, shift_ptr,  # [E, channels]
    x_ptr,  # [B, pixels, channels]; NORMED: [R, pixels, channels]
    skip_scale_ptr, skip_shift_ptr,  # [E, channels]; unused unless NORMED
    order_ptr,  # [R] int64
    offsets_ptr,  # [E + 1] int64
    weights_ptr,  # [B, k]
    d_z_ptr,  # [R, pixels, channels]; unused unless SCALED
    d_rows_ptr,  # [R, pixels, channels]
    d_weights_ptr,  # [B, k]
    top_k, pixels, channels, experts,
    NORMED: tl.constexpr, SCALED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: one row's whole map, so that its weight's gradient is one sum, in float64.

    d_rows is the gradient at the ReLU's input; SCALED, that of the skip before its norm, and d_z that of z.
    """
    row = tl.program_id(0).to(tl.int64)
    pair, there = _within(tl.load(order_ptr + row), tl.num_programs(0))
    sample = pair // top_k
    expert = _expert_of(offsets_ptr, row, experts, EXPERTS)
    size = pixels.to(tl.int64) * channels
    weight = tl.where(there, tl.load(weights_ptr + pair), float("nan"))
    inner = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for first_p in range(0, pixels, BLOCK_P):
        for first_c in range(0, channels, BLOCK_C):
            p = first_p + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
            c = first_c + tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
            offset, mask = p * channels + c, (p < pixels) & (c < channels)
            line = _head_line(
                z_ptr, scale_ptr, shift_ptr, x_ptr, skip_scale_ptr, skip_shift_ptr, row, sample, expert, size,
                channels, c, offset, mask, NORMED,
            )  # fmt: skip
            d = tl.load(d_out_ptr + sample * size + offset, mask=mask, other=0.0)
            inner += tl.where(mask, line.to(tl.float64) * d.to(tl.float64), 0.0)
            d = tl.where(line > 0, weight.to(line.dtype) * d.to(line.dtype), 0.0)
            if SCALED:
                table = expert * channels + c
                scale = tl.load(scale_ptr + table, mask=c < channels, other=0.0)
                tl.store(d_z_ptr + row * size + offset, (scale * d).to(d_z_ptr.dtype.element_ty), mask=mask)
                if NORMED:
                    d = tl.load(skip_scale_ptr + table, mask=c < channels, other=0.0) * d
            tl.store(d_rows_ptr + row * size + offset, d.to(d_rows_ptr.dtype.element_ty), mask=mask)
    total = tl.sum(tl.sum(inner, 1), 0)
    tl.store(d_weights_ptr + pair, total.to(d_weights_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=("size", "top_k"))
def sum_rows_kernel(
    rows_ptr, other_ptr,  # [R, size]
    inverse_ptr,  # [R] int64
    out_ptr,  # [B, size]
    size, top_k,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of one sample, its k rows added in slot order in KIND."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    total = tl.zeros((BLOCK,), KIND)
    for j in range(top_k):
        row, there = _within(tl.load(inverse_ptr + sample * top_k + j), tl.num_programs(0).to(tl.int64) * top_k)
        place = row * size + column
        value = tl.load(rows_ptr + place, mask=mask & there, other=float("nan")).to(KIND)
        value += tl.load(other_ptr + place, mask=mask, other=0.0).to(KIND)
        total = tl.where(j == 0, value, total + value)  # not 0 + value: -0.0 stays -0.0, as in the reference
    tl.store(out_ptr + sample * size + column, total.to(out_ptr.dtype.element_ty), mask=mask)
