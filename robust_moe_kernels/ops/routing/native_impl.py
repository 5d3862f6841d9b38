"""The routing sort over the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native

__all__ = ["sort_by_expert", "why_not"]

why_not = native.why_not_cuda


def sort_by_expert(experts: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, ...]:
    order, sample, inverse = (torch.empty_like(experts) for _ in range(3))
    offsets = experts.new_empty(num_experts + 1)
    invalid = experts.new_empty((), dtype=torch.int32)
    outputs = (order, sample, inverse, offsets, invalid)
    addresses = (experts.data_ptr(), experts.numel(), num_experts, top_k, *(output.data_ptr() for output in outputs))
    if native.on_gpu(experts):
        with native.on_device(experts):
            native.extension().sort_by_expert_cuda(*addresses, native.stream(experts))
    else:
        native.extension().sort_by_expert_cpu(*addresses)
    return outputs
