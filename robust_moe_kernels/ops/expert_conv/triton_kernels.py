"""The grouped convolution's Triton kernels; ``triton_impl`` launches them and says why they are as they are."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["GEOMETRY", "RECORD", "filter_kernel", "plan_kernel", "product_kernel"]


@triton.jit
def _ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def _clamp(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def _axis(
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
        hits = (i < taps) & ((part + padding - i * dilation) % stride == 0)
        count = tl.sum(hits.to(tl.int64), 0)
        low, tap = tl.min(tl.where(hits, i, TAPS), 0), tl.max(tl.where(hits, i, 0), 0)
        tap_step = tl.where(count > 1, (low - tap) // tl.maximum(count - 1, 1), -1)
        step = count * 0 + 1
        first = (part + padding - tap * dilation) // stride
        spread = tl.maximum(-tap_step * dilation // stride, 1)
        places = _ceil_div(targets - part, stride).to(tl.int64)
    low = _clamp(_ceil_div(tl.maximum(-first, 0), step), 0, places)
    room = sources - 1 - first - (count - 1) * spread
    high = tl.where(room >= 0, _clamp(room // step + 1, low, places), low)
    return places, step, first, spread, count, tap, tap_step, low, high - low


@triton.jit
def _window(low_place, high_place, step, first, spread, count, sources):
    """The taps [from, to) that reach data from any place in [low_place, high_place]."""
    start = tl.minimum(_ceil_div(tl.maximum(-first - high_place * step, 0), spread), count)
    room = sources - 1 - first - low_place * step
    stop = tl.where(room >= 0, tl.minimum(room // spread + 1, count), 0)
    return start, tl.maximum(stop, start)


@triton.jit
def _inner_first(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x):
    """(y, x) of a pixel, those with all taps first, then the left and right sides, top and bottom, and corners: pixels
    next to each other in this order need the same taps or nearly so."""
    edge_y, edge_x = (places_y - inner_y).to(tl.int32), (places_x - inner_x).to(tl.int32)
    sides = pixel - (inner_y * inner_x).to(tl.int32)
    ends = sides - (inner_y * edge_x).to(tl.int32)
    corners = ends - (edge_y * inner_x).to(tl.int32)
    low_y, low_x, inner_y, inner_x = low_y.to(tl.int32), low_x.to(tl.int32), inner_y.to(tl.int32), inner_x.to(tl.int32)
    width, height = tl.maximum(inner_x, 1), tl.maximum(inner_y, 1)
    outer = tl.maximum(edge_x, 1)
    in_y = tl.where(sides < 0, pixel // width, sides % height) + low_y
    in_x = tl.where(sides < 0, pixel % width, ends % width) + low_x
    out_y = tl.where(corners < 0, ends // width, corners // outer)
    out_x = tl.where(ends < 0, sides // height, corners % outer)
    out_y += tl.where(out_y < low_y, 0, inner_y)
    out_x += tl.where(out_x < low_x, 0, inner_x)
    y = tl.where(ends < 0, in_y, out_y)
    x = tl.where((sides < 0) | ((ends >= 0) & (corners < 0)), in_x, out_x)
    return y, x


@triton.jit
def _locate(offsets_ptr, tile, pixels, experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """(expert, its first row, its rows, number of the tile among its tiles); no rows for a surplus tile."""
    e = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    rows = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0) - begin
    tiles = _ceil_div(rows * pixels, BLOCK)
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = e == expert
    before = tl.sum(tl.where(mine, ends - tiles, 0), 0)
    return expert, tl.sum(tl.where(mine, begin, 0), 0), tl.sum(tl.where(mine, rows, 0), 0), tile - before


# A tile's record, int64 each: what a program of product_kernel has to know beside its lanes.
_EXPERT, _TAPS_Y, _TAPS_X, _SPREAD_Y, _SPREAD_X, _TAP_Y, _TAP_X, _TAP_STEP_Y, _TAP_STEP_X = map(tl.constexpr, range(9))
RECORD = tl.constexpr(16)
_HALF = tl.constexpr(1 << 15)  # maps of up to 2^15 lines and columns: a source pixel's place is packed into 32 bits

GEOMETRY = (
    "in_h", "in_w", "out_h", "out_w", "taps_h", "taps_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w",
)  # fmt: skip


@triton.jit(do_not_specialize=("experts", "tiles", *GEOMETRY))
def plan_kernel(
    offsets_ptr,  # [E + 1] int64
    record_ptr,  # [parts, tiles, RECORD] int64
    row_ptr,  # [parts, tiles, BLOCK_M] int32: the row
    spot_ptr,  # the same shape, int32: source pixel of the tile's first tap, line and column, each + 2^15; may lie
    # outside of the map
    place_ptr,  # the same shape, int64: pixel to write, over all target maps; -1 for none
    experts, tiles,
    in_h, in_w, out_h, out_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    FORWARD: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two >= experts
    TAPS: tl.constexpr,  # power of two >= max(taps_h, taps_w)
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile, BLOCK_M (pixel, row) pairs of one expert."""
    if FORWARD:
        source_h, source_w, target_h, target_w, part_y, part_x, parts_h, parts_w = in_h, in_w, out_h, out_w, 0, 0, 1, 1
    else:
        source_h, source_w, target_h, target_w = out_h, out_w, in_h, in_w
        part_y, part_x = tl.program_id(1) // stride_w, tl.program_id(1) % stride_w
        parts_h, parts_w = stride_h, stride_w
    places_y, step_y, first_y, spread_y, count_y, tap_y, tap_step_y, low_y, inner_y = _axis(
        part_y, target_h, source_h, taps_h, stride_h, pad_h, dilation_h, FORWARD, TAPS
    )
    places_x, step_x, first_x, spread_x, count_x, tap_x, tap_step_x, low_x, inner_x = _axis(
        part_x, target_w, source_w, taps_w, stride_w, pad_w, dilation_w, FORWARD, TAPS
    )
    number = tl.program_id(1).to(tl.int64) * tiles + tl.program_id(0)
    record = record_ptr + number * RECORD
    pixels = places_y * places_x
    expert, begin, rows, tile = _locate(offsets_ptr, tl.program_id(0), pixels, experts, EXPERTS, BLOCK_M)
    if rows * pixels == 0:
        tl.store(record, -1)
        return
    # Pixel-major, so that a tile covers few pixels and few different taps. Lanes past the end repeat the last pair.
    lane = tl.arange(0, BLOCK_M)
    live = tile * BLOCK_M + lane < rows * pixels
    pair = tl.minimum(tile * BLOCK_M + lane, rows * pixels - 1).to(tl.int32)
    row = begin + pair % rows.to(tl.int32)
    y, x = _inner_first(pair // rows.to(tl.int32), places_y, places_x, low_y, inner_y, low_x, inner_x)
    from_y, to_y = _window(tl.min(y, 0), tl.max(y, 0), step_y, first_y, spread_y, count_y, source_h)
    from_x, to_x = _window(tl.min(x, 0), tl.max(x, 0), step_x, first_x, spread_x, count_x, source_w)
    near_y, near_x = y * step_y + first_y + from_y * spread_y, x * step_x + first_x + from_x * spread_x
    here = number * BLOCK_M + lane
    tl.store(row_ptr + here, row.to(tl.int32))
    tl.store(
        spot_ptr + here, ((near_y + _HALF) * (2 * _HALF) + near_x + _HALF).to(tl.uint32).to(tl.int32, bitcast=True)
    )
    place = (row * target_h + (y.to(tl.int64) * parts_h + part_y)) * target_w + (x.to(tl.int64) * parts_w + part_x)
    tl.store(place_ptr + here, tl.where(live, place, -1))
    tl.store(record + _EXPERT, expert)
    tl.store(record + _TAPS_Y, to_y - from_y)
    tl.store(record + _TAPS_X, to_x - from_x)
    tl.store(record + _SPREAD_Y, spread_y)
    tl.store(record + _SPREAD_X, spread_x)
    tl.store(record + _TAP_Y, tap_y + from_y * tap_step_y)
    tl.store(record + _TAP_X, tap_x + from_x * tap_step_x)
    tl.store(record + _TAP_STEP_Y, tap_step_y)
    tl.store(record + _TAP_STEP_X, tap_step_x)


@triton.jit(do_not_specialize=("source_h", "source_w", "taps_h", "taps_w"))
def product_kernel(
    source_ptr,  # [*, source_h, source_w, depth]: forward the input, backward the output's gradient
    weight_ptr,  # [E, taps_h, taps_w, I, O]
    target_ptr,  # [R, target_h, target_w, columns]
    record_ptr, row_ptr, spot_ptr, place_ptr,  # from plan_kernel
    sample_ptr,  # [R] int64: the source map of a row; unused unless GATHER
    source_h, source_w, taps_h, taps_w,
    depth,  # channels of a source pixel: I forward, O backward
    columns,  # channels of a target pixel
    FORWARD: tl.constexpr, GATHER: tl.constexpr,
    MIRROR: tl.constexpr,  # an input gradient by the plan of the forward product: taps count from the other end
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the plan, BLOCK_N channels of it; all its taps and source channels."""
    number = tl.program_id(0).to(tl.int64)
    zero = number * 0
    record = record_ptr + number * RECORD
    expert = tl.load(record)
    if expert < 0:  # the grid is an upper bound
        return
    taps_y, taps_x = tl.load(record + _TAPS_Y), tl.load(record + _TAPS_X)
    spread_y, spread_x = tl.load(record + _SPREAD_Y), tl.load(record + _SPREAD_X)
    tap_step_y, tap_step_x = tl.load(record + _TAP_STEP_Y), tl.load(record + _TAP_STEP_X)
    tap_y, tap_x = tl.load(record + _TAP_Y), tl.load(record + _TAP_X)
    if MIRROR:
        tap_y, tap_x, tap_step_y, tap_step_x = taps_h - 1 - tap_y, taps_w - 1 - tap_x, -tap_step_y, -tap_step_x
    filter_x = (zero + depth) * columns
    filter_y = taps_w * filter_x
    tap = tap_y * filter_y + tap_x * filter_x

    lanes = number * BLOCK_M + tl.arange(0, BLOCK_M)
    map_ = tl.load(row_ptr + lanes).to(tl.int64)
    if GATHER:
        map_ = tl.load(sample_ptr + map_)
    spot = tl.load(spot_ptr + lanes).to(tl.uint32, bitcast=True)
    near_y, near_x = (spot // (2 * _HALF)).to(tl.int32) - _HALF, (spot % (2 * _HALF)).to(tl.int32) - _HALF
    sources = source_ptr + ((map_ * source_h + near_y) * source_w + near_x) * depth
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    if FORWARD:
        filter_k = columns
        filters = weight_ptr + (expert * taps_h * filter_y + tap + n)[None, :] + (lane.to(tl.int64) * columns)[:, None]
    else:
        filter_k = 1
        filters = weight_ptr + (expert * taps_h * filter_y + tap + n * depth)[None, :] + lane[:, None]
    # One loop over (tap, block of channels), so that loads run ahead across taps. Offsets only grow by steps that are
    # known before it: products in the loop would cost registers.
    blocks = _ceil_div(zero + depth, BLOCK_K)
    spare = (blocks - 1) * BLOCK_K
    source_tap = spread_x * depth - spare
    source_line = (spread_y * source_w - taps_x * spread_x) * depth
    filter_tap = tap_step_x * filter_x - spare * filter_k
    filter_line = tap_step_y * filter_y - taps_x * tap_step_x * filter_x
    source_at, filter_at, filter_block = zero, zero, zero + BLOCK_K * filter_k
    right, spread_y, spread_x = (taps_x * spread_x).to(tl.int32), spread_y.to(tl.int32), spread_x.to(tl.int32)
    dy, dx, k = right * 0, right * 0, right * 0
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range((taps_y * taps_x * blocks).to(tl.int32)):
        at_y, at_x = near_y + dy, near_x + dx
        inside = (at_y >= 0) & (at_y < source_h) & (at_x >= 0) & (at_x < source_w)
        left = depth - k
        a = tl.load(
            sources[:, None] + (source_at + lane)[None, :], mask=inside[:, None] & (lane < left)[None, :], other=0.0
        )
        b = tl.load(
            filters + filter_at, mask=(lane < left)[:, None] & (n < columns)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        k += BLOCK_K
        next_tap = k >= depth
        dx += tl.where(next_tap, spread_x, 0)
        next_line = dx >= right
        k = tl.where(next_tap, 0, k)
        dx = tl.where(next_line, 0, dx)
        dy += tl.where(next_line, spread_y, 0)
        source_at += tl.where(next_tap, source_tap, BLOCK_K) + tl.where(next_line, source_line, 0)
        filter_at += tl.where(next_tap, filter_tap, filter_block) + tl.where(next_line, filter_line, 0)
    place = tl.load(place_ptr + lanes)
    target = target_ptr + place[:, None] * columns + n[None, :]
    tl.store(target, sums.to(target_ptr.dtype.element_ty), mask=(place >= 0)[:, None] & (n < columns)[None, :])


@triton.jit
def _reach(tap, outputs, inputs, stride, padding, dilation):
    """Output lines [first, first + count) that a filter tap reaches, and the input line of line 0."""
    shift = tap * dilation - padding
    first = tl.minimum(_ceil_div(tl.maximum(-shift, 0), stride), outputs)
    room = inputs - 1 - shift
    last = tl.where(room >= 0, tl.minimum(room // stride + 1, outputs), 0)
    return first, tl.maximum(last - first, 0), shift


@triton.jit(do_not_specialize=("splits", *GEOMETRY))
def filter_kernel(
    input_ptr,  # [*, in_h, in_w, inputs]
    sample_ptr,  # [R] int64: the map that a row reads; unused unless GATHER
    offsets_ptr,  # [E + 1] int64
    gradient_ptr,  # [R, out_h, out_w, outputs]
    target_ptr,  # [splits, E, taps_h, taps_w, inputs, outputs]
    splits,
    inputs, outputs,  # channels
    in_h, in_w, out_h, out_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M input and BLOCK_N output channels of one expert's filter tap, one share of its pixels."""
    expert, split = tl.program_id(2).to(tl.int64) // splits, tl.program_id(2).to(tl.int64) % splits
    tap_y, tap_x = tl.program_id(1).to(tl.int64) // taps_w, tl.program_id(1).to(tl.int64) % taps_w
    first_y, count_y, shift_y = _reach(tap_y, out_h, in_h, stride_h, pad_h, dilation_h)
    first_x, count_x, shift_x = _reach(tap_x, out_w, in_w, stride_w, pad_w, dilation_w)
    begin = tl.load(offsets_ptr + expert)
    rows = tl.load(offsets_ptr + expert + 1) - begin
    total = rows * count_y * count_x
    share = _ceil_div(_ceil_div(total, BLOCK_K), splits) * BLOCK_K
    start, stop = (split * share).to(tl.int32), tl.minimum((split + 1) * share, total).to(tl.int32)
    height, width = tl.maximum(rows, 1).to(tl.int32), tl.maximum(count_x, 1).to(tl.int32)
    across = _ceil_div(inputs, BLOCK_M)
    i = (tl.program_id(0) % across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) // across).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for q in range(start, stop, BLOCK_K):
        pair = q + tl.arange(0, BLOCK_K)  # pixel-major: the rows of one pixel follow each other
        live = pair < stop
        row, pixel = begin + pair % height, pair // height
        y, x = first_y + pixel // width, first_x + pixel % width
        map_ = tl.load(sample_ptr + row, mask=live, other=0) if GATHER else row
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
    experts = tl.num_programs(2) // splits
    tap = ((split * experts + expert) * taps_h + tap_y) * taps_w + tap_x
    place = target_ptr + (tap * inputs + i)[:, None] * outputs + o[None, :]
    tl.store(place, sums.to(target_ptr.dtype.element_ty), mask=(i < inputs)[:, None] & (o < outputs)[None, :])
