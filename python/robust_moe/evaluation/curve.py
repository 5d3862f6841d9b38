"""Robust accuracy against the radius of the attack."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.data import ImageSet
from robust_moe.evaluation.moe_stages import attack_settings
from robust_moe.evaluation.staged import StagedEvaluation, Task, share
from robust_moe.evaluation.store import Journal
from robust_moe.settings import parse_fraction

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
    attack: PGD.Config,
    eps_values: Sequence[str | float | Fraction] | None = None,
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
        images, labels, index, batch_size, journal, task: see :func:`~robust_moe.evaluation.moe.run_moe`.
        attack: settings of every attack but radius and step.
        eps_values: radii >= 0, such as ``"8/255"``; None: those of :func:`curve_radii`.
        seed: of every attack.

    Returns:
        ``{"eps": radii, "robust": shares of all n images, correct when clean and attacked, "attack": settings}``.

    Raises:
        ValueError: a bad input. FloatingPointError: a logit or a gradient is NaN or infinite.
    """
    radii = curve_radii() if eps_values is None else [parse_fraction(eps, "eps_values") for eps in eps_values]
    settings = {name: value for name, value in attack_settings(attack).items() if name not in ("eps", "alpha")}
    images = images.images if isinstance(images, ImageSet) else images
    run = StagedEvaluation(
        *(model, images, labels, index), name="curve", batch_size=batch_size, seed=seed, journal=journal, task=task
    )
    run.classes()  # refuses labels that the model has no logit for
    run.claim("curve", settings)
    run.stages_in_all = len(radii)
    attacks = {eps: attack.build(seed=seed, eps=float(eps), alpha=None) for eps in radii}
    return {
        "eps": [float(eps) for eps in radii],
        "robust": [share(run.clean_and_robust(f"eps {eps}", each)[1]) for eps, each in attacks.items()],
        "attack": {"name": "pgd", **settings, "seed": seed, "alpha": f"2.5 eps / {attack.steps}"},
    }
