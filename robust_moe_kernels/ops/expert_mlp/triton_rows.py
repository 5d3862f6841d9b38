"""The routed MLP's Triton products over rows sorted by expert: what they share, and the one without an epilogue.

A program is a tile, BLOCK_M rows of one expert and BLOCK_N columns. It finds its expert itself, from the offsets: one
vector of them and a few sums. A plan made beforehand, as the convolution's, would be read with as much latency.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import ceil_div, clamp

__all__ = ["count_tiles", "locate", "multiply", "place_of", "rows_kernel", "sample_of", "segments"]

_GROUP = tl.constexpr(3)
_HEIGHT = tl.constexpr(8)  # 2^3 tiles of rows share an expert's columns while those are in the cache


@triton.jit
def segments(offsets_ptr, experts, rows, LAST: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first row, end, tiles up to its last) of every expert, within the ``rows`` that there are: the host has not
    looked. LAST: the rows behind all experts are one expert more."""
    e = tl.arange(0, EXPERTS)
    begin = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
    if LAST:
        begin = tl.where(e == experts, tl.load(offsets_ptr + experts), begin)
        end = tl.where(e == experts, rows, end)
    begin = clamp(begin, 0, rows)
    end = clamp(end, begin, rows)
    tiles = ceil_div(end - begin, BLOCK_M).to(tl.int32)
    return begin.to(tl.int32), end.to(tl.int32), tl.cumsum(tiles, 0), tiles


@triton.jit
def count_tiles(offsets_ptr, experts, rows, LAST: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tiles of all experts."""
    _begin, _end, _ends, tiles = segments(offsets_ptr, experts, rows, LAST, EXPERTS, BLOCK_M)
    return tl.sum(tiles, 0)


@triton.jit
def locate(tile, offsets_ptr, experts, rows, LAST: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, the tile's first row, its expert's end), int64 each. Reads the offsets again: kept from tile to tile,
    they would take registers from what is done with the sums."""
    begin, end, ends, tiles = segments(offsets_ptr, experts, rows, LAST, EXPERTS, BLOCK_M)
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    mine = tl.arange(0, EXPERTS) == expert
    before = tl.sum(tl.where(mine, ends - tiles, 0), 0)
    first = tl.sum(tl.where(mine, begin, 0), 0).to(tl.int64) + (tile - before).to(tl.int64) * BLOCK_M
    return expert.to(tl.int64), first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def place_of(item, tiles, across):
    """(tile of rows, tile of columns) of an item: groups of tiles of rows, each column of a group after the other, so
    that what programs read at one time is few rows and few columns."""
    whole = across << _GROUP
    first = item // whole << _GROUP
    height = tl.minimum(tiles - first, _HEIGHT)
    inside = item % whole
    return first + inside % height, inside // height


@triton.jit
def sample_of(pair, pairs, top_k):
    """(the token of a pair, the pair, whether there is one): the host has not looked."""
    there = (pair >= 0) & (pair < pairs)
    pair = tl.where(there, pair, 0)
    return (pair.to(tl.int32) // top_k).to(tl.int64), pair, there


@triton.jit
def multiply(
    sums, gates,  # [BLOCK_M, BLOCK_N] float32, what is added to; gates only GATED
    source, row,  # [*, depth], and the rows that the lanes read; SOURCE_DESCRIPTOR: a descriptor, consecutive rows
    weight, expert, column,  # INNER: [E, columns, depth], else [E, depth, columns]; DESCRIPTOR: a descriptor of lines
    depth, columns,
    INNER: tl.constexpr, GATED: tl.constexpr, SOURCE_DESCRIPTOR: tl.constexpr, DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(sums + rows times an expert's matrix, gates + rows times the matrix that follows it); GATED: its two halves."""
    lane = tl.arange(0, BLOCK_K)
    n = column + tl.arange(0, BLOCK_N)
    lines = expert * (columns * (1 + GATED) if INNER else depth)
    if SOURCE_DESCRIPTOR:
        first = row.to(tl.int32)
    else:
        sources = source + (row.to(tl.int64) * depth)[:, None] + lane[None, :]
    if DESCRIPTOR:
        line, column = lines.to(tl.int32), column.to(tl.int32)
    elif INNER:
        filters, step = weight + ((lines + n) * depth)[None, :] + lane[:, None], expert * 0 + BLOCK_K
    else:
        filters, step = weight + ((lines + lane) * columns)[:, None] + n[None, :], (expert * 0 + BLOCK_K) * columns
    half = (expert * 0 + columns) * depth
    at = expert * 0
    for k in range(0, depth, BLOCK_K):
        if SOURCE_DESCRIPTOR:
            a = source.load([first, k])
        elif EVEN_K:
            a = tl.load(sources + k)
        else:
            a = tl.load(sources + k, mask=(lane < depth - k)[None, :], other=0.0)
        if DESCRIPTOR:
            if INNER:
                sums = tl.dot(a, weight.load([line + column, k]).T, sums, input_precision=PRECISION)
                if GATED:
                    b = weight.load([line + columns + column, k]).T
                    gates = tl.dot(a, b, gates, input_precision=PRECISION)
            else:
                sums = tl.dot(a, weight.load([line + k, column]), sums, input_precision=PRECISION)
        else:
            mask = (lane < depth - k)[:, None] & (n < columns)[None, :]
            if EVEN_K and EVEN_N:
                b = tl.load(filters + at)
            else:
                b = tl.load(filters + at, mask=mask, other=0.0)
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
            if GATED:
                if EVEN_K and EVEN_N:
                    b = tl.load(filters + half + at)
                else:
                    b = tl.load(filters + half + at, mask=mask, other=0.0)
                gates = tl.dot(a, b, gates, input_precision=PRECISION)
            at += step
    return sums, gates


@triton.jit(do_not_specialize=("experts", "rows", "tiles"))
def rows_kernel(
    source_ptr,  # [rows, depth]; DESCRIPTOR: a descriptor, blocks [BLOCK_M, BLOCK_K]
    weight_ptr,  # INNER: [E, columns, depth], else [E, depth, columns]; DESCRIPTOR: a descriptor of its lines, blocks
    # [BLOCK_N, BLOCK_K], else [BLOCK_K, BLOCK_N]
    bias_ptr,  # [E, columns]; unused unless BIASED
    offsets_ptr,  # [E + 1] int64
    target_ptr,  # [rows, columns]
    experts, rows,
    tiles,  # the most there can be
    depth, columns,
    INNER: tl.constexpr, BIASED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every row times its expert's matrix; rows behind all experts are left alone."""
    across = ceil_div(columns, BLOCK_N)
    tiles = tl.minimum(count_tiles(offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M), tiles)
    item = tl.program_id(0)
    if item < tiles * across:
        tile, column = place_of(item, tiles, across)
        column = column.to(tl.int64) * BLOCK_N
        expert, first, stop = locate(tile, offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M)
        row = first.to(tl.int32) + tl.arange(0, BLOCK_M)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums, _ = multiply(
            sums, sums, source_ptr, first if DESCRIPTOR else tl.minimum(row, rows - 1), weight_ptr, expert, column,
            depth, columns, INNER, False, DESCRIPTOR, DESCRIPTOR, EVEN_K, EVEN_N, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        n = column + tl.arange(0, BLOCK_N)
        kept = (row < stop)[:, None]
        if not EVEN_N:
            kept = kept & (n < columns)[None, :]
        if BIASED:
            sums += tl.load(bias_ptr + expert * columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        place = target_ptr + row.to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(place, sums.to(target_ptr.dtype.element_ty), mask=kept)
