"""The Triton kernel of the routed MLP's two weight gradients: each expert's matrix, summed over its rows."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.expert_conv.plan_geometry import ceil_div, clamp, segment

__all__ = ["matrix_kernel"]


@triton.jit
def _lines(data_ptr, line, n, width, live, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """[lines, columns] of a matrix; MASKED: lines that are not live are 0."""
    place = data_ptr + line.to(tl.int64)[:, None] * width + n[None, :]
    if MASKED and EVEN:
        return tl.load(place, mask=live[:, None], other=0.0)
    if MASKED:
        return tl.load(place, mask=live[:, None] & (n < width)[None, :], other=0.0)
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=(n < width)[None, :], other=0.0)


@triton.jit
def _token(order_ptr, row, pairs, TOP_K: tl.constexpr):
    """The tokens of rows, or some token for rows that there are not."""
    pair = tl.load(order_ptr + tl.minimum(row, pairs - 1))
    return clamp(pair, 0, pairs - 1).to(tl.int32) // TOP_K


@triton.jit
def _all_there(order_ptr, start, stop, pairs, BLOCK: tl.constexpr):
    """Whether the pairs of rows are pairs that there are: the host has not looked."""
    lane = tl.arange(0, BLOCK)
    missing = tl.zeros((BLOCK,), tl.int32)
    for row in range(start, stop, BLOCK):
        pair = tl.load(order_ptr + row + lane, mask=row + lane < stop, other=0)
        missing += ((pair < 0) | (pair >= pairs)).to(tl.int32)
    return tl.sum(missing, 0) == 0


@triton.jit(do_not_specialize=("splits", "experts", "pairs", "rows"))
def matrix_kernel(
    left_ptr,  # GATHER_LEFT: [N, height], else [rows, height]
    right_ptr,  # GATHER_LEFT: [rows, width], else [N, width]
    block_ptr,  # DESCRIPTOR: a descriptor of what is not gathered, blocks [BLOCK_K, BLOCK_N], else [BLOCK_K, BLOCK_M]
    order_ptr,  # [pairs] int64
    offsets_ptr,  # [E + 1] int64
    target_ptr,  # [splits, E, height, width]
    splits, experts, pairs, rows, height, width,
    TOP_K: tl.constexpr,  # a constant: the loop divides by it
    GATHER_LEFT: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one expert's matrix, the sum over a share of its rows of left^T right.

    Experts alternate fastest, so that the rows of a large one are not left to the last programs. A row's token is read
    an iteration ahead and carried, so that the loads of an iteration depend on no other load of it. Only the last
    block of rows is masked, which a descriptor could not.
    """
    expert = (tl.program_id(0) % experts).to(tl.int64)
    split = (tl.program_id(0) // experts % splits).to(tl.int64)
    tile = tl.program_id(0) // experts // splits
    across = ceil_div(width, BLOCK_N)
    column_m, column_n = (tile // across).to(tl.int64) * BLOCK_M, (tile % across).to(tl.int64) * BLOCK_N
    m, n = column_m + tl.arange(0, BLOCK_M), column_n + tl.arange(0, BLOCK_N)
    begin, count = segment(offsets_ptr, expert, rows)
    share = ceil_div(ceil_div(count, BLOCK_K), splits) * BLOCK_K
    start = (begin + tl.minimum(split * share, count)).to(tl.int32)
    stop = (begin + tl.minimum((split + 1) * share, count)).to(tl.int32)
    whole = stop - (stop - start) % BLOCK_K
    lane = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums = tl.where(_all_there(order_ptr, start, stop, pairs, 1024), sums, float("nan"))  # NaN stays NaN
    token = _token(order_ptr, start + lane, pairs, TOP_K)
    for row in range(start, whole, BLOCK_K):
        if not DESCRIPTOR:
            a = _lines(left_ptr, token if GATHER_LEFT else row + lane, m, height, lane, False, EVEN_M)
            b = _lines(right_ptr, row + lane if GATHER_LEFT else token, n, width, lane, False, EVEN_N)
        elif GATHER_LEFT:
            a = _lines(left_ptr, token, m, height, lane, False, EVEN_M)
            b = block_ptr.load([row, column_n.to(tl.int32)])
        else:
            a = block_ptr.load([row, column_m.to(tl.int32)])
            b = _lines(right_ptr, token, n, width, lane, False, EVEN_N)
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
        token = _token(order_ptr, row + BLOCK_K + lane, pairs, TOP_K)
    if whole < stop:
        live = whole + lane < stop
        a = _lines(left_ptr, token if GATHER_LEFT else whole + lane, m, height, live, True, EVEN_M)
        b = _lines(right_ptr, whole + lane if GATHER_LEFT else token, n, width, live, True, EVEN_N)
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
    place = target_ptr + ((split * experts + expert) * height + m)[:, None] * width + n[None, :]
    tl.store(place, sums.to(target_ptr.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])
