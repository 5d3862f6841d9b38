"""Momentum over the outputs of the routed layers of a network (MomentumSMoE)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect

__all__ = ["Momentum"]


@dataclass(frozen=True)
class Momentum:
    """Heavy-ball momentum over linked layers: the t-th of them returns o_t = mu o_{t-1} + gamma u_t, u_t being what its
    experts give, and o_0 = 0 (MomentumSMoE, Teo and Nguyen, NeurIPS 2024, arXiv:2410.14574, section 3).

    The paper reads the sum of a layer and its skip as a step of gradient descent, -u_t being the gradient. Its step
    with momentum is p_t = mu p_{t-1} - u_t and x_{t+1} = x_t - gamma p_t. What the skip adds is -gamma p_t = o_t, the
    same numbers as long as all layers have one gamma; ours multiplies u_t, not o_t. Between two routed layers of a
    transformer stand attention and dense MLPs, which add to x_t and not to o_t.

    mu: 0 <= mu < 1; the released code has 0.7. 0 with gamma = 1 is the layer without momentum, bit for bit.
    gamma: > 0; the released code has 1.

    Raises:
        ValueError: a number out of range.
    """

    mu: float = 0.7
    gamma: float = 1.0

    def __post_init__(self) -> None:
        ok = type(self.mu) in (int, float) and 0 <= self.mu < 1
        expect(ok, "momentum: mu", "a number in [0, 1)", repr(self.mu))
        ok = type(self.gamma) in (int, float) and 0 < self.gamma < math.inf
        expect(ok, "momentum: gamma", "a finite number > 0", repr(self.gamma))

    def step(self, out: Tensor, before: Tensor | None) -> Tensor:
        """o_t of u_t = ``out`` and o_{t-1} = ``before``, of one shape, in the dtype of ``out``."""
        if self.gamma != 1:
            out = self.gamma * out
        if before is None or self.mu == 0:  # 0 times an infinite number would be none
            return out
        return torch.add(out, before.to(out.dtype), alpha=self.mu)
