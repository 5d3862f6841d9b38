"""The Triton kernel of the routing sort. What one program does is a function: the gate's last kernel calls it too."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["SORT_BLOCK", "sort_kernel", "sort_program"]

SORT_BLOCK = 1024  # pairs read at once


@triton.jit
def _bins(experts_ptr, pair, pairs, num_experts):
    """The expert of each pair; num_experts for one out of range, num_experts + 1 past the end."""
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=0)
    # In 64 bits: an expert out of range may be any number.
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)
    return tl.where(pair < pairs, expert, num_experts + 1)


@triton.jit
def sort_program(
    mine, experts_ptr, order_ptr, sample_ptr, inverse_ptr, offsets_ptr, invalid_ptr, pairs, num_experts, top_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What one program of the sort does for its expert ``mine``. Counts in 32 bits; only experts are read in 64."""
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        before += (_bins(experts_ptr, start + lane, pairs, num_experts) < mine).to(tl.int32)
    base = tl.sum(before, 0)
    running = base
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        hit = _bins(experts_ptr, pair, pairs, num_experts) == mine
        position = running + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(order_ptr + position, pair.to(tl.int64), mask=hit)
        tl.store(sample_ptr + position, (pair // top_k).to(tl.int64), mask=hit)
        tl.store(inverse_ptr + pair, position.to(tl.int64), mask=hit)
        running += tl.sum(hit.to(tl.int32), 0)
    tl.store(offsets_ptr + mine, base.to(tl.int64))
    tl.store(invalid_ptr, running - base, mask=mine == num_experts)


@triton.jit
def sort_kernel(
    experts_ptr,  # [pairs] int64
    order_ptr,  # [pairs] int64
    sample_ptr,  # [pairs] int64
    inverse_ptr,  # [pairs] int64
    offsets_ptr,  # [num_experts + 1] int64
    invalid_ptr,  # [] int32
    pairs,
    num_experts,
    top_k,
    BLOCK: tl.constexpr,
):
    """One program: one expert; the last one takes the pairs out of range."""
    sort_program(
        tl.program_id(0), experts_ptr, order_ptr, sample_ptr, inverse_ptr, offsets_ptr, invalid_ptr, pairs,
        num_experts, top_k, BLOCK,
    )  # fmt: skip
