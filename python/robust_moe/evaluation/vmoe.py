"""Error, loss and routes against the radius of the attack, as V-MoE's authors measure them.

Puigcerver et al. (2022, arXiv:2210.10253) and their released code: from the clean image, without a random start, m = 40
steps of ε/m along the sign of the gradient of the cross-entropy, at ε = 1/255, 2/255, ..., 20/255. Two things differ:
attacked pixels stay in [0, 1], and a token without an expert on both images counts as unchanged, not as changed
(:func:`~robust_moe.evaluation.routing_measures.routing_change`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.attacks.losses import cross_entropy
from robust_moe.data import Batch, ImageSet
from robust_moe.evaluation.curve import curve_radii
from robust_moe.evaluation.moe_stages import title
from robust_moe.evaluation.routing_measures import routes, routing_change
from robust_moe.evaluation.staged import StagedEvaluation, Task, share
from robust_moe.evaluation.store import Journal
from robust_moe.settings import parse_fraction
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer, moe_layers

__all__ = ["VMOE_STEPS", "vmoe_curve"]

VMOE_STEPS = 40


def vmoe_curve(
    model: nn.Module,
    images: Tensor | ImageSet,
    labels: Tensor,
    index: Tensor,
    *,
    eps_values: Sequence[str | float | Fraction] | None = None,
    steps: int = VMOE_STEPS,
    seed: int = 0,
    batch_size: int = 256,
    journal: Journal | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """What attacks of growing radius do to any model, as plain numbers.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found.
        images, labels, index, batch_size, journal, task: see :func:`~robust_moe.evaluation.moe.run_moe`.
        eps_values: radii > 0, such as ``"8/255"``; None: those of :func:`curve_radii`.
        steps: m >= 1.
        seed: of what the model itself draws.

    Returns:
        ``clean``: ``error``, share of all n images that are wrong, and ``loss``, their mean cross-entropy. One number
        for each radius of ``eps``: ``error`` and ``loss`` of the attacked images, ``changed``, share whose predicted
        class is another one than that of the clean image, and ``robust``, share correct clean and attacked. ``layers``,
        by name: ``routing_change``, one number for each radius, mean 1 - IoU of the selected experts over images, and
        over tokens where they are routed. ``attack``: its settings.

    Raises:
        ValueError: a bad input. FloatingPointError: a logit or a gradient is NaN or infinite.
    """
    radii = curve_radii() if eps_values is None else [parse_fraction(eps, "eps_values") for eps in eps_values]
    for eps in radii:
        expect(eps > 0, "eps_values", "radii > 0", eps)
    expect(type(steps) is int and steps >= 1, "steps", "a count >= 1", repr(steps))
    images = images.images if isinstance(images, ImageSet) else images
    run = StagedEvaluation(
        *(model, images, labels, index), name="vmoe", batch_size=batch_size, seed=seed, journal=journal, task=task
    )
    run.classes()  # refuses labels that the model has no logit for
    settings = {"steps": steps, "alpha": f"eps / {steps}", "norm": "Linf", "loss": "ce", "random_start": False}
    run.claim("vmoe", settings)
    run.stages_in_all = 1 + len(radii)
    layers = moe_layers(model)
    clean = run.over("clean", lambda batch: _scored(run, batch.images, batch.labels))
    found = [run.over(f"eps {eps}", partial(_look, run, layers, _attack(eps, steps, seed))) for eps in radii]
    return {
        "eps": [float(eps) for eps in radii],
        "clean": _numbers(clean),
        **{name: [_numbers(each)[name] for each in found] for name in ("error", "loss")},
        "changed": [share(each["prediction"] != clean["prediction"]) for each in found],
        "robust": [share(each["right"] & clean["right"]) for each in found],
        "layers": {
            title(name): {"routing_change": [each[f"change/{name}"].mean().item() for each in found]} for name in layers
        },
        "attack": {"name": "pgd", **settings, "seed": seed},
    }


def _attack(eps: Fraction, steps: int, seed: int) -> PGD:
    return PGD(float(eps), steps, float(eps) / steps, random_start=False, seed=seed)


def _scored(run: StagedEvaluation, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logits = run.logits(images)
    prediction = logits.argmax(1)
    return {"prediction": prediction, "right": prediction == labels, "loss": cross_entropy(logits, labels).double()}


def _look(run: StagedEvaluation, layers: dict[str, MoELayer], attack: PGD, batch: Batch) -> dict[str, Tensor]:
    """What the attack does to the images of a batch."""
    attacked = run.craft(attack, batch)
    before: dict[str, Tensor] = {}
    if layers:
        run.logits(batch.images)
        before = routes(layers)
    found = _scored(run, attacked, batch.labels)
    after = routes(layers)
    for name in layers:
        change = routing_change(before[f"sets/{name}"], after[f"sets/{name}"])
        found[f"change/{name}"] = change if change.dim() == 1 else change.mean(1)
    return found


def _numbers(found: dict[str, Tensor]) -> dict[str, float]:
    return {"error": share(~found["right"]), "loss": found["loss"].mean().item()}
