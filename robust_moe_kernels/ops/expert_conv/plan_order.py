"""Orders of a plan: of the pixels within an expert, and of the tiles over all experts and classes of pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import axis, ceil_div, clamp

__all__ = ["around", "before_part", "inner_first", "rank_of"]


@triton.jit
def inner_first(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x):
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
def around(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x):
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
            before += clamp(tile - first, 0, count)
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
def rank_of(rows, expert, tile, places_y, places_x, low_y, inner_y, low_x, inner_x, EXPERTS: tl.constexpr,
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
def before_part(
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
    y = axis(part // parts_w, target_h, source_h, taps_h, stride_h, pad_h, dilation_h, FORWARD, TAPS)
    x = axis(part % parts_w, target_w, source_w, taps_w, stride_w, pad_w, dilation_w, FORWARD, TAPS)
    return y[4] * x[4], y[0] * x[0]
