"""The routed MLP's Triton products over rows sorted by expert: each kernel's programs stay and take tile after tile.

A tile is BLOCK_M rows of one expert and BLOCK_N columns. Its expert is found by the program itself, from the offsets:
one vector of them and two sums a tile. A plan made beforehand (as the convolution's) is read with as much latency.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import ceil_div, clamp
from robust_moe_kernels.ops.expert_mlp.triton_activations import activated, activated_and_slope

__all__ = ["hidden_backward_kernel", "hidden_kernel", "locate", "rows_kernel", "sample_of", "segments"]

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
def _place(item, tiles, across):
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
def _multiply(
    sums, gates,  # [BLOCK_M, BLOCK_N] float32, what is added to; gates only GATED
    source, row,  # [*, depth], and the rows that the lanes read; SOURCE_DESCRIPTOR: a descriptor, consecutive rows
    weight, expert, column,  # INNER: [E, columns, depth], else [E, depth, columns]; DESCRIPTOR: a descriptor of its lines
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


@triton.jit
def _halves(sums):
    """The left and the right half of a tile's columns, which are worked on one after the other: half the registers."""
    return tl.reshape(sums, (sums.shape[0], 2, sums.shape[1] // 2)).permute(0, 2, 1).split()


@triton.jit
def _hidden_piece(
    sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, some, column, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes z and a of BLOCK_N columns."""
    width = columns * (1 + GATED)
    n = column + tl.arange(0, BLOCK_N)
    kept = (row < stop)[:, None]
    if not EVEN_N:
        kept = kept & (n < columns)[None, :]
    place = row.to(tl.int64)[:, None] * width + n[None, :]
    if BIASED:
        mask = (n < columns) & some
        bias = bias_ptr + expert * width + n
        sums += tl.load(bias, mask=mask, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gates += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    z = sums.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + place, z, mask=kept)
    a = activated(z.to(tl.float32), FUNCTION)
    if GATED:
        z = gates.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + place + columns, z, mask=kept)
        a *= z.to(tl.float32)
    tl.store(a_ptr + row.to(tl.int64)[:, None] * columns + n[None, :], a.to(a_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _store_hidden(
    sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, some, column, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, EVEN_N: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``_hidden_piece`` of every piece of a tile."""
    if PIECES == 1:
        _hidden_piece(
            sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, some, column, columns,
            FUNCTION, GATED, BIASED, EVEN_N, BLOCK_N,
        )  # fmt: skip
    else:
        half: tl.constexpr = BLOCK_N // 2
        rest: tl.constexpr = PIECES // 2
        low, high = _halves(sums)
        low_gates, high_gates = _halves(gates)
        _store_hidden(
            low, low_gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, some, column, columns,
            FUNCTION, GATED, BIASED, EVEN_N, rest, half,
        )  # fmt: skip
        _store_hidden(
            high, high_gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, some, column + half, columns,
            FUNCTION, GATED, BIASED, EVEN_N, rest, half,
        )  # fmt: skip


@triton.jit(do_not_specialize=("experts", "pairs", "rows", "tiles", "top_k"))
def hidden_kernel(
    x_ptr,  # [N, depth]
    weight_ptr,  # [E, width, depth]; DESCRIPTOR: a descriptor of [E * width, depth], blocks [BLOCK_N, BLOCK_K]
    bias_ptr,  # [E, width]; unused unless BIASED
    order_ptr,  # [pairs] int64
    offsets_ptr,  # [E + 1] int64
    z_ptr,  # [rows, width], width = columns or, GATED, twice as many
    a_ptr,  # [rows, columns]
    experts, pairs, rows,
    tiles,  # the most there can be
    top_k, depth, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pre-activations z and activations a of the rows; z of rows behind all experts is 0. The activation is that of z
    as it is stored, which a backward computes again."""
    across = ceil_div(columns, BLOCK_N)
    tiles = tl.minimum(count_tiles(offsets_ptr, experts, rows, True, EXPERTS, BLOCK_M), tiles)
    item = tl.program_id(0)
    if item < tiles * across:
        tile, column = _place(item, tiles, across)
        column = column.to(tl.int64) * BLOCK_N
        expert, first, stop = locate(tile, offsets_ptr, experts, rows, True, EXPERTS, BLOCK_M)
        row = first.to(tl.int32) + tl.arange(0, BLOCK_M)
        sample, _, there = sample_of(tl.load(order_ptr + tl.minimum(row, pairs - 1)), pairs, top_k)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.where(there[:, None], sums, float("nan"))
        gates = sums
        some = expert < experts
        sums, gates = _multiply(
            sums, gates, x_ptr, sample, weight_ptr, expert, column, tl.where(some, depth, 0), columns,
            True, GATED, False, DESCRIPTOR, EVEN_K, EVEN_N, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_hidden(
            sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, some, column, columns,
            FUNCTION, GATED, BIASED, EVEN_N, PIECES, BLOCK_N,
        )  # fmt: skip


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
        tile, column = _place(item, tiles, across)
        column = column.to(tl.int64) * BLOCK_N
        expert, first, stop = locate(tile, offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M)
        row = first.to(tl.int32) + tl.arange(0, BLOCK_M)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums, _ = _multiply(
            sums, sums, source_ptr, first if DESCRIPTOR else tl.minimum(row, rows - 1), weight_ptr, expert, column,
            depth, columns, INNER, False, DESCRIPTOR, DESCRIPTOR, EVEN_K, EVEN_N, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        n = column + tl.arange(0, BLOCK_N)
        kept = (row < stop)[:, None]
        if not EVEN_N:
            kept = kept & (n < columns)[None, :]
        if BIASED:
            sums += tl.load(bias_ptr + expert * columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(target_ptr + row.to(tl.int64)[:, None] * columns + n[None, :], sums.to(target_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _backward_piece(
    sums, inner, z_ptr, d_z_ptr, a_ptr, bias_ptr, weight, row, stop, tile, column, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, D_Z: tl.constexpr, D_BIAS: tl.constexpr, D_WEIGHT: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of z and the weighted a of BLOCK_N columns; (sums * a) + inner."""
    width = columns * (1 + GATED)
    n = column + tl.arange(0, BLOCK_N)
    here = (row < stop)[:, None]
    kept = here
    if not EVEN_N:
        kept = kept & (n < columns)[None, :]
    place = row.to(tl.int64)[:, None] * width + n[None, :]
    z = tl.load(z_ptr + place, mask=kept, other=0.0).to(tl.float32)
    a, slope = activated_and_slope(z, FUNCTION)
    u = sums * weight[:, None]
    if GATED:
        value = tl.load(z_ptr + place + columns, mask=kept, other=0.0).to(tl.float32)
        slope *= value
        if D_Z:
            d = u * a
            tl.store(d_z_ptr + place + columns, d.to(d_z_ptr.dtype.element_ty), mask=kept)
            if D_BIAS:
                bias = bias_ptr + tile * width + columns + n
                tl.store(bias, tl.sum(tl.where(here, d, 0.0), 0), mask=n < columns)
        a *= value
    if D_Z:
        d = u * slope
        tl.store(d_z_ptr + place, d.to(d_z_ptr.dtype.element_ty), mask=kept)
        if D_BIAS:
            tl.store(bias_ptr + tile * width + n, tl.sum(tl.where(here, d, 0.0), 0), mask=n < columns)
    if D_WEIGHT:
        weighted = (weight[:, None] * a).to(a_ptr.dtype.element_ty)
        tl.store(a_ptr + row.to(tl.int64)[:, None] * columns + n[None, :], weighted, mask=kept)
    return inner + sums * a


@triton.jit
def _store_backward(
    sums, inner, z_ptr, d_z_ptr, a_ptr, bias_ptr, weight, row, stop, tile, column, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, D_Z: tl.constexpr, D_BIAS: tl.constexpr, D_WEIGHT: tl.constexpr,
    EVEN_N: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``_backward_piece`` of every piece of a tile, whose columns add up in ``inner``."""
    if PIECES == 1:
        inner = _backward_piece(
            sums, inner, z_ptr, d_z_ptr, a_ptr, bias_ptr, weight, row, stop, tile, column, columns,
            FUNCTION, GATED, D_Z, D_BIAS, D_WEIGHT, EVEN_N, BLOCK_N,
        )  # fmt: skip
    else:
        half: tl.constexpr = BLOCK_N // 2
        rest: tl.constexpr = PIECES // 2
        low, high = _halves(sums)
        inner = _store_backward(
            low, inner, z_ptr, d_z_ptr, a_ptr, bias_ptr, weight, row, stop, tile, column, columns,
            FUNCTION, GATED, D_Z, D_BIAS, D_WEIGHT, EVEN_N, rest, half,
        )  # fmt: skip
        inner = _store_backward(
            high, inner, z_ptr, d_z_ptr, a_ptr, bias_ptr, weight, row, stop, tile, column + half, columns,
            FUNCTION, GATED, D_Z, D_BIAS, D_WEIGHT, EVEN_N, rest, half,
        )  # fmt: skip
    return inner


@triton.jit(do_not_specialize=("experts", "pairs", "rows", "tiles", "top_k"))
def hidden_backward_kernel(
    d_y_ptr,  # [N, depth]
    weight_ptr,  # [E, depth, columns]; DESCRIPTOR: a descriptor of [E * depth, columns], blocks [BLOCK_K, BLOCK_N]
    z_ptr,  # [rows, width], width = columns or, GATED, twice as many
    weights_ptr,  # [pairs] float32
    order_ptr,  # [pairs] int64
    offsets_ptr,  # [E + 1] int64
    d_z_ptr,  # [rows, width]; unused unless D_Z
    a_ptr,  # [rows, columns], activations times weights; unused unless D_WEIGHT
    bias_ptr,  # [tiles, width] float32, each tile's column sums of d_z; unused unless D_BIAS
    inner_ptr,  # [tiles of columns, rows] float32, each tile's <u, a> by row; unused unless D_INNER
    experts, pairs, rows,
    tiles,  # the most there can be
    top_k, depth, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr,
    D_Z: tl.constexpr, D_BIAS: tl.constexpr, D_WEIGHT: tl.constexpr, D_INNER: tl.constexpr, DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With u = the row's token's d_y times the expert's second matrix: d_z = weight * u * the activation's derivative,
    and what other gradients need of a tile while it is here."""
    across = ceil_div(columns, BLOCK_N)
    tiles = tl.minimum(count_tiles(offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M), tiles)
    item = tl.program_id(0)
    if item < tiles * across:
        tile, part = _place(item, tiles, across)
        column = part.to(tl.int64) * BLOCK_N
        expert, first, stop = locate(tile, offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M)
        row = first.to(tl.int32) + tl.arange(0, BLOCK_M)
        sample, pair, there = sample_of(tl.load(order_ptr + tl.minimum(row, pairs - 1)), pairs, top_k)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.where(there[:, None], sums, float("nan"))
        sums, _ = _multiply(
            sums, sums, d_y_ptr, sample, weight_ptr, expert, column, depth, columns,
            False, False, False, DESCRIPTOR, EVEN_K, EVEN_N, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        inner = _store_backward(
            sums, tl.zeros((BLOCK_M, BLOCK_N // PIECES), tl.float32), z_ptr, d_z_ptr, a_ptr, bias_ptr,
            tl.load(weights_ptr + pair), row, stop, tile.to(tl.int64), column, columns,
            FUNCTION, GATED, D_Z, D_BIAS, D_WEIGHT, EVEN_N, PIECES, BLOCK_N,
        )  # fmt: skip
        if D_INNER:
            tl.store(inner_ptr + part.to(tl.int64) * rows + row, tl.sum(inner, 1), mask=row < stop)
