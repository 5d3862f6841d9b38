"""What a study measures of a trained model: accuracy under attack, routing, single experts, a sweep over alpha.

The measures are those of :mod:`robust_moe.evaluation.moe`, with fewer attacks: a study scores some thirty models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, Attack, ExpertPGD, RouterPGD
from robust_moe.data import Batch, ImageSet
from robust_moe.evaluation.routing_measures import expert_sets, routing_change
from robust_moe.evaluation.scorer import LayerRouting
from robust_moe.evaluation.study import Study, only_expert, share
from robust_moe.methods.moe_attacks import clean_second_experts, held
from robust_moe.models import DualModel
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer, attack_mode, moe_layers, rerouted

__all__ = ["ALPHAS", "best_of_halves", "measure"]

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the robust model for which the dual model is meant


def measure(
    model: nn.Module,
    images: ImageSet,
    attack: dict[str, Any],
    *,
    count: int,
    sweep_count: int,
    batch_size: int = 256,
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, Any]:
    """Shares of the images, as plain types. All attacks are PGD with the same settings; an image counts as robust if it
    is right as it is and attacked.

    ``sa`` clean and ``ra`` under PGD. With one routed layer also ``ra_e`` (through the experts, on the clean route),
    ``ra_r`` (on the router), ``union`` (against all three); ``flips`` and ``change`` by attack: share of images whose
    selected experts changed, and mean 1 - IoU of them; ``first``: each expert's share of first choices on clean images,
    ``collapsed`` as :class:`~robust_moe.evaluation.LayerRouting` has it; ``single_experts``: ``clean`` and ``robust``
    of each expert taking every image; ``best_single``: robust share of the best of them, chosen on every other image
    and scored on the rest, mean of both ways round; ``second``: ``clean`` and ``robust`` of every image's expert that
    the gate ranks second on the clean image. Of a :class:`~robust_moe.models.DualModel`, ``sa`` and ``ra`` at its own
    alpha and ``sweep``, the two for this and each of ``alphas``, attacked anew.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left as found.
        images: the whole set; the first ``count`` of every class in their shares are used.
        attack: settings of :class:`~robust_moe.attacks.PGD`, ``seed`` among them.
        count, sweep_count: images; of a dual model, every point of whose sweep is an attack, the latter.

    Raises:
        ValueError: a layer whose routes are imposed (``fixed_expert``, ``reroute``).
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
    """

    def study(number: int) -> Study:
        index = images.head_index(number)
        chosen = images.subset(index)
        return Study("study", model, chosen, chosen.labels, index, batch_size, attack["seed"], attack)

    layers = moe_layers(model)
    for name, layer in layers.items():
        free = layer.fixed_expert is None and layer.reroute is None
        expect(free, name or "model", "routes of its own", "imposed ones")
    with attack_mode(model):
        if isinstance(model, DualModel):
            return _sweep(study(sweep_count), model, attack, sorted({*alphas, model.alpha}))
        if len(layers) == 1:
            return _routed(study(count), next(iter(layers.values())), attack)
        return _accuracy(study(count), attack)


def _accuracy(study: Study, attack: dict[str, Any]) -> dict[str, Any]:
    clean, robust = study.clean_and_robust("ra", PGD(**attack))
    return {"sa": share(clean), "ra": share(robust), "images": len(study)}


def _sweep(study: Study, model: DualModel, attack: dict[str, Any], alphas: Sequence[float]) -> dict[str, Any]:
    own, points = model.alpha, []
    try:
        for model.alpha in alphas:
            clean, robust = study.clean_and_robust(f"alpha {model.alpha}", PGD(**attack))
            points.append({"alpha": model.alpha, "sa": share(clean), "ra": share(robust)})
    finally:
        model.alpha = own
    here = next(point for point in points if point["alpha"] == own)
    return {"sa": here["sa"], "ra": here["ra"], "alpha": own, "sweep": points, "images": len(study)}


def _routed(study: Study, layer: MoELayer, attack: dict[str, Any]) -> dict[str, Any]:
    attacks: dict[str, Attack] = {"ra": PGD(**attack), "ra_e": ExpertPGD(**attack), "ra_r": RouterPGD(**attack)}

    def look(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        right = study.right(images, labels)
        indices = layer.routing.indices
        return {"right": right, "first": indices[:, 0], "sets": expert_sets(indices, layer.num_experts)}

    clean = study.over("clean", lambda batch: look(batch.images, batch.labels))

    def attacked(by: Attack) -> Callable[[Batch], dict[str, Tensor]]:
        return lambda batch: look(study.attacked(by, batch), batch.labels)

    found = {name: study.over(name, attacked(by)) for name, by in attacks.items()}
    robust = {name: clean["right"] & seen["right"] for name, seen in found.items()}
    changes = {name: routing_change(clean["sets"], seen["sets"]) for name, seen in found.items()}
    singles = [_single(study, layer, expert, attack) for expert in range(layer.num_experts)]
    second = study.clean_and_robust("second", PGD(**attack), lambda batch: _on_second(study.model, batch))
    first = (clean["first"].bincount(minlength=layer.num_experts).double() / len(study)).tolist()
    use = LayerRouting(selected=clean["sets"].double().mean(0).tolist(), first=first)
    return {
        "sa": share(clean["right"]),
        **{name: share(mask) for name, mask in robust.items()},
        "union": share(torch.stack(list(robust.values())).all(0)),
        "flips": {name: share(change > 0) for name, change in changes.items()},
        "change": {name: change.mean().item() for name, change in changes.items()},
        "first": use.first,
        "selected": use.selected,
        "collapsed": use.collapsed,
        "single_experts": [_shares(*masks) for masks in singles],
        "best_single": best_of_halves(torch.stack([masks[1] for masks in singles])),
        "second": _shares(*second),
        "images": len(study),
    }


def _single(study: Study, layer: MoELayer, expert: int, attack: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return study.clean_and_robust(f"expert {expert}", PGD(**attack), lambda _: only_expert(layer, expert))


def _shares(clean: Tensor, robust: Tensor) -> dict[str, float]:
    return {"clean": share(clean), "robust": share(robust)}


def best_of_halves(masks: Tensor) -> float:
    """Share that the best of several is right on, without the luck of being chosen: bool [E, n >= 2]; chosen on every
    other image, scored on the rest, mean over the images of both ways round."""
    halves = masks[:, ::2], masks[:, 1::2]
    scored = [score[choice.sum(1).argmax()] for choice, score in (halves, halves[::-1])]
    return share(torch.cat(scored))


@contextmanager
def _on_second(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Every image of the batch at the expert that is second for the clean image."""
    with rerouted(model, held(clean_second_experts(model, batch.images))):
        yield
