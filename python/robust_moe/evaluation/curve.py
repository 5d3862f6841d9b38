"""Robust accuracy against the radius of the attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.config import parse_fraction
from robust_moe.data import ImageSet
from robust_moe.evaluation.study import Study

__all__ = ["CURVE_EPS", "error_curve"]

CURVE_EPS = tuple(Fraction(level, 255) for level in range(1, 21))  # the radii of arXiv:2210.10253


def error_curve(
    model: nn.Module,
    images: Tensor | ImageSet,
    labels: Tensor,
    index: Tensor,
    *,
    eps_values: Sequence[str | float | Fraction] = CURVE_EPS,
    norm: str = "Linf",
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Robust accuracy under PGD for each radius, of any model: what a result file says under ``"curve"``.

    Every radius is attacked on its own, over all n images, with a step of 2.5 eps / steps: nothing makes the shares
    fall with the radius but the attack, so that one that rises says that the attack fails.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found.
        images, labels, index, batch_size, on_progress: see :func:`~robust_moe.evaluation.moe.evaluate_moe`.
        eps_values: radii >= 0, such as ``"8/255"``.
        norm, steps, seed: of every attack, see :class:`~robust_moe.attacks.PGD`.

    Returns:
        ``{"eps": radii, "robust": shares of all n images, right as they are and attacked, "attack": settings}``.

    Raises:
        ValueError: a bad input. FloatingPointError: a logit or a gradient is NaN or infinite.
    """
    radii = [parse_fraction(eps, "eps_values") for eps in eps_values]
    study = Study(model, images, labels, index, batch_size, on_progress)
    study.attacks_ahead = len(radii)
    attacks = [PGD(float(eps), steps, norm=norm, seed=seed) for eps in radii]
    settings = {"name": "pgd", "norm": norm, "alpha": f"2.5 eps / {steps}", "steps": steps, "seed": seed}
    return {
        "eps": [float(eps) for eps in radii],
        "robust": [study.clean_and_robust(attack)[1] for attack in attacks],
        "attack": settings,
    }
