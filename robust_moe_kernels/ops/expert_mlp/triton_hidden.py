"""The routed MLP's Triton products around its activation: rows to pre-activations and activations, and back.

A tile's sums are worked on piece by piece of its columns: whole, 128x256 spills hundreds of bytes, and 128x128 does not
leave room for a second program on its multiprocessor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import ceil_div
from robust_moe_kernels.ops.expert_mlp.triton_activations import activated, activated_and_slope
from robust_moe_kernels.ops.expert_mlp.triton_rows import count_tiles, locate, multiply, place_of, sample_of

__all__ = ["hidden_backward_kernel", "hidden_kernel"]


@triton.jit
def _halves(sums):
    """The left and the right half of a tile's columns, which are worked on one after the other: half the registers."""
    return tl.reshape(sums, (sums.shape[0], 2, sums.shape[1] // 2)).permute(0, 2, 1).split()


@triton.jit
def _hidden_piece(
    sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, column, columns,
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
        mask = n < columns
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
    sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, column, columns,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, EVEN_N: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``_hidden_piece`` of every piece of a tile."""
    if PIECES == 1:
        _hidden_piece(
            sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, column, columns,
            FUNCTION, GATED, BIASED, EVEN_N, BLOCK_N,
        )  # fmt: skip
    else:
        half: tl.constexpr = BLOCK_N // 2
        rest: tl.constexpr = PIECES // 2
        low, high = _halves(sums)
        low_gates, high_gates = _halves(gates)
        _store_hidden(
            low, low_gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, column, columns,
            FUNCTION, GATED, BIASED, EVEN_N, rest, half,
        )  # fmt: skip
        _store_hidden(
            high, high_gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, column + half, columns,
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
        tile, column = place_of(item, tiles, across)
        column = column.to(tl.int64) * BLOCK_N
        expert, first, stop = locate(tile, offsets_ptr, experts, rows, True, EXPERTS, BLOCK_M)
        row = first.to(tl.int32) + tl.arange(0, BLOCK_M)
        if expert < experts:
            sample, _, there = sample_of(tl.load(order_ptr + tl.minimum(row, pairs - 1)), pairs, top_k)
            sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            sums = tl.where(there[:, None], sums, float("nan"))
            gates = sums
            sums, gates = multiply(
                sums, gates, x_ptr, sample, weight_ptr, expert, column, depth, columns,
                True, GATED, False, DESCRIPTOR, EVEN_K, EVEN_N, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _store_hidden(
                sums, gates, z_ptr, a_ptr, bias_ptr, row, stop, expert, column, columns,
                FUNCTION, GATED, BIASED, EVEN_N, PIECES, BLOCK_N,
            )  # fmt: skip
        else:
            n = column + tl.arange(0, BLOCK_N)
            place = z_ptr + row.to(tl.int64)[:, None] * (columns * (1 + GATED)) + n[None, :]
            mask = (row < stop)[:, None] & (n < columns)[None, :]
            nothing = tl.zeros((BLOCK_M, BLOCK_N), z_ptr.dtype.element_ty)
            tl.store(place, nothing, mask=mask)
            if GATED:
                tl.store(place + columns, nothing, mask=mask)


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
        tile, part = place_of(item, tiles, across)
        column = part.to(tl.int64) * BLOCK_N
        expert, first, stop = locate(tile, offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M)
        row = first.to(tl.int32) + tl.arange(0, BLOCK_M)
        sample, pair, there = sample_of(tl.load(order_ptr + tl.minimum(row, pairs - 1)), pairs, top_k)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        sums = tl.where(there[:, None], sums, float("nan"))
        sums, _ = multiply(
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
