"""A convolution's geometry along one axis, for the kernel that plans its products: places, taps, what they reach."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["axis", "ceil_div", "clamp", "segment", "window"]


@triton.jit
def ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def quotient(a, b):
    """``a // b`` along one axis, where numbers are below 2^28 (``Product.of`` refuses maps and filters of 2^14 lines).

    A 64-bit division is a call, around which registers are kept: with it the plan took 118 registers, and takes 76.
    """
    return (a.to(tl.int32) // b.to(tl.int32)).to(tl.int64)


@triton.jit
def quotient_up(a, b):
    """``quotient``, rounded up."""
    return quotient(a + b - 1, b)


@triton.jit
def clamp(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def segment(offsets_ptr, expert, rows):
    """(first row of an expert, number of its rows), within the ``rows`` that there are: the host has not looked."""
    begin = clamp(tl.load(offsets_ptr + expert), 0, rows)
    return begin, clamp(tl.load(offsets_ptr + expert + 1), begin, rows) - begin


@triton.jit
def axis(
    part, targets, sources, taps, stride, padding, dilation, FORWARD: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """One axis of a class of target places: place u reads source u*step + first + t*spread for t in [0, count).

    Returns (places of the class, step, first, spread, count, the filter tap of t = 0, of the next one more, first place
    where all taps reach data, number of those). Forward: all outputs are one class. Backward: inputs whose remainders
    by the stride agree are reached by the same taps; t runs backwards through them, so that sources ascend.
    """
    if FORWARD:
        places = targets.to(tl.int64)
        step = stride.to(tl.int64)
        first = -padding.to(tl.int64)
        spread = dilation.to(tl.int64)
        count = taps.to(tl.int64)
        tap = first * 0
        tap_step = tap + 1
    else:
        i = tl.arange(0, TAPS).to(tl.int64)
        hits = (i < taps) & ((part + padding - i * dilation).to(tl.int32) % stride == 0)
        count = tl.sum(hits.to(tl.int64), 0)
        low, tap = tl.min(tl.where(hits, i, TAPS), 0), tl.max(tl.where(hits, i, 0), 0)
        tap_step = tl.where(count > 1, quotient(low - tap, tl.maximum(count - 1, 1)), -1)
        step = count * 0 + 1
        first = quotient(part + padding - tap * dilation, stride)
        spread = tl.maximum(quotient(-tap_step * dilation, stride), 1)
        places = quotient_up(targets - part, stride)
    low = clamp(quotient_up(tl.maximum(-first, 0), step), 0, places)
    room = sources - 1 - first - (count - 1) * spread
    high = tl.where(room >= 0, clamp(quotient(room, step) + 1, low, places), low)
    return places, step, first, spread, count, tap, tap_step, low, high - low


@triton.jit
def window(low_place, high_place, step, first, spread, count, sources):
    """The taps [from, to) that reach data from any place in [low_place, high_place]."""
    start = tl.minimum(quotient_up(tl.maximum(-first - high_place * step, 0), spread), count)
    room = sources - 1 - first - low_place * step
    stop = tl.where(room >= 0, tl.minimum(quotient(room, spread) + 1, count), 0)
    return start, tl.maximum(stop, start)
