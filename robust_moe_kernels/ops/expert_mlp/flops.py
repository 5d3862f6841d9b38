"""Floating-point operations of the routed MLP, for :class:`torch.utils.flop_counter.FlopCounterMode`.

Counted are the products with the two weight matrices, for as many pairs as the buffers are sized for: where an expert's
room is limited, places that stay empty too. Activations and sums are not counted, as PyTorch does for its own layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import robust_moe_kernels.ops.expert_mlp.op  # noqa: F401  defines the operations

__all__: list[str] = []

Shape = Sequence[int]
_MLP = torch.ops.robust_moe_kernels


@register_flop_formula(_MLP.expert_mlp_forward)
def _forward(
    x: Shape, weight1: Shape, bias1: Shape | None, weight2: Shape, bias2: Shape | None, weights: Shape,
    order: Shape, inverse: Shape, offsets: Shape, rows: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * rows * (math.prod(weight1[1:]) + math.prod(weight2[1:]))


@register_flop_formula(_MLP.expert_mlp_backward)
def _backward(
    d_y: Shape, x: Shape, z: Shape, weight1: Shape, weight2: Shape, bias2: Shape | None, weights: Shape,
    order: Shape, inverse: Shape, offsets: Shape, activation: str, needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    first, second = (2 * z[0] * math.prod(weight[1:]) for weight in (weight1, weight2))
    d_x, d_weight1, d_bias1, d_weight2, _d_bias2, d_weights = needs
    hidden = d_x or d_weight1 or d_bias1 or d_weights  # the gradient of the hidden numbers
    return second * (hidden + d_weight2) + first * (d_x + d_weight1)
