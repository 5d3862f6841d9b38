"""The fast gradient sign method (Goodfellow et al., 2015, arXiv:1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from robust_moe.attacks.pgd import PGD
from robust_moe.attacks.steps import StepAttack
from robust_moe.attacks.table import ATTACKS
from robust_moe.settings import setting

__all__ = ["FGSM"]


@ATTACKS.register("fgsm")
class FGSM(PGD):
    """One gradient step to the edge of the ball: ``clamp(x + eps * sign(gradient))``, one forward and one backward.

    Args:
        eps: radius of the ball, >= 0, pixels being in [0, 1].
        norm: ``"Linf"``, or ``"L2"``: a step along the gradient over its norm.
        alpha: step size, >= 0; None: ``eps``.
        random_start: start uniformly inside the ball; with ``alpha = 1.25 * eps`` this is the attack of fast
            adversarial training (Wong et al., 2020, arXiv:2001.03994).
        settings: ``loss``, ``targeted``, ``restarts``, ``seed``, ``best``, ``eot_iter``, ``mode`` of
            :class:`~robust_moe.attacks.pgd.PGD`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(StepAttack.Config):
        """Settings of FGSM."""

        alpha: Fraction | None = setting(None, "step size, as eps; null: eps", at_least=0)
        random_start: bool = setting(False, "start uniformly inside the ball")
        loss: Literal["ce", "margin", "dlr", "kl"] = setting("ce", "what is raised; kl needs a random start")

    def __init__(
        self,
        eps: float,
        norm: str = "Linf",
        alpha: float | None = None,
        random_start: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(eps, 1, eps if alpha is None else alpha, norm, random_start, **settings)
