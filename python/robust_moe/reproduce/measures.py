"""What a study measures of a trained model: accuracy under attack, routing, single experts, a sweep over alpha.

The stages are those of :mod:`robust_moe.evaluation.moe_stages`; a study scores some thirty models with a few of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.data import Batch, ImageSet
from robust_moe.evaluation.moe_stages import MoEStages
from robust_moe.evaluation.routing_measures import change_numbers, expert_use
from robust_moe.evaluation.staged import StagedEvaluation, share
from robust_moe.methods.moe_attacks import clean_second_experts, held
from robust_moe.models import DualModel
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer, attack_mode, moe_layers, rerouted

__all__ = ["ALPHAS", "best_of_halves", "measure"]

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the robust model for which the dual model is meant


def measure(
    model: nn.Module,
    images: ImageSet,
    attack: PGD.Config,
    *,
    seed: int,
    count: int,
    sweep_count: int,
    batch_size: int = 256,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """Shares of the images, as plain types. All attacks are PGD with the same settings; an image counts as robust if
    the model is correct on the clean and on the adversarial image.

    ``sa`` clean and ``ra`` under PGD. With one routed layer also ``ra_e`` (through the experts, on the clean route),
    ``ra_r`` (on the router), ``union`` (against all three); ``flips`` and ``change`` by attack: share of images whose
    selected experts changed, and mean 1 - IoU of them; ``first``: each expert's share of first choices on clean images,
    ``collapsed`` as :class:`~robust_moe.evaluation.LayerRouting` has it; ``single_experts``: ``clean`` and ``robust``
    of each expert taking every image; ``best_single``: robust share of the best of them, chosen on every other image
    and scored on the rest, mean of both ways round; ``second``: ``clean`` and ``robust`` of every image's expert that
    the gate ranks second on the clean image, where there are two. Of a :class:`~robust_moe.models.DualModel`, ``sa``
    and ``ra`` at its own alpha and ``sweep``, the two for this and each of ``alphas``, attacked anew.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left as found.
        images: the whole set; the first ``count`` of every class in their shares are used.
        attack: settings of every attack.
        seed: of every attack.
        count, sweep_count: images; of a dual model, every point of whose sweep is an attack, the latter.

    Raises:
        ValueError: a layer whose routes are imposed (``fixed_expert``, ``reroute``).
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
    """

    def run(number: int) -> StagedEvaluation:
        index = images.head_index(number)
        chosen = images.subset(index)
        return StagedEvaluation(
            *(model, chosen.images, chosen.labels, index), name="measures", batch_size=batch_size, seed=seed
        )

    layers = moe_layers(model)
    for name, layer in layers.items():
        free = layer.fixed_expert is None and layer.reroute is None
        expect(free, name or "model", "routes of its own", "imposed ones")
    with attack_mode(model):
        if isinstance(model, DualModel):
            return _sweep(run(sweep_count), model, attack, sorted({*alphas, model.alpha}))
        if len(layers) == 1:
            return _routed(run(count), layers, attack)
        return _accuracy(run(count), attack)


def _accuracy(run: StagedEvaluation, attack: PGD.Config) -> dict[str, Any]:
    clean, robust = run.clean_and_robust("ra", attack.build(seed=run.seed))
    return {"sa": share(clean), "ra": share(robust), "images": len(run)}


def _sweep(run: StagedEvaluation, model: DualModel, attack: PGD.Config, alphas: Sequence[float]) -> dict[str, Any]:
    own, points = model.alpha, []
    try:
        for model.alpha in alphas:
            clean, robust = run.clean_and_robust(f"alpha {model.alpha}", attack.build(seed=run.seed))
            points.append({"alpha": model.alpha, "sa": share(clean), "ra": share(robust)})
    finally:
        model.alpha = own
    here = next(point for point in points if point["alpha"] == own)
    return {"sa": here["sa"], "ra": here["ra"], "alpha": own, "sweep": points, "images": len(run)}


def _routed(run: StagedEvaluation, layers: dict[str, MoELayer], attack: PGD.Config) -> dict[str, Any]:
    stages = MoEStages(run, layers, attack)
    ((name, layer),) = layers.items()
    clean = stages.clean_stage()
    found = {each: stages.attack_stage(each) for each in stages.attacks}
    robust = {each: clean["right"] & seen["right"] for each, seen in found.items()}
    changes = {each: change_numbers(clean[f"sets/{name}"], seen[f"sets/{name}"]) for each, seen in found.items()}
    singles = [stages.single_stage(name, expert) for expert in range(layer.num_experts)]
    use = expert_use(clean[f"sets/{name}"], clean[f"first/{name}"])
    return {
        "sa": share(clean["right"]),
        **{each: share(mask) for each, mask in robust.items()},
        "union": share(torch.stack(list(robust.values())).all(0)),
        "flips": {each: change["route_flips"] for each, change in changes.items()},
        "change": {each: change["routing_change"] for each, change in changes.items()},
        "first": use.first,
        "selected": use.selected,
        "collapsed": use.collapsed,
        "single_experts": [_shares(*masks) for masks in singles],
        "best_single": best_of_halves(torch.stack([masks[1] for masks in singles])),
        "images": len(run),
    } | ({"second": _shares(*_second(run, stages))} if layer.num_experts > 1 else {})


def _shares(clean: Tensor, robust: Tensor) -> dict[str, float]:
    return {"clean": share(clean), "robust": share(robust)}


def best_of_halves(masks: Tensor) -> float:
    """Share that the best of several is right on, without selection bias: from bool [E, n >= 2]; chosen on every other
    image, scored on the rest, mean over the images of both ways round."""
    halves = masks[:, ::2], masks[:, 1::2]
    scored = [score[choice.sum(1).argmax()] for choice, score in (halves, halves[::-1])]
    return share(torch.cat(scored))


def _second(run: StagedEvaluation, stages: MoEStages) -> tuple[Tensor, Tensor]:
    return run.clean_and_robust("second", stages.pgd(), lambda batch: _on_second(run.model, batch))


@contextmanager
def _on_second(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Every image of the batch at the expert that is second for the clean image."""
    with rerouted(model, held(clean_second_experts(model, batch.images))):
        yield
