"""The routing sort in Triton: one program per expert, one launch, no atomics.

Each program reads all pairs twice: it counts those that belong before its own, then ranks its own in order. The same
design as the CUDA kernel (csrc/routing), which saves Triton's launch overhead on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.checks import expect
from robust_moe_kernels.ops.routing.triton_kernels import SORT_BLOCK, sort_kernel
from robust_moe_kernels.triton_support import Build, on_device

__all__ = ["builds", "sort_by_expert", "why_not"]

why_not = triton_support.why_not

# Left to itself, the assembler spills 4 bytes to fit more programs on a multiprocessor (Triton 3.6, sm_90, sm_100).
_OPTIONS = {"num_warps": 4, "maxnreg": 128}


def sort_by_expert(experts: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, ...]:
    expect(experts.numel() < 2**31, "indices", "fewer than 2^31 pairs", experts.numel())
    order, sample, inverse = (torch.empty_like(experts) for _ in range(3))
    offsets = experts.new_empty(num_experts + 1)
    outputs = (order, sample, inverse, offsets, experts.new_empty((), dtype=torch.int32))
    with on_device(experts):
        sort_kernel[(num_experts + 1,)](
            experts, *outputs, experts.numel(), num_experts, top_k, BLOCK=SORT_BLOCK, **_OPTIONS
        )
    return outputs


def builds() -> Iterator[Build]:
    """Every configuration that is launched, for the compile test."""
    pointers = dict.fromkeys(("experts_ptr", "order_ptr", "sample_ptr", "inverse_ptr", "offsets_ptr"), "*i64")
    sizes = dict.fromkeys(("pairs", "num_experts", "top_k"), "i32")
    signature = {**pointers, "invalid_ptr": "*i32", **sizes, "BLOCK": "constexpr"}
    yield Build(sort_kernel, signature, {"BLOCK": SORT_BLOCK}, _OPTIONS)
