"""Robust accuracy against the radius of the attack."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.config import parse_fraction
from robust_moe.data import ImageSet
from robust_moe.evaluation.batches import Task
from robust_moe.evaluation.store import Journal
from robust_moe.evaluation.study import Study, share

__all__ = ["curve_radii", "error_curve"]

RADII = 20
LARGEST = Fraction(20, 255)  # 1/255 to 20/255: the radii of arXiv:2210.10253


def curve_radii(eps: str | float | Fraction = 0) -> tuple[Fraction, ...]:
    """The 20 radii of a curve, equally far apart: up to 20/255, or up to ``eps`` where that is larger.

    For eps <= 20/255 they are 1/255, 2/255, ..., 20/255; for eps = 0.1 they are 0.005, 0.01, ..., 0.1.
    """
    largest = max(LARGEST, parse_fraction(eps, "eps"))
    return tuple(largest * level / RADII for level in range(1, RADII + 1))


def error_curve(
    model: nn.Module,
    images: Tensor | ImageSet,
    labels: Tensor,
    index: Tensor,
    *,
    eps_values: Sequence[str | float | Fraction] | None = None,
    norm: str = "Linf",
    steps: int = 20,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    eot_iter: int = 1,
    graph: str | bool = "auto",
    seed: int = 0,
    batch_size: int = 256,
    journal: Journal | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Robust accuracy under PGD for each radius, of any model: what a result file says under ``"curve"``.

    Every radius is attacked on its own, over all n images, with a step of 2.5 eps / steps: nothing makes the shares
    fall with the radius but the attack, so that one that rises says that the attack fails.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found.
        images, labels, index, batch_size, journal, task: see :func:`~robust_moe.evaluation.moe.study_moe`.
        eps_values: radii >= 0, such as ``"8/255"``; None: those of :func:`curve_radii`.
        norm, steps, restarts, random_start, loss, eot_iter, graph, seed: of every attack, see
            :class:`~robust_moe.attacks.PGD`.

    Returns:
        ``{"eps": radii, "robust": shares of all n images, right as they are and attacked, "attack": settings}``.

    Raises:
        ValueError: a bad input. FloatingPointError: a logit or a gradient is NaN or infinite.
    """
    radii = curve_radii() if eps_values is None else [parse_fraction(eps, "eps_values") for eps in eps_values]
    given = {"norm": norm, "steps": steps, "restarts": restarts, "random_start": random_start}
    given |= {"loss": loss, "eot_iter": eot_iter, "seed": seed}
    study = Study("curve", model, images, labels, index, batch_size, seed, given, journal, task)
    study.stages_in_all = len(radii)
    attacks = {eps: PGD(float(eps), **given, graph=graph) for eps in radii}
    return {
        "eps": [float(eps) for eps in radii],
        "robust": [share(study.clean_and_robust(f"eps {eps}", attacks[eps])[1]) for eps in radii],
        "attack": {"name": "pgd", **given, "alpha": f"2.5 eps / {steps}"},
    }
