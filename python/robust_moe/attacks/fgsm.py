"""The fast gradient sign method (Goodfellow et al., 2015, arXiv:1412.6572)."""

from __future__ import annotations

from robust_moe.attacks.pgd import PGD

__all__ = ["FGSM"]


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

    def __init__(
        self,
        eps: float,
        norm: str = "Linf",
        alpha: float | None = None,
        random_start: bool = False,
        **settings,
    ) -> None:
        super().__init__(eps, 1, eps if alpha is None else alpha, norm, random_start, **settings)
