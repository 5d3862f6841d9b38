"""The routing sort in Triton: one program per expert, one launch, no atomics.

Each program reads all pairs twice: it counts those that belong before its own, then ranks its own in order. The same
design as the CUDA kernel (csrc/routing), which saves Triton's launch overhead on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.triton_support import Build, on_device

__all__ = ["builds", "sort_by_expert", "why_not"]

why_not = triton_support.why_not

_BLOCK = 1024  # pairs read at once
_OPTIONS = {"num_warps": 4}


@triton.jit
def _bins(experts_ptr, pair, pairs, num_experts):
    """The expert of each pair; num_experts for one out of range, num_experts + 1 past the end."""
    expert = tl.load(experts_ptr + pair, mask=pair < pairs, other=0)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    return tl.where(pair < pairs, expert, num_experts + 1)


@triton.jit
def _sort_kernel(
    experts_ptr,  # [pairs] int64
    order_ptr,  # [pairs] int64
    inverse_ptr,  # [pairs] int64
    offsets_ptr,  # [num_experts + 1] int64
    invalid_ptr,  # [] int32
    pairs,
    num_experts,
    BLOCK: tl.constexpr,
):
    """One program: one expert; the last one takes the pairs out of range."""
    mine = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    before = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, pairs, BLOCK):
        before += (_bins(experts_ptr, start + lane, pairs, num_experts) < mine).to(tl.int64)
    base = tl.sum(before, 0)
    running = base
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        hit = _bins(experts_ptr, pair, pairs, num_experts) == mine
        position = running + tl.cumsum(hit.to(tl.int64), 0) - 1
        tl.store(order_ptr + position, pair, mask=hit)
        tl.store(inverse_ptr + pair, position, mask=hit)
        running += tl.sum(hit.to(tl.int64), 0)
    tl.store(offsets_ptr + mine, base)
    tl.store(invalid_ptr, (running - base).to(tl.int32), mask=mine == num_experts)


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, inverse = torch.empty_like(experts), torch.empty_like(experts)
    offsets = experts.new_empty(num_experts + 1)
    invalid = experts.new_empty((), dtype=torch.int32)
    with on_device(experts):
        _sort_kernel[(num_experts + 1,)](
            experts, order, inverse, offsets, invalid, experts.numel(), num_experts, BLOCK=_BLOCK, **_OPTIONS
        )
    return order, inverse, offsets, invalid


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    pointers = dict.fromkeys(("experts_ptr", "order_ptr", "inverse_ptr", "offsets_ptr"), "*i64")
    signature = {**pointers, "invalid_ptr": "*i32", "pairs": "i32", "num_experts": "i32", "BLOCK": "constexpr"}
    yield Build(_sort_kernel, signature, {"BLOCK": _BLOCK}, _OPTIONS)
