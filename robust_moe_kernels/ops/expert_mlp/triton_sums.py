"""The routed MLP's Triton kernels without products: sums over a token's pairs, over a pair's columns, over a tile's
rows and over an expert's tiles, each in one order. Compiled without multiply-add contraction."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_mlp.triton_rows import count_tiles, locate, sample_of, segments

__all__ = [
    "SUMS", "SUMS_OPTIONS", "TILE_ROWS", "combine_kernel", "inner_kernel", "tile_sums_kernel", "weighted_sums_kernel",
]  # fmt: skip

SUMS = {"BLOCK_P": 8, "BLOCK_C": 128}  # 8 elements a thread, 16-byte loads of 16 bits; 384 columns are whole blocks
SUMS_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
TILE_ROWS = 64  # of a tile of ``weighted_sums_kernel``


@triton.jit
def _computed(offsets_ptr, experts, rows):
    """Rows of all experts; the pairs behind them are dropped."""
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + experts), 0), rows)


@triton.jit(do_not_specialize=("top_k", "tokens", "experts", "rows"))
def combine_kernel(
    rows_ptr,  # [rows, size]
    inverse_ptr,  # [tokens * top_k] int64
    offsets_ptr,  # [E + 1] int64
    weights_ptr,  # [tokens, top_k] float32; unused unless WEIGHTED
    out_ptr,  # [tokens, size]
    size, top_k, tokens, experts, rows,
    WEIGHTED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C columns of BLOCK_P tokens, the rows of each added in slot order; dropped ones are 0."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (token < tokens)[:, None] & (column < size)[None, :]
    computed = _computed(offsets_ptr, experts, rows)
    pairs = tokens.to(tl.int64) * top_k
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for j in range(top_k):
        pair = token * top_k + j
        row = tl.load(inverse_ptr + pair, mask=token < tokens, other=0)
        there = (row >= 0) & (row < pairs)  # the host has not looked: what is not there is NaN
        kept = there & (row < computed)
        place = tl.where(kept, row, 0)[:, None] * size + column[None, :]
        term = tl.load(rows_ptr + place, mask=mask & kept[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            term = tl.load(weights_ptr + pair, mask=token < tokens, other=0.0)[:, None] * term
        term = tl.where(kept[:, None], term, tl.where(there, 0.0, float("nan"))[:, None])
        total = tl.where(j == 0, term, total + term)  # not 0 + term: -0.0 stays -0.0, as in the reference
    tl.store(out_ptr + token[:, None] * size + column[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expert_of(offsets_ptr, row, experts, EXPERTS: tl.constexpr):
    """The experts [BLOCK] that rows belong to."""
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
    expert = tl.sum(((ends[None, :] <= row[:, None]) & (e < experts)[None, :]).to(tl.int32), 1)
    return tl.minimum(expert, experts - 1).to(tl.int64)


@triton.jit(do_not_specialize=("parts", "top_k", "pairs", "experts", "rows"))
def inner_kernel(
    inner_ptr,  # [parts, rows] float32, shares of <u, a> by row
    d_y_ptr,  # [N, size]; unused unless BIASED
    bias_ptr,  # [E, size]; unused unless BIASED
    inverse_ptr,  # [pairs] int64
    offsets_ptr,  # [E + 1] int64
    d_weights_ptr,  # [pairs] float32
    parts, size, top_k, pairs, experts, rows,
    BIASED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pairs; the gradient of a pair's weight is <u, a> + <d_y, its expert's bias>."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = pair < pairs
    row = tl.load(inverse_ptr + pair, mask=mask, other=0)
    there = (row >= 0) & (row < pairs)
    kept = mask & there & (row < _computed(offsets_ptr, experts, rows))
    row = tl.where(kept, row, 0)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for part in range(parts):
        total += tl.load(inner_ptr + tl.cast(part, tl.int64) * rows + row, mask=kept, other=0.0)
    if BIASED:
        token, expert = pair // top_k, _expert_of(offsets_ptr, row, experts, EXPERTS)
        products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for first in range(0, size, BLOCK_C):
            column = first + tl.arange(0, BLOCK_C)
            inside = kept[:, None] & (column < size)[None, :]
            d = tl.load(d_y_ptr + token[:, None] * size + column[None, :], mask=inside, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + expert[:, None] * size + column[None, :], mask=inside, other=0.0)
            products += d * bias.to(tl.float32)
        total += tl.sum(products, 1)
    total = tl.where(kept, total, tl.where(there, 0.0, float("nan")))
    tl.store(d_weights_ptr + pair, total, mask=mask)


@triton.jit(do_not_specialize=("top_k", "experts", "pairs", "rows", "tiles"))
def weighted_sums_kernel(
    d_y_ptr,  # [N, size]
    weights_ptr,  # [pairs] float32
    order_ptr,  # [pairs] int64
    offsets_ptr,  # [E + 1] int64
    sums_ptr,  # [tiles, size] float32
    size, top_k, experts, pairs, rows,
    tiles,  # the most there can be
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C columns of one tile, the sum over its BLOCK_M rows of weight * d_y."""
    tile = tl.program_id(0)
    if tile < tl.minimum(count_tiles(offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M), tiles):
        _expert, first, stop = locate(tile, offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M)
        column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for start in range(0, BLOCK_M, BLOCK_P):
            row = first + start + tl.arange(0, BLOCK_P)
            here = row < stop
            sample, pair, there = sample_of(tl.load(order_ptr + row, mask=here, other=0), pairs, top_k)
            mask = here[:, None] & (column < size)[None, :]
            d = tl.load(d_y_ptr + sample[:, None] * size + column[None, :], mask=mask, other=0.0).to(tl.float32)
            weight = tl.where(there, tl.load(weights_ptr + pair, mask=here, other=0.0), float("nan"))
            total += weight[:, None] * d
        place = sums_ptr + tl.cast(tile, tl.int64) * size + column
        tl.store(place, tl.sum(total, 0), mask=column < size)


@triton.jit(do_not_specialize=("experts", "rows", "tiles"))
def tile_sums_kernel(
    sums_ptr,  # [tiles, width] float32
    offsets_ptr,  # [E + 1] int64
    out_ptr,  # [E, width]
    experts, rows,
    tiles,  # the most there can be
    width,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C columns of one expert, its tiles' sums added in float64."""
    expert = tl.program_id(0)
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    _begin, _end, ends, counts = segments(offsets_ptr, experts, rows, False, EXPERTS, BLOCK_M)
    mine = tl.arange(0, EXPERTS) == expert
    last = tl.minimum(tl.sum(tl.where(mine, ends, 0), 0), tiles)
    first = tl.minimum(tl.sum(tl.where(mine, ends - counts, 0), 0), tiles)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < last)[:, None] & (column < width)[None, :]
        place = sums_ptr + tile.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(place, mask=mask, other=0.0).to(tl.float64)
    place = out_ptr + tl.cast(expert, tl.int64) * width + column
    tl.store(place, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < width)
