"""The grouped filter gradient's Triton kernels: one expert's tap and block of channels, summed over pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import ceil_div, clamp, segment
from robust_moe_kernels.ops.expert_conv.plan_kernel import GEOMETRY

__all__ = ["carry_kernel", "divide_kernel"]


@triton.jit
def _reach(tap, outputs, inputs, stride, padding, dilation):
    """Output lines [first, first + count) that a filter tap reaches, and the input line of line 0."""
    shift = tap * dilation - padding
    first = tl.minimum(ceil_div(tl.maximum(-shift, 0), stride), outputs)
    room = inputs - 1 - shift
    last = tl.where(room >= 0, tl.minimum(room // stride + 1, outputs), 0)
    return first, tl.maximum(last - first, 0), shift


@triton.jit
def _place(splits, taps_w):
    """The program's expert, share of the expert's pixels, and filter tap (y, x)."""
    expert, split = tl.program_id(2).to(tl.int64) // splits, tl.program_id(2).to(tl.int64) % splits
    tap_y, tap_x = tl.program_id(1).to(tl.int64) // taps_w, tl.program_id(1).to(tl.int64) % taps_w
    return expert, split, tap_y, tap_x


@triton.jit
def _all_gathered(sample_ptr, begin, count, maps, BLOCK: tl.constexpr):
    """Whether the maps that an expert's rows read are all there: the host has not looked."""
    lane = tl.arange(0, BLOCK)
    missing = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, count, BLOCK):
        map_ = tl.load(sample_ptr + begin + first + lane, mask=first + lane < count, other=0)
        missing += ((map_ < 0) | (map_ >= maps)).to(tl.int32)
    return tl.sum(missing, 0) == 0


@triton.jit
def _store(target_ptr, sums, expert, split, splits, tap_y, tap_x, taps_h, taps_w, i, inputs, o, outputs):
    """Writes the program's sums, [BLOCK_M, BLOCK_N] at channels i and o, to the target of its split, expert and tap."""
    experts = tl.num_programs(2) // splits
    tap = ((split * experts + expert) * taps_h + tap_y) * taps_w + tap_x
    place = target_ptr + (tap * inputs + i)[:, None] * outputs + o[None, :]
    tl.store(place, sums.to(target_ptr.dtype.element_ty), mask=(i < inputs)[:, None] & (o < outputs)[None, :])


@triton.jit(do_not_specialize=("splits", "maps", "limit", *GEOMETRY))
def divide_kernel(
    input_ptr,  # [*, in_h, in_w, inputs]
    sample_ptr,  # [R] int64: the map that a row reads; unused unless GATHER
    offsets_ptr,  # [E + 1] int64
    gradient_ptr,  # [R, out_h, out_w, outputs]
    target_ptr,  # [splits, E, taps_h, taps_w, inputs, outputs]
    splits,
    maps,  # of the input
    limit,  # rows
    inputs, outputs,  # channels
    in_h, in_w, out_h, out_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M input and BLOCK_N output channels of one expert's filter tap, one share of its pixels."""
    expert, split, tap_y, tap_x = _place(splits, taps_w)
    first_y, count_y, shift_y = _reach(tap_y, out_h, in_h, stride_h, pad_h, dilation_h)
    first_x, count_x, shift_x = _reach(tap_x, out_w, in_w, stride_w, pad_w, dilation_w)
    begin, rows = segment(offsets_ptr, expert, limit)
    total = rows * count_y * count_x
    share = ceil_div(ceil_div(total, BLOCK_K), splits) * BLOCK_K
    start, stop = (split * share).to(tl.int32), tl.minimum((split + 1) * share, total).to(tl.int32)
    height, width = tl.maximum(rows, 1).to(tl.int32), tl.maximum(count_x, 1).to(tl.int32)
    across = ceil_div(inputs, BLOCK_M)
    i = (tl.program_id(0) % across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATHER:  # NaN stays NaN
        sums = tl.where(_all_gathered(sample_ptr, begin, rows, maps, BLOCK_K), sums, float("nan"))
    for q in range(start, stop, BLOCK_K):
        pair = q + tl.arange(0, BLOCK_K)  # pixel-major: the rows of one pixel follow each other
        live = pair < stop
        row, pixel = begin + pair % height, pair // height
        y, x = first_y + pixel // width, first_x + pixel % width
        map_ = clamp(tl.load(sample_ptr + row, mask=live, other=0), 0, maps - 1) if GATHER else row
        source = (map_ * in_h + y * stride_h + shift_y) * in_w + x * stride_w + shift_x
        target = (row * out_h + y) * out_w + x
        a = tl.load(
            input_ptr + source[:, None] * inputs + i[None, :], mask=live[:, None] & (i < inputs)[None, :], other=0.0
        )
        b = tl.load(
            gradient_ptr + target[:, None] * outputs + o[None, :], mask=live[:, None] & (o < outputs)[None, :],
            other=0.0,
        )  # fmt: skip
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
    _store(target_ptr, sums, expert, split, splits, tap_y, tap_x, taps_h, taps_w, i, inputs, o, outputs)


@triton.jit
def _wide(value):
    """A number in [0, 2^31) as int64. Zeros in front, unlike a sign, make the product of two a single instruction."""
    return tl.cast(value, tl.uint32).to(tl.int64)


@triton.jit
def _advance(row, x, rows, width, row_step, x_step):
    """A lane's (row, x, whether the row wrapped, whether x did) one block of pairs later.

    Pairs are pixel-major: a pixel's rows follow each other. Steps are less than what they wrap at, so that one carry
    is enough.
    """
    row += row_step
    row_over = row >= rows
    row = tl.where(row_over, row - rows, row)
    x += x_step + row_over.to(tl.int32)
    x_over = x >= width
    return row, tl.where(x_over, x - width, x), row_over, x_over


@triton.jit(do_not_specialize=("splits", "maps", "limit", *GEOMETRY))
def carry_kernel(
    input_ptr,  # [*, in_h, in_w, inputs]; fewer than 2^31 pixels
    sample_ptr,  # [R] int64: the map that a row reads; unused unless GATHER
    offsets_ptr,  # [E + 1] int64
    gradient_ptr,  # [R, out_h, out_w, outputs]; fewer than 2^31 pixels
    target_ptr,  # [splits, E, taps_h, taps_w, inputs, outputs]
    splits,
    maps,  # of the input
    limit,  # rows
    inputs, outputs,  # channels
    in_h, in_w, out_h, out_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    GATHER: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,  # inputs and outputs are multiples of the blocks: no masks
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M input and BLOCK_N output channels of one expert's filter tap, one share of its pixels.

    A lane's row, column and offsets advance by steps that are known before the loop: no division in it. The map that a
    lane gathers is read an iteration ahead and carried, so that the loads of an iteration depend on no other load of
    it and as many blocks are under way as there are stages.
    """
    expert, split, tap_y, tap_x = _place(splits, taps_w)
    first_y, count_y, shift_y = _reach(tap_y, out_h, in_h, stride_h, pad_h, dilation_h)
    first_x, count_x, shift_x = _reach(tap_x, out_w, in_w, stride_w, pad_w, dilation_w)
    begin, count = segment(offsets_ptr, expert, limit)
    total = count * count_y * count_x
    share = ceil_div(ceil_div(total, BLOCK_K), splits) * BLOCK_K
    start, stop = (split * share).to(tl.int32), tl.minimum((split + 1) * share, total).to(tl.int32)
    rows, width = tl.maximum(count, 1).to(tl.int32), tl.maximum(count_x, 1).to(tl.int32)
    across = ceil_div(inputs, BLOCK_M)
    i = (tl.program_id(0) % across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Lane's place: row of the expert, x and y among the pixels that the tap reaches.
    lane = tl.arange(0, BLOCK_K)
    row, pixel = (start + lane) % rows, (start + lane) // rows
    x, y = pixel % width, pixel // width
    pixel_step = BLOCK_K // rows
    row_step, x_step, y_step = BLOCK_K % rows, pixel_step % width, pixel_step // width
    # Offsets of the pixels read, and what they grow by: in every step; when the row wraps; when x does.
    in_map, out_map = (in_h * in_w.to(tl.int64)).to(tl.int32), (out_h * out_w.to(tl.int64)).to(tl.int32)
    in_x, in_y = stride_w, (stride_h * in_w.to(tl.int64)).to(tl.int32)
    in_first = (((first_y * stride_h + shift_y) * in_w) + first_x * stride_w + shift_x).to(tl.int32)
    out_first = (begin * out_map + first_y * out_w + first_x).to(tl.int32)
    source = in_first + y.to(tl.int64) * in_y + x.to(tl.int64) * in_x
    target = out_first + row.to(tl.int64) * out_map + y.to(tl.int64) * out_w + x.to(tl.int64) * 1
    source_step = x_step.to(tl.int64) * in_x + y_step.to(tl.int64) * in_y
    source_row, source_x = in_x.to(tl.int64), in_y - width.to(tl.int64) * in_x
    target_step = row_step.to(tl.int64) * out_map + x_step + y_step.to(tl.int64) * out_w
    target_row, target_x = 1 - rows.to(tl.int64) * out_map, out_w - width.to(tl.int64)
    if GATHER:
        map_ = clamp(tl.load(sample_ptr + begin + row, mask=row < count, other=0).to(tl.int32), 0, maps - 1)
    else:
        map_ = begin + row
        source += map_ * in_map
        source_step += row_step.to(tl.int64) * in_map
        source_row -= rows.to(tl.int64) * in_map
    source, target = source.to(tl.int32), target.to(tl.int32)
    source_step, source_row, source_x = source_step.to(tl.int32), source_row.to(tl.int32), source_x.to(tl.int32)
    target_step, target_row, target_x = target_step.to(tl.int32), target_row.to(tl.int32), target_x.to(tl.int32)
    inputs_at, gradients_at = input_ptr + i[None, :], gradient_ptr + o[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATHER:  # NaN stays NaN
        sums = tl.where(_all_gathered(sample_ptr, begin, count, maps, BLOCK_K), sums, float("nan"))
    for q in range(start, stop, BLOCK_K):
        live = (lane < stop - q)[:, None]
        at = _wide(source)
        if GATHER:
            at += _wide(map_) * _wide(in_map)
        a_mask, b_mask = live, live
        if not EVEN_M:
            a_mask = live & (i < inputs)[None, :]
        if not EVEN_N:
            b_mask = live & (o < outputs)[None, :]
        a = tl.load(inputs_at + (at * _wide(inputs))[:, None], mask=a_mask, other=0.0)
        b = tl.load(gradients_at + (_wide(target) * _wide(outputs))[:, None], mask=b_mask, other=0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
        row, x, row_over, x_over = _advance(row, x, rows, width, row_step, x_step)
        source += source_step + tl.where(row_over, source_row, 0) + tl.where(x_over, source_x, 0)
        target += target_step + tl.where(row_over, target_row, 0) + tl.where(x_over, target_x, 0)
        if GATHER:  # beyond the last pair a lane's row is still one of the expert's
            map_ = clamp(tl.load(sample_ptr + begin + row).to(tl.int32), 0, maps - 1)
    _store(target_ptr, sums, expert, split, splits, tap_y, tap_x, taps_h, taps_w, i, inputs, o, outputs)
