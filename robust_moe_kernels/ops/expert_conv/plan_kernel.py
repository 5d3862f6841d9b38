"""The Triton kernel that plans a grouped product: which pixels each of its tiles reads and writes, tiles in order.

A tile is BLOCK_M (pixel, row) pairs of one expert. What its taps are is arithmetic on the geometry; where it comes
among all tiles is a closed form over the experts' numbers of rows, which every program of the plan works out for
itself, so that the host knows nothing and no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["GEOMETRY", "HALF", "MASKED_TAPS", "RECORD", "ceil_div", "plan_kernel"]


@triton.jit
def ceil_div(a, b):
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
        places = ceil_div(targets - part, stride).to(tl.int64)
    low = _clamp(ceil_div(tl.maximum(-first, 0), step), 0, places)
    room = sources - 1 - first - (count - 1) * spread
    high = tl.where(room >= 0, _clamp(room // step + 1, low, places), low)
    return places, step, first, spread, count, tap, tap_step, low, high - low


@triton.jit
def _window(low_place, high_place, step, first, spread, count, sources):
    """The taps [from, to) that reach data from any place in [low_place, high_place]."""
    start = tl.minimum(ceil_div(tl.maximum(-first - high_place * step, 0), spread), count)
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


# The ring: the interior, then once around it, so that a tile that straddles two segments covers a side and its corner
# and needs no more taps than the side alone. A segment is a band of lines by a band of columns (0: before the inner
# places, 1: those, 2: behind them), two bits each: interior, left, top left, top, top right, right, bottom right,
# bottom, bottom left. Those at even positions after the first are corners.
_BANDS_Y = tl.constexpr(sum(band << 2 * i for i, band in enumerate((1, 1, 0, 0, 0, 1, 2, 2, 2))))
_BANDS_X = tl.constexpr(sum(band << 2 * i for i, band in enumerate((1, 0, 0, 1, 2, 2, 2, 1, 0))))


@triton.jit
def _band(places, low, inner, BANDS: tl.constexpr, SEGMENT: tl.constexpr):
    """(first place, number of places) of a segment's band of one axis."""
    if (BANDS >> (2 * SEGMENT)) & 3 == 0:
        first, size = low * 0, low
    elif (BANDS >> (2 * SEGMENT)) & 3 == 1:
        first, size = low, inner
    else:
        first, size = low + inner, places - low - inner
    return first, size


@triton.jit
def _around(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x):
    """(y, x) of a pixel in the order of the ring."""
    y, x, begin = pixel * 0, pixel * 0, pixel * 0
    for segment in tl.static_range(9):
        first_y, size_y = _band(places_y, low_y, inner_y, _BANDS_Y, segment)
        first_x, size_x = _band(places_x, low_x, inner_x, _BANDS_X, segment)
        here = pixel - begin
        if segment == 1 or segment == 5:  # down a side: the places of a column need the same taps
            length = tl.maximum(size_y, 1).to(tl.int32)
            next_y, next_x = first_y.to(tl.int32) + here % length, first_x.to(tl.int32) + here // length
        else:
            length = tl.maximum(size_x, 1).to(tl.int32)
            next_y, next_x = first_y.to(tl.int32) + here // length, first_x.to(tl.int32) + here % length
        y, x = tl.where(here >= 0, next_y, y), tl.where(here >= 0, next_x, x)
        begin += (size_y * size_x).to(tl.int32)
    return y, x


@triton.jit
def _corners(rows, tile, tiles, full, places_y, places_x, low_y, inner_y, low_x, inner_x, BLOCK: tl.constexpr):
    """Tiles of each expert that are not among their neighbours' kind: those in one corner alone, which need fewer taps,
    and those around a whole corner into both its sides, which need all. Of either kind (number, those before ``tile``,
    whether ``tile`` is one)."""
    corners, before, hit = rows * 0, rows * 0, rows * 0
    wide, wide_before, wide_hit, last_wide = rows * 0, rows * 0, rows * 0, rows * 0 - 1
    begin, total = inner_y * inner_x, places_y * places_x * rows
    for segment in tl.static_range(1, 9):
        size = _band(places_y, low_y, inner_y, _BANDS_Y, segment)[1] * _band(
            places_x, low_x, inner_x, _BANDS_X, segment
        )[1]  # fmt: skip
        if segment % 2 == 0:
            start, end = begin * rows, (begin + size) * rows
            first = tl.maximum(ceil_div(start, BLOCK), full)
            last = tl.where(end == total, tiles, end // BLOCK)
            count = tl.maximum(last - first, 0)
            corners += count
            before += _clamp(tile - first, 0, count)
            hit += ((tile >= first) & (tile < last)).to(tl.int64)
            at = start // BLOCK
            around = (start > at * BLOCK) & (end < tl.minimum((at + 1) * BLOCK, total)) & (size > 0)
            around = around & (at >= full) & (at != last_wide)
            last_wide = tl.where(around, at, last_wide)
            wide += around.to(tl.int64)
            wide_before += (around & (at < tile)).to(tl.int64)
            wide_hit += (around & (at == tile)).to(tl.int64)
        begin += size
    return corners, before, hit, wide, wide_before, wide_hit


@triton.jit
def _rank(rows, expert, tile, places_y, places_x, low_y, inner_y, low_x, inner_x, EXPERTS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Place of an expert's tile among all of its part: tiles with pixels of the interior first and those as long, then
    sides, then corners, which is most taps first; within those by expert, so that neighbours read the same filters."""
    e = tl.arange(0, EXPERTS)
    tiles = ceil_div(rows * (places_y * places_x), BLOCK)
    full = ceil_div(rows * (inner_y * inner_x), BLOCK)
    corners, corners_before, hit, wide, wide_before, wide_hit = _corners(
        rows, tile, tiles, full, places_y, places_x, low_y, inner_y, low_x, inner_x, BLOCK
    )
    sides = tiles - full - corners - wide
    mine = e == expert
    own_full, own_wide = tl.sum(tl.where(mine, full, 0), 0), tl.sum(tl.where(mine, wide_before, 0), 0)
    own_corners = tl.sum(tl.where(mine, corners_before, 0), 0)
    is_long = (tile < own_full) | (tl.sum(tl.where(mine, wide_hit, 0), 0) > 0)
    is_corner = tl.sum(tl.where(mine, hit, 0), 0) > 0
    index = tl.where(is_corner, own_corners, tile - own_full - own_wide - own_corners)
    index = tl.where(is_long, tl.minimum(tile, own_full) + own_wide, index)
    like = tl.where(is_long, full + wide, tl.where(is_corner, corners, sides))
    before = tl.sum(tl.where(e < expert, like, 0), 0)
    before += tl.where(is_long, 0, tl.sum(full + wide, 0)) + tl.where(is_corner, tl.sum(sides, 0), 0)
    return before + index


@triton.jit
def _before_part(
    rows, part, parts_w, target_h, target_w, source_h, source_w, taps_h, taps_w, stride_h, stride_w, pad_h,
    pad_w, dilation_h, dilation_w, FORWARD: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(tiles of the parts with more taps than ``part``, or as many and a lower number; tiles of all parts)."""
    mine = _part(part, parts_w, target_h, target_w, source_h, source_w, taps_h, taps_w, stride_h, stride_w, pad_h,
                 pad_w, dilation_h, dilation_w, FORWARD, TAPS)[0]  # fmt: skip
    before, total = mine * 0, mine * 0
    for other in range(tl.num_programs(1)):
        taps, pixels = _part(other, parts_w, target_h, target_w, source_h, source_w, taps_h, taps_w, stride_h,
                             stride_w, pad_h, pad_w, dilation_h, dilation_w, FORWARD, TAPS)  # fmt: skip
        tiles = tl.sum(ceil_div(rows * pixels, BLOCK), 0)
        before += tl.where((taps > mine) | ((taps == mine) & (other < part)), tiles, 0)
        total += tiles
    return before, total


@triton.jit
def _part(
    part, parts_w, target_h, target_w, source_h, source_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, FORWARD: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """(taps, pixels) of a part."""
    y = _axis(part // parts_w, target_h, source_h, taps_h, stride_h, pad_h, dilation_h, FORWARD, TAPS)
    x = _axis(part % parts_w, target_w, source_w, taps_w, stride_w, pad_w, dilation_w, FORWARD, TAPS)
    return y[4] * x[4], y[0] * x[0]


@triton.jit
def _locate(rows, begin, tile, pixels, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """(expert, its first row, its rows, number of the tile among its tiles); no rows for a surplus tile."""
    e = tl.arange(0, EXPERTS)
    tiles = ceil_div(rows * pixels, BLOCK)
    ends = tl.cumsum(tiles, 0)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = e == expert
    before = tl.sum(tl.where(mine, ends - tiles, 0), 0)
    return expert, tl.sum(tl.where(mine, begin, 0), 0), tl.sum(tl.where(mine, rows, 0), 0), tile - before


# A tile's record, int64 each: what a program of a product has to know beside its lanes. One record more than there can
# be tiles: its first number is how many there are.
RECORD = tl.constexpr(16)
HALF = tl.constexpr(1 << 15)  # maps of up to 2^15 lines and columns: a source pixel's place is packed into 32 bits
MASKED_TAPS = 16  # taps of an axis that a lane's mask has bits for

GEOMETRY = (
    "in_h", "in_w", "out_h", "out_w", "taps_h", "taps_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w",
)  # fmt: skip


@triton.jit(do_not_specialize=("experts", "tiles", *GEOMETRY))
def plan_kernel(
    offsets_ptr,  # [E + 1] int64
    record_ptr,  # [parts * tiles + 1, RECORD] int64
    row_ptr,  # [parts * tiles, BLOCK_M] int32: the row
    spot_ptr,  # the same shape, int32: source pixel of the tile's first tap, which may lie outside of the map; RING:
    # its number in the map; else its line and column, each + 2^15
    mask_ptr,  # the same shape, int32; RING: which of the tile's taps reach data, columns from bit 0, lines from bit 16
    place_ptr,  # the same shape, int64: pixel to write, over all target maps; -1 for none
    experts, tiles,
    in_h, in_w, out_h, out_w, taps_h, taps_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    FORWARD: tl.constexpr,
    RING: tl.constexpr,  # pixels around the interior, tiles with most taps first, no gaps; else expert by expert
    EXPERTS: tl.constexpr,  # power of two >= experts
    TAPS: tl.constexpr,  # power of two >= max(taps_h, taps_w)
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile, BLOCK_M (pixel, row) pairs of one expert."""
    part = tl.program_id(1)
    if FORWARD:
        source_h, source_w, target_h, target_w, parts_h, parts_w = in_h, in_w, out_h, out_w, 1, 1
    else:
        source_h, source_w, target_h, target_w, parts_h, parts_w = out_h, out_w, in_h, in_w, stride_h, stride_w
    part_y, part_x = part // parts_w, part % parts_w
    places_y, step_y, first_y, spread_y, count_y, tap_y, tap_step_y, low_y, inner_y = _axis(
        part_y, target_h, source_h, taps_h, stride_h, pad_h, dilation_h, FORWARD, TAPS
    )
    places_x, step_x, first_x, spread_x, count_x, tap_x, tap_step_x, low_x, inner_x = _axis(
        part_x, target_w, source_w, taps_w, stride_w, pad_w, dilation_w, FORWARD, TAPS
    )
    e = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    counts = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0) - begins
    number = part.to(tl.int64) * tiles + tl.program_id(0)
    pixels = places_y * places_x
    expert, begin, rows, tile = _locate(counts, begins, tl.program_id(0), pixels, EXPERTS, BLOCK_M)
    if RING:
        before, total = _before_part(
            counts, part, parts_w, target_h, target_w, source_h, source_w, taps_h, taps_w, stride_h,
            stride_w, pad_h, pad_w, dilation_h, dilation_w, FORWARD, TAPS, BLOCK_M,
        )  # fmt: skip
        if number == 0:
            tl.store(record_ptr + tl.num_programs(1).to(tl.int64) * tiles * RECORD, total)
        number = before + _rank(
            counts, expert, tile, places_y, places_x, low_y, inner_y, low_x, inner_x, EXPERTS, BLOCK_M
        )
    record = record_ptr + number * RECORD
    if rows * pixels == 0:
        if not RING:
            tl.store(record, -1)
        return
    # Pixel-major, so that a tile covers few pixels and few different taps. Lanes past the end repeat the last pair.
    lane = tl.arange(0, BLOCK_M)
    live = tile * BLOCK_M + lane < rows * pixels
    pair = tl.minimum(tile * BLOCK_M + lane, rows * pixels - 1).to(tl.int32)
    row = begin + pair % rows.to(tl.int32)
    pixel = pair // rows.to(tl.int32)
    if RING:
        y, x = _around(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x)
    else:
        y, x = _inner_first(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x)
    from_y, to_y = _window(tl.min(y, 0), tl.max(y, 0), step_y, first_y, spread_y, count_y, source_h)
    from_x, to_x = _window(tl.min(x, 0), tl.max(x, 0), step_x, first_x, spread_x, count_x, source_w)
    near_y, near_x = y * step_y + first_y + from_y * spread_y, x * step_x + first_x + from_x * spread_x
    here = number * BLOCK_M + lane
    tl.store(row_ptr + here, row.to(tl.int32))
    if RING:
        spot = near_y * source_w + near_x
        mask = lane * 0
        for t in tl.static_range(TAPS):
            at_y, at_x = near_y + t * spread_y, near_x + t * spread_x
            mask |= tl.where((t < to_x - from_x) & (at_x >= 0) & (at_x < source_w), 1 << t, 0)
            mask |= tl.where((t < to_y - from_y) & (at_y >= 0) & (at_y < source_h), 1 << t, 0) << 16
        tl.store(mask_ptr + here, mask)
    else:
        spot = ((near_y + HALF) * (2 * HALF) + near_x + HALF).to(tl.uint32)
    tl.store(spot_ptr + here, spot.to(tl.int32, bitcast=not RING))
    place = (row * target_h + (y.to(tl.int64) * parts_h + part_y)) * target_w + (x.to(tl.int64) * parts_w + part_x)
    tl.store(place_ptr + here, tl.where(live, place, -1))
    # In this order: see ``read_record``.
    tl.store(record, expert)
    tl.store(record + 1, to_y - from_y)
    tl.store(record + 2, to_x - from_x)
    tl.store(record + 3, spread_y)
    tl.store(record + 4, spread_x)
    tl.store(record + 5, tap_y + from_y * tap_step_y)
    tl.store(record + 6, tap_x + from_x * tap_step_x)
    tl.store(record + 7, tap_step_y)
    tl.store(record + 8, tap_step_x)
