"""The grouped product's Triton kernels: target pixels from source pixels, tile by tile of a plan, tap by tap."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import ceil_div, clamp
from robust_moe_kernels.ops.expert_conv.plan_kernel import HALF, RECORD

__all__ = ["persistent_kernel", "pointer_kernel"]


@triton.jit
def _read_record(record, taps_h, taps_w, MIRROR: tl.constexpr):
    """(taps, their spread, the filter tap of the first, of the next one more), each of (y, x)."""
    taps_y, taps_x, spread_y, spread_x = (
        tl.load(record + 1), tl.load(record + 2), tl.load(record + 3), tl.load(record + 4),
    )  # fmt: skip
    tap_y, tap_x, tap_step_y, tap_step_x = (
        tl.load(record + 5), tl.load(record + 6), tl.load(record + 7), tl.load(record + 8),
    )  # fmt: skip
    if MIRROR:
        tap_y, tap_x, tap_step_y, tap_step_x = taps_h - 1 - tap_y, taps_w - 1 - tap_x, -tap_step_y, -tap_step_x
    return taps_y, taps_x, spread_y, spread_x, tap_y, tap_x, tap_step_y, tap_step_x


@triton.jit
def _no_sums(row_ptr, sample_ptr, lanes, maps, GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What sums begin from: 0, and NaN, which it stays, in the rows of a map that there is not: the host has not
    looked."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATHER:
        map_ = tl.load(sample_ptr + tl.load(row_ptr + lanes))
        sums = tl.where(((map_ >= 0) & (map_ < maps))[:, None], sums, float("nan"))
    return sums


@triton.jit(do_not_specialize=("maps", "source_h", "source_w", "taps_h", "taps_w"))
def pointer_kernel(
    source_ptr,  # [*, source_h, source_w, depth]: forward the input, backward the output's gradient
    weight_ptr,  # [E, taps_h, taps_w, I, O]
    target_ptr,  # [R, target_h, target_w, columns]
    record_ptr, row_ptr, spot_ptr, place_ptr,  # from plan_kernel, expert by expert
    sample_ptr,  # [R] int64: the source map of a row; unused unless GATHER
    maps, source_h, source_w, taps_h, taps_w,
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
    taps_y, taps_x, spread_y, spread_x, tap_y, tap_x, tap_step_y, tap_step_x = _read_record(
        record, taps_h, taps_w, MIRROR
    )
    filter_x = (zero + depth) * columns
    filter_y = taps_w * filter_x
    tap = tap_y * filter_y + tap_x * filter_x

    lanes = number * BLOCK_M + tl.arange(0, BLOCK_M)
    map_ = tl.load(row_ptr + lanes).to(tl.int64)
    if GATHER:
        map_ = clamp(tl.load(sample_ptr + map_), 0, maps - 1)
    spot = tl.load(spot_ptr + lanes).to(tl.uint32, bitcast=True)
    near_y, near_x = (spot // (2 * HALF)).to(tl.int32) - HALF, (spot % (2 * HALF)).to(tl.int32) - HALF
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
    blocks = ceil_div(zero + depth, BLOCK_K)
    spare = (blocks - 1) * BLOCK_K
    source_tap = spread_x * depth - spare
    source_line = (spread_y * source_w - taps_x * spread_x) * depth
    filter_tap = tap_step_x * filter_x - spare * filter_k
    filter_line = tap_step_y * filter_y - taps_x * tap_step_x * filter_x
    source_at, filter_at, filter_block = zero, zero, zero + BLOCK_K * filter_k
    right, spread_y, spread_x = (taps_x * spread_x).to(tl.int32), spread_y.to(tl.int32), spread_x.to(tl.int32)
    dy, dx, k = right * 0, right * 0, right * 0
    sums = _no_sums(row_ptr, sample_ptr, lanes, maps, GATHER, BLOCK_M, BLOCK_N)
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


@triton.jit(do_not_specialize=("tiles", "multiprocessors", "maps", "source_h", "source_w", "taps_h", "taps_w"))
def persistent_kernel(
    source_ptr,  # [*, source_h, source_w, depth]: forward the input, backward the output's gradient
    weight_ptr,  # [E, taps_h, taps_w, I, O]; DESCRIPTOR: a descriptor of [E * taps_h * taps_w * I, O] whose block is
    # [BLOCK_K, BLOCK_N], backward [BLOCK_N, BLOCK_K]
    target_ptr,  # [R, target_h, target_w, columns]
    record_ptr, row_ptr, spot_ptr, mask_ptr, place_ptr,  # from plan_kernel, in the order of the ring
    sample_ptr,  # [R] int64: the source map of a row; unused unless GATHER
    tiles,  # records of the plan before the one that says how many there are
    multiprocessors,  # of the GPU; the number of programs is a multiple of it
    maps, source_h, source_w, taps_h, taps_w,
    depth,  # channels of a source pixel: I forward, O backward
    columns,  # channels of a target pixel
    FORWARD: tl.constexpr, GATHER: tl.constexpr,
    MIRROR: tl.constexpr,  # an input gradient by the plan of the forward product: taps count from the other end
    DESCRIPTOR: tl.constexpr,  # filters by tensor descriptor: depth is a multiple of BLOCK_K
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,  # depth and columns are multiples of the blocks: no masks
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: every so many-th item, a tile of the plan and BLOCK_N channels of it.

    Items are dealt in rounds, one to a multiprocessor, forwards and backwards in turn: the plan's tiles have fewer and
    fewer taps, so whoever had the longest of one round has the shortest of the next. Programs whose numbers agree
    modulo the multiprocessors are taken to share one, as GPUs are seen to deal them; results do not depend on it.
    """
    across = ceil_div(columns, BLOCK_N)
    items = tl.load(record_ptr + tiles.to(tl.int64) * RECORD) * across
    lane_m, lane_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    seats = multiprocessors.to(tl.int64)
    seat = tl.program_id(0) % seats
    for turn in range(tl.program_id(0) // seats, ceil_div(items, seats), tl.num_programs(0) // seats):
        item = turn * seats + tl.where(turn % 2 == 0, seat, seats - 1 - seat)
        if item < items:
            number, zero = item // across, item * 0
            record = record_ptr + number * RECORD
            expert = tl.load(record)
            taps_y, taps_x, spread_y, spread_x, tap_y, tap_x, tap_step_y, tap_step_x = _read_record(
                record, taps_h, taps_w, MIRROR
            )
            lanes = number * BLOCK_M + lane_m
            mask = tl.load(mask_ptr + lanes)
            map_ = tl.load(row_ptr + lanes).to(tl.int64)
            if GATHER:
                map_ = clamp(tl.load(sample_ptr + map_), 0, maps - 1)
            sources = source_ptr + (map_ * ((zero + source_h) * source_w) + tl.load(spot_ptr + lanes)) * depth
            sources = sources[:, None] + lane_k[None, :]
            column = (item % across) * BLOCK_N
            n = column + tl.arange(0, BLOCK_N)
            # A filter's place: by descriptor its line of the matrix, else its element.
            taps = expert * taps_h * taps_w + tap_y * taps_w + tap_x
            lines = taps * (depth if FORWARD else columns)
            if DESCRIPTOR:
                filter_at, filter_block, unit = lines.to(tl.int32), zero, zero + (depth if FORWARD else columns)
            elif FORWARD:
                filters = weight_ptr + (lines * columns + n)[None, :] + (lane_k.to(tl.int64) * columns)[:, None]
                filter_at, filter_block, unit = zero, (zero + BLOCK_K) * columns, (zero + depth) * columns
            else:
                filters = weight_ptr + (lines * depth + n * depth)[None, :] + lane_k[:, None]
                filter_at, filter_block, unit = zero, zero + BLOCK_K, (zero + depth) * columns
            # One loop over (tap, block of channels), so that loads run ahead across taps. Offsets only grow by steps
            # that are known before it: products in the loop would cost registers.
            blocks = ceil_div(zero + depth, BLOCK_K)
            spare = (blocks - 1) * BLOCK_K
            source_tap = spread_x * depth - spare
            source_line = (spread_y * source_w - taps_x * spread_x) * depth
            filter_tap = (tap_step_x * unit - (blocks - 1) * filter_block).to(filter_at.dtype)
            filter_line = ((tap_step_y * taps_w - taps_x * tap_step_x) * unit).to(filter_at.dtype)
            source_at, k = zero, zero.to(tl.int32)
            bit_x, end_x, bit_y = k + 1, (1 << taps_x).to(tl.int32), k + (1 << 16)
            sums = _no_sums(row_ptr, sample_ptr, lanes, maps, GATHER, BLOCK_M, BLOCK_N)
            for _ in range((taps_y * taps_x * blocks).to(tl.int32)):
                bits = bit_x | bit_y
                inside = ((mask & bits) == bits)[:, None]
                if not EVEN_K:
                    inside = inside & (lane_k < depth - k)[None, :]
                a = tl.load(sources + source_at, mask=inside, other=0.0)
                if DESCRIPTOR:
                    if FORWARD:
                        b = weight_ptr.load([filter_at + k, column.to(tl.int32)])
                    else:
                        b = weight_ptr.load([filter_at + column.to(tl.int32), k]).T
                else:
                    if EVEN_K and EVEN_N:
                        b = tl.load(filters + filter_at)
                    elif EVEN_N:
                        b = tl.load(filters + filter_at, mask=(lane_k < depth - k)[:, None], other=0.0)
                    elif EVEN_K:
                        b = tl.load(filters + filter_at, mask=(n < columns)[None, :], other=0.0)
                    else:
                        b = tl.load(
                            filters + filter_at, mask=(lane_k < depth - k)[:, None] & (n < columns)[None, :], other=0.0
                        )
                sums = tl.dot(a, b, sums, input_precision=PRECISION)
                k += BLOCK_K
                next_tap = k >= depth
                k = tl.where(next_tap, 0, k)
                bit_x = tl.where(next_tap, bit_x << 1, bit_x)
                next_line = bit_x == end_x
                bit_x = tl.where(next_line, 1, bit_x)
                bit_y = tl.where(next_line, bit_y << 1, bit_y)
                source_at += tl.where(next_tap, source_tap, BLOCK_K) + tl.where(next_line, source_line, 0)
                filter_at += tl.where(next_tap, filter_tap, filter_block.to(filter_at.dtype))
                filter_at += tl.where(next_line, filter_line, 0)
            place = tl.load(place_ptr + lanes)
            target = target_ptr + place[:, None] * columns + n[None, :]
            kept = (place >= 0)[:, None]
            if not EVEN_N:
                kept = kept & (n < columns)[None, :]
            tl.store(target, sums.to(target_ptr.dtype.element_ty), mask=kept)
