"""Floating-point operations of a gate's fused pool and linear layer, for
:class:`torch.utils.flop_counter.FlopCounterMode`: those of the linear layer, as PyTorch counts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import robust_moe_kernels.ops.gate.pool  # noqa: F401  defines the operations

__all__: list[str] = []

Shape = Sequence[int]


@register_flop_formula(torch.ops.robust_moe_kernels.pool_linear)
def _forward(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * math.prod(weight)
