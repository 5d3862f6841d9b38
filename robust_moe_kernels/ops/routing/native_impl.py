"""The routing sort over the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native

__all__ = ["sort_by_expert", "why_not"]

why_not = native.why_not_cuda


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, inverse = torch.empty_like(experts), torch.empty_like(experts)
    offsets = experts.new_empty(num_experts + 1)
    invalid = experts.new_empty((), dtype=torch.int32)
    outputs = (order, inverse, offsets, invalid)
    addresses = (experts.data_ptr(), experts.numel(), num_experts, *(output.data_ptr() for output in outputs))
    if experts.is_cuda:
        with torch.cuda.device(experts.device):
            native.extension().sort_by_expert_cuda(*addresses, native.stream(experts))
    else:
        native.extension().sort_by_expert_cpu(*addresses)
    return outputs
