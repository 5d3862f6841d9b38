"""Projected gradient descent (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust_moe.attacks.base import MOST_RESTARTS, MOST_STEPS, expect_length
from robust_moe.attacks.losses import LOSSES, kl_divergence
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.steps import StepAttack
from robust_moe.attacks.table import ATTACKS
from robust_moe.settings import setting
from robust_moe_kernels.checks import expect
from robust_moe_kernels.ops.attack_step import NORMS, pgd_step, random_start

__all__ = ["PGD"]


@ATTACKS.register("pgd")
class PGD(StepAttack):
    """PGD in pixel space: ``x <- clamp(project(x + alpha * direction))``, last iterate returned.

    The direction is the gradient's sign (Linf) or the gradient over its norm, a sample at a time (L2). PGD-k costs
    exactly k forwards and k backwards a restart and EoT draw, one forward more a restart when there are several or with
    ``best``, and one with ``loss="kl"``.

    Args:
        eps: radius of the ball, >= 0, pixels being in [0, 1].
        steps: gradient steps k, >= 0.
        alpha: step size, >= 0; None: ``2.5 * eps / steps``.
        norm: ``"Linf"`` or ``"L2"``.
        random_start: start uniformly inside the ball (then clamped to [0, 1]) and not at the image itself.
        loss: what is raised (:mod:`robust_moe.attacks.losses`): ``"ce"``, ``"margin"``, ``"dlr"``, or ``"kl"``, the
            divergence from the clean prediction.
        targeted: the labels given are those to reach: the loss is lowered, and a sample is fooled where it is
            classified as its label. Not with ``"kl"``.
        best, restarts, seed, eot_iter, mode, graph: see :class:`~robust_moe.attacks.steps.StepAttack`.

    Raises:
        ValueError: a value of another type or out of its range; restarts without a random start (all would be the
            same); ``"kl"`` without one (its gradient at the image is zero) or targeted.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(StepAttack.Config):
        """Settings of PGD."""

        steps: int = setting(7, "gradient steps", at_least=0, at_most=MOST_STEPS)
        alpha: Fraction | None = setting(None, "step size, as eps; null: 2.5 * eps / steps", at_least=0)
        random_start: bool = setting(True, "start uniformly inside the ball")
        restarts: int = setting(1, "independent starts; each sample keeps its worst", at_least=1, at_most=MOST_RESTARTS)
        loss: Literal["ce", "margin", "dlr", "kl"] = setting(
            "ce", "what is raised; kl: the divergence from the clean prediction"
        )

    losses: ClassVar[tuple[str, ...]] = (*LOSSES, "kl")  # that the attack can raise

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
        loss: str = "ce",
        targeted: bool = False,
        best: bool = False,
        eot_iter: int = 1,
        mode: str = "eval",
        graph: str | bool = "auto",
    ) -> None:
        super().__init__(
            steps=steps, restarts=restarts, seed=seed, best=best, eot_iter=eot_iter, mode=mode, graph=graph
        )
        expect_length("eps", eps)
        expect_length("alpha", 0 if alpha is None else alpha)
        self.eps = float(eps)
        self.alpha = 2.5 * self.eps / max(steps, 1) if alpha is None else float(alpha)
        self.norm = norm
        self.random_start = random_start
        self.loss_name = loss
        self.targeted = targeted
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        expect(loss in self.losses, "loss", f"one of {', '.join(self.losses)}", repr(loss))
        if restarts > 1 and not random_start:
            raise ValueError(f"restarts: expected 1 without a random start, got {restarts}")
        if loss == "kl" and not random_start:
            raise ValueError("random_start: expected True with loss='kl' (no gradient at the image), got False")
        if loss == "kl" and targeted:
            raise ValueError("targeted: expected False with loss='kl', which has no labels, got True")

    @property
    def passes(self) -> tuple[int, int]:
        forwards, backwards = super().passes
        return forwards + (self.loss_name == "kl"), backwards

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        loss = LOSSES[self.loss_name](logits, y)
        return -loss if self.targeted else loss

    def fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        predicted = logits.argmax(1)
        return predicted == y if self.targeted else predicted != y

    def prepare(self, passes: Passes, x0: Tensor) -> Passes:
        if self.loss_name != "kl":
            return passes
        with torch.no_grad():
            return replace(passes, loss=_from_clean, extras=(passes.logits(x0),))

    def start(self, x0: Tensor, sample_index: Tensor | None, seed: int, restart: int) -> Tensor:
        if not self.random_start:
            return x0
        return random_start(x0, self.eps, seed, sample_index, stream=restart, norm=self.norm)

    def step(self, x: Tensor, grad: Tensor, x0: Tensor, nonfinite: Tensor | None = None) -> Tensor:
        return pgd_step(x, grad, x0, self.eps, self.alpha, norm=self.norm, nonfinite=nonfinite)


def _from_clean(logits: Tensor, _: Tensor, clean: Tensor) -> Tensor:
    return kl_divergence(logits, clean)
