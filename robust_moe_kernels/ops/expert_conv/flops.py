"""Floating-point operations of the expert convolution, for :class:`torch.utils.flop_counter.FlopCounterMode`.

Each of the three products multiplies and adds once for every element of the map on the output's side and every weight
of a filter that reaches it; padding is counted as if it were multiplied, as PyTorch does for its own convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import robust_moe_kernels.ops.expert_conv.op  # noqa: F401  defines the products

__all__: list[str] = []

Shape = Sequence[int]
_PRODUCTS = torch.ops.robust_moe_kernels


def _product(out: Shape, weight: Shape) -> int:
    return 2 * math.prod(out) * math.prod(weight[2:])


@register_flop_formula(_PRODUCTS.expert_conv_forward)
def _forward(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _product(out_shape, weight)


@register_flop_formula(_PRODUCTS.expert_conv_dgrad)
def _dgrad(d_out: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(d_out, weight)


@register_flop_formula(_PRODUCTS.expert_conv_wgrad)
def _wgrad(x: Shape, d_out: Shape, offsets: Shape, sample: Shape | None, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(d_out, weight)
