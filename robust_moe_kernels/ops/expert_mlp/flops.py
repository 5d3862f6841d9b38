"""Floating-point operations of the routed MLP, for :class:`torch.utils.flop_counter.FlopCounterMode`.

Each product multiplies and adds once for every row and element of an expert's weight. Rows are as many as the
pre-activations have, dropped pairs beyond ``rows`` apart; sums over slots and activations are not counted, as PyTorch
counts none.
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
_OPS = torch.ops.robust_moe_kernels


def _product(rows: int, weight: Shape) -> int:
    return 2 * rows * math.prod(weight[1:])


@register_flop_formula(_OPS.expert_mlp_forward)
def _forward(
    x: Shape, weight1: Shape, bias1: Shape | None, weight2: Shape, bias2: Shape | None, weights: Shape, order: Shape,
    inverse: Shape, offsets: Shape, rows: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _product(rows, weight1) + _product(rows, weight2)


@register_flop_formula(_OPS.expert_mlp_backward)
def _backward(
    d_y: Shape, x: Shape, z: Shape, weight1: Shape, weight2: Shape, bias2: Shape | None, weights: Shape, order: Shape,
    inverse: Shape, offsets: Shape, activation: str, needs: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The activations' gradient, and what of x's and the weights' is asked for."""
    first = _product(z[0], weight1) * (needs[0] + needs[1])
    return first + _product(z[0], weight2) * (1 + needs[3])
