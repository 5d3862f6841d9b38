"""The Triton kernels of batch norms in training and of their gradients: sums over pixels, and what becomes of them.

Sums run over fixed shares of an expert's pixels, a program each; the second kernel adds the shares in order. All in
float64: a difference of such sums has no cancellation to speak of.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["norm_finalise_backward_kernel", "norm_finalise_kernel", "sums_kernel"]


@triton.jit(do_not_specialize=("rows", "pixels", "shares"))
def sums_kernel(
    value_ptr,  # [R, pixels, channels]
    other_ptr,  # the same
    offsets_ptr,  # [E + 1] int64
    scale_ptr, shift_ptr,  # [E, channels]; unused unless MASKED
    sums_ptr,  # [shares, E, channels] float64
    products_ptr,  # the same
    rows, pixels, channels, shares,
    MASKED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: one share of one expert's pixels, BLOCK_C channels."""
    expert, share = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    from_row = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert), 0), rows)  # the host has not looked
    to_row = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert + 1), from_row), rows)
    begin, total = from_row * pixels, (to_row - from_row) * pixels
    each = (total + shares - 1) // shares
    first, last = begin + share * each, begin + tl.minimum((share + 1) * each, total)
    if MASKED:
        scale = tl.load(scale_ptr + expert * channels + c, mask=c < channels, other=0.0)[None, :]
        shift = tl.load(shift_ptr + expert * channels + c, mask=c < channels, other=0.0)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < last) & (c < channels)[None, :]
        value = tl.load(value_ptr + p * channels + c[None, :], mask=mask, other=0.0)
        other = tl.load(other_ptr + p * channels + c[None, :], mask=mask, other=0.0)
        if MASKED:
            value = tl.where(other.to(scale.dtype) * scale + shift > 0, value, 0.0)
        sums += value.to(tl.float64)
        products += value.to(tl.float64) * other.to(tl.float64)
    place = (share * tl.num_programs(1) + expert) * channels + c
    tl.store(sums_ptr + place, tl.sum(sums, 0), mask=c < channels)
    tl.store(products_ptr + place, tl.sum(products, 0), mask=c < channels)


@triton.jit
def _place(offsets_ptr, pixels, channels, size, BLOCK: tl.constexpr):
    """A program's part of the [E, channels] tables: (place, mask, expert, number of values that its norm sees)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    expert = i // channels
    first = tl.load(offsets_ptr + expert, mask=mask, other=0)
    last = tl.load(offsets_ptr + expert + 1, mask=mask, other=0)
    return i, mask, expert, ((last - first) * pixels).to(tl.float64)


@triton.jit
def _added(shares_ptr, shares, size, i, mask, BLOCK: tl.constexpr):
    """Sums and sums of products at i, their shares added in order."""
    total = tl.zeros((BLOCK,), tl.float64)
    product = tl.zeros((BLOCK,), tl.float64)
    second = shares_ptr + shares.to(tl.int64) * size
    place = i
    for _ in range(shares):
        total += tl.load(shares_ptr + place, mask=mask, other=0.0)
        product += tl.load(second + place, mask=mask, other=0.0)
        place += size
    return total, product


@triton.jit
def _moved(running, batch, momentum):
    """As torch.lerp: from the nearer end."""
    far = batch - (batch - running) * (1.0 - momentum)
    return tl.where(tl.abs(momentum) < 0.5, running + momentum * (batch - running), far)


@triton.jit(do_not_specialize=("shares", "pixels", "size"))
def norm_finalise_kernel(
    shares_ptr,  # [2, shares, E, channels] float64
    offsets_ptr,  # [E + 1] int64
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr,  # [E, channels]
    tracked_ptr,  # [E] int64
    scale_ptr, shift_ptr, mean_ptr, rstd_ptr,  # [E, channels]
    next_mean_ptr, next_var_ptr,  # [E, channels], as running_mean and running_var
    next_tracked_ptr,  # [E] int64
    eps: tl.float64, momentum: tl.float64,
    shares, pixels, channels, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK of E * channels batch norms."""
    i, mask, expert, count = _place(offsets_ptr, pixels, channels, size, BLOCK)
    total, square = _added(shares_ptr, shares, size, i, mask, BLOCK)
    some = tl.maximum(count, 1.0)
    mean = total / some
    variance = square / some - mean * mean
    variance = tl.where(variance < 0, 0.0, variance)  # not a maximum: NaN stays NaN
    rstd = tl.where(count == 1, 0.0, 1.0 / tl.sqrt(variance + eps))
    scale = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float64) * rstd
    shift = tl.load(bias_ptr + i, mask=mask, other=0.0).to(tl.float64) - mean * scale
    kind: tl.constexpr = scale_ptr.dtype.element_ty
    tl.store(scale_ptr + i, scale.to(kind), mask=mask)
    tl.store(shift_ptr + i, shift.to(kind), mask=mask)
    tl.store(mean_ptr + i, mean.to(kind), mask=mask)
    tl.store(rstd_ptr + i, rstd.to(kind), mask=mask)
    step = tl.full((BLOCK,), momentum, kind)
    running = tl.load(running_mean_ptr + i, mask=mask, other=0.0).to(kind)
    running = tl.where(count > 0, _moved(running, mean.to(kind), step), running)
    tl.store(next_mean_ptr + i, running.to(next_mean_ptr.dtype.element_ty), mask=mask)
    unbiased = variance.to(kind) * (count / tl.maximum(count - 1, 1.0)).to(kind)
    running = tl.load(running_var_ptr + i, mask=mask, other=0.0).to(kind)
    running = tl.where(count > 1, _moved(running, unbiased, step), running)
    tl.store(next_var_ptr + i, running.to(next_var_ptr.dtype.element_ty), mask=mask)
    first = mask & (i % channels == 0)
    tracked = tl.load(tracked_ptr + expert, mask=first, other=0)
    tl.store(next_tracked_ptr + expert, tracked + (count > 0).to(tl.int64), mask=first)


@triton.jit(do_not_specialize=("shares", "pixels", "size"))
def norm_finalise_backward_kernel(
    shares_ptr,  # [2, shares, E, channels] float64
    offsets_ptr,  # [E + 1] int64
    scale_ptr, mean_ptr, rstd_ptr,  # [E, channels]
    d_weight_ptr, d_bias_ptr,  # [E, channels]
    q_ptr, r_ptr,  # [E, channels]; unused unless TRAINING
    shares, pixels, channels, size,
    TRAINING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK of E * channels batch norms."""
    i, mask, _expert, count = _place(offsets_ptr, pixels, channels, size, BLOCK)
    total, product = _added(shares_ptr, shares, size, i, mask, BLOCK)
    kind: tl.constexpr = scale_ptr.dtype.element_ty
    scale = tl.load(scale_ptr + i, mask=mask, other=0.0)
    mean = tl.load(mean_ptr + i, mask=mask, other=0.0).to(tl.float64)
    rstd = tl.load(rstd_ptr + i, mask=mask, other=0.0)
    d_weight = (product - mean * total) * rstd.to(tl.float64)
    tl.store(d_weight_ptr + i, d_weight.to(kind), mask=mask)
    tl.store(d_bias_ptr + i, total.to(kind), mask=mask)
    if TRAINING:
        some = tl.maximum(count, 1.0)
        q = (-scale * rstd).to(tl.float64) * d_weight / some
        r = (-scale).to(tl.float64) * total / some - q * mean
        tl.store(q_ptr + i, q.to(kind), mask=mask)
        tl.store(r_ptr + i, r.to(kind), mask=mask)
