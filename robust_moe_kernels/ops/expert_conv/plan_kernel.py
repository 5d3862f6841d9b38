"""The Triton kernel that plans a grouped product: which pixels each of its tiles reads and writes, tiles in order.

A tile is BLOCK_M (pixel, row) pairs of one expert. What its taps are is arithmetic on the geometry; where it comes
among all tiles is a closed form over the experts' numbers of rows, which every program of the plan works out for
itself, so that the host knows nothing and no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import axis, ceil_div, clamp, window
from robust_moe_kernels.ops.expert_conv.plan_order import around, before_part, inner_first, rank_of

__all__ = ["GEOMETRY", "HALF", "RECORD", "plan_kernel"]


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

GEOMETRY = (
    "in_h", "in_w", "out_h", "out_w", "taps_h", "taps_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h",
    "dilation_w",
)  # fmt: skip


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=("experts", "limit", "tiles", *GEOMETRY))
def plan_kernel(
    offsets_ptr,  # [E + 1] int64
    record_ptr,  # [parts * tiles + 1, RECORD] int64
    row_ptr,  # [parts * tiles, BLOCK_M] int32: the row
    spot_ptr,  # the same shape, int32: source pixel of the tile's first tap, which may lie outside of the map; RING:
    # its number in the map; else its line and column, each + 2^15
    mask_ptr,  # the same shape, int32; RING: which of the tile's taps reach data, columns from bit 0, lines from bit 16
    place_ptr,  # the same shape, int64: pixel to write, over all target maps; -1 for none
    experts,
    limit,  # rows; offsets that do not rise from 0 to it are brought to rise within it, as the host has not looked
    tiles,
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
    e = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    begins = tl.associative_scan(clamp(begins, 0, limit), 0, _larger)
    ends = clamp(tl.load(offsets_ptr + e + 1, mask=e < experts, other=0), begins, limit)
    counts = tl.where(e < experts, tl.associative_scan(ends, 0, _larger) - begins, 0)
    if RING:  # before all that a tile of this part needs, which would wait in registers
        before, total = before_part(
            counts, part, parts_w, target_h, target_w, source_h, source_w, taps_h, taps_w, stride_h,
            stride_w, pad_h, pad_w, dilation_h, dilation_w, FORWARD, TAPS, BLOCK_M,
        )  # fmt: skip
        if (part == 0) & (tl.program_id(0) == 0):
            tl.store(record_ptr + tl.num_programs(1).to(tl.int64) * tiles * RECORD, total)
    places_y, step_y, first_y, spread_y, count_y, tap_y, tap_step_y, low_y, inner_y = axis(
        part_y, target_h, source_h, taps_h, stride_h, pad_h, dilation_h, FORWARD, TAPS
    )
    places_x, step_x, first_x, spread_x, count_x, tap_x, tap_step_x, low_x, inner_x = axis(
        part_x, target_w, source_w, taps_w, stride_w, pad_w, dilation_w, FORWARD, TAPS
    )
    number = part.to(tl.int64) * tiles + tl.program_id(0)
    pixels = places_y * places_x
    expert, begin, rows, tile = _locate(counts, begins, tl.program_id(0), pixels, EXPERTS, BLOCK_M)
    if RING:
        number = before + rank_of(
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
        y, x = around(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x)
    else:
        y, x = inner_first(pixel, places_y, places_x, low_y, inner_y, low_x, inner_x)
    from_y, to_y = window(tl.min(y, 0), tl.max(y, 0), step_y, first_y, spread_y, count_y, source_h)
    from_x, to_x = window(tl.min(x, 0), tl.max(x, 0), step_x, first_x, spread_x, count_x, source_w)
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
