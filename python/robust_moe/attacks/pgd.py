"""Projected gradient descent (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

import math

from torch import Tensor

from robust_moe.attacks.base import Attack, expect_number
from robust_moe_kernels.ops.attack_step import NORMS, pgd_step, random_start

__all__ = ["PGD"]


class PGD(Attack):
    """PGD on the cross-entropy, in pixel space: ``x <- clamp(project(x + alpha * direction))``, last iterate returned.

    The direction is the gradient's sign (Linf) or the gradient over its norm, a sample at a time (L2). PGD-k costs
    exactly k forwards and k backwards a restart, and one forward more a restart when there are several.

    Args:
        eps: radius of the ball, >= 0, pixels being in [0, 1].
        steps: gradient steps k, >= 0.
        alpha: step size, >= 0; None: ``2.5 * eps / steps``.
        norm: ``"Linf"`` or ``"L2"``.
        random_start: start uniformly inside the ball (then clamped to [0, 1]) and not at the image itself.
        restarts, seed, mode: see :class:`~robust_moe.attacks.base.Attack`.

    Raises:
        ValueError: a value of another type or out of its range, or restarts without a random start (all would be the
            same).
    """

    def __init__(
        self,
        eps: float,
        steps: int,
        alpha: float | None = None,
        norm: str = "Linf",
        random_start: bool = True,
        restarts: int = 1,
        seed: int = 0,
        *,
        mode: str = "eval",
    ) -> None:
        super().__init__(steps=steps, restarts=restarts, seed=seed, mode=mode)
        for name, value in (("eps", eps), ("alpha", 0 if alpha is None else alpha)):
            expect_number(name, value)
        self.eps = float(eps)
        self.alpha = 2.5 * self.eps / max(steps, 1) if alpha is None else float(alpha)
        self.norm = norm
        self.random_start = random_start
        for name, value in (("eps", self.eps), ("alpha", self.alpha)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        if restarts > 1 and not random_start:
            raise ValueError(f"restarts: expected 1 without a random start, got {restarts}")

    def start(self, x0: Tensor, sample_index: Tensor | None, seed: int, restart: int) -> Tensor:
        if not self.random_start:
            return x0
        return random_start(x0, self.eps, seed, sample_index, stream=restart, norm=self.norm)

    def step(self, x: Tensor, grad: Tensor, x0: Tensor) -> Tensor:
        return pgd_step(x, grad, x0, self.eps, self.alpha, norm=self.norm)
