"""The specification of the routing sort, in plain PyTorch: no operation here needs the host to wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sort_by_expert", "why_not"]


def why_not(device_type: str) -> str | None:
    return None


def sort_by_expert(experts: Tensor, num_experts: int, top_k: int) -> tuple[Tensor, ...]:
    valid = (experts >= 0) & (experts < num_experts)
    keys = torch.where(valid, experts, num_experts)
    keys, order = keys.sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    offsets = torch.searchsorted(keys, torch.arange(num_experts + 1, device=keys.device))
    return order, order // top_k, inverse, offsets, (~valid).sum().to(torch.int32)
