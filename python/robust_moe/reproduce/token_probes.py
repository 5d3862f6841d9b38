"""What runs with routed transformers are asked: attacks that know routes, other choices of experts, disagreement and
loss of robustness, error over the radius. Each works on any model; see :mod:`robust_moe.reproduce.probes`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from robust_moe.attacks import Attack, ExpertPGD, JointPGD, RouterPGD, TransferPGD
from robust_moe.data import Batch
from robust_moe.evaluation import vmoe_curve
from robust_moe.evaluation.moe_stages import MoEStages, moe_arguments, title
from robust_moe.evaluation.routing_measures import (
    change_numbers,
    disagreement,
    expert_use,
    layer_inputs,
    routing_change,
)
from robust_moe.evaluation.staged import share
from robust_moe.evaluation.vmoe import VMOE_STEPS
from robust_moe.reproduce.subject import Subject
from robust_moe.tokens import mean_of_tokens, of_images
from robust_moe_kernels.modules import (
    DropTop,
    RandomRoutes,
    Reroute,
    SwapTop,
    attack_mode,
    last_routes,
    moe_layers,
    rerouted,
)

__all__ = ["disagreement_and_loss", "radii", "redundancy", "tokens"]

TOP = 2  # experts of the highest weight, whose disagreement is measured
RADII_SHARE = 3  # of so many of a probe's images one is attacked at every radius: 20 attacks of 40 steps


def tokens(subject: Subject) -> dict[str, Any]:
    """Robust shares under PGD; of a routed model also under RA-E, RA-R, the joint attack and transfer, of the same
    settings. ``worst``: under all of them. Steering, whose climbs to every expert cost 24 times as much at scale cpu,
    is left out.

    Of a routed model: ``moved``, ``moved_by_router``: share of tokens (of images, where those are routed) whose experts
    change under PGD and under RA-R, mean over the layers; ``largest``: the most used expert's share of first choices,
    of the layer in which it is largest; ``layers``: by name, what each attack changes, and the use of the experts.
    """
    attack, layers = subject.attack, moe_layers(subject.model)
    with attack_mode(subject.model):
        stages = MoEStages(subject.run("tokens"), layers, attack)
        found: dict[str, Attack] = {"pgd": stages.pgd()}
        if layers:
            arguments = {**moe_arguments(attack), "seed": subject.seed}
            found |= {"ra_e": ExpertPGD(**arguments), "ra_r": RouterPGD(**arguments)}
            found |= {"joint": JointPGD(**arguments), "transfer": TransferPGD(**arguments)}
        stages.attacks = found
        clean = stages.clean_stage()
        seen = {name: stages.attack_stage(name) for name in found}
    robust = {name: clean["right"] & each["right"] for name, each in seen.items()}
    worst = torch.stack(list(robust.values())).all(0)
    shares = {name: share(mask) for name, mask in {"sa": clean["right"], **robust, "worst": worst}.items()}
    if not layers:
        return {"images": len(worst), **shares}
    by_layer: dict[str, dict[str, Any]] = {}
    for name in layers:
        sets = clean[f"sets/{name}"]
        use = expert_use(sets, clean[f"first/{name}"])
        changes = {attack: change_numbers(sets, each[f"sets/{name}"]) for attack, each in seen.items()}
        by_layer[title(name)] = {"first": use.first, "selected": use.selected, "changes": changes}

    def moved(attack: str) -> float:
        changes = [layer["changes"][attack] for layer in by_layer.values()]
        return statistics.fmean(change.get("token_flips", change["route_flips"]) for change in changes)

    return {
        "images": len(worst),
        **shares,
        "moved": moved("pgd"),
        "moved_by_router": moved("ra_r"),
        "largest": max(max(layer["first"]) for layer in by_layer.values()),
        "layers": by_layer,
    }


def redundancy(subject: Subject) -> dict[str, Any]:
    """Shares of images that a routed model is right on, by who chooses the experts of all of its layers.

    ``own`` and ``robust``: its gates, clean and under PGD. ``drop_top``, ``swap``, ``random``: clean images without the
    first choice, with the first two exchanged, with experts drawn for every token; ``robust_swap``, ``robust_random``:
    and under PGD through these. ``clean_route``: the images of PGD on the model, on the clean images' routes;
    ``attacked_route``: the clean ones on the attacked images' routes. ``weight_gap``, no share of images: how far the
    first choice's weight is above the second's (0 for one choice), mean over tokens and layers of the clean images.
    """
    model, layers = subject.model, moe_layers(subject.model)
    run, pgd = subject.run("redundancy"), subject.attack.build(seed=subject.seed)
    imposed: Mapping[str, Callable[[Batch], dict[str, Reroute]]] = {
        "drop_top": lambda _: dict.fromkeys(layers, DropTop()),
        "swap": lambda _: dict.fromkeys(layers, SwapTop()),
        "random": lambda batch: {
            name: RandomRoutes(batch.index, subject.seed, number) for number, name in enumerate(layers)
        },
    }

    def look(batch: Batch) -> dict[str, Tensor]:
        attacked = run.craft(pgd, batch)
        own = run.right(batch.images, batch.labels)
        clean = last_routes(model)
        gaps = [_weight_gap(route.weights, len(own)) for route in clean.values()]
        robust = own & run.right(attacked, batch.labels)
        moved = last_routes(model)
        found = {"own": own, "robust": robust, "weight_gap": torch.stack(gaps).mean(0)}
        for name, choose in imposed.items():
            with rerouted(model, choose(batch)):
                found[name] = run.right(batch.images, batch.labels)
                if name != "drop_top":
                    other = run.craft(pgd, batch)
                    found[f"robust_{name}"] = found[name] & run.right(other, batch.labels)
        with rerouted(model, clean):
            found["clean_route"] = own & run.right(attacked, batch.labels)
        with rerouted(model, moved):
            found["attacked_route"] = run.right(batch.images, batch.labels)
        return found

    with attack_mode(model):
        found = run.over("redundancy", look)
    return {"images": len(run), **{name: share(mask) for name, mask in found.items()}}


def _weight_gap(weights: Tensor | None, images: int) -> Tensor:
    """By how much the first weight of a row is above the second, mean over an image's rows, [B] from [N, k]."""
    assert weights is not None  # those of a forward
    gap = weights[:, 0] - weights[:, 1] if weights.shape[1] > 1 else weights.new_zeros(len(weights))
    return mean_of_tokens(of_images(gap.double(), images))


def disagreement_and_loss(subject: Subject) -> dict[str, Any]:
    """Whether an image whose best experts disagree is lost to PGD sooner.

    Of the images that are right when clean: ``lost`` and ``kept``, shares under PGD; ``above``, the probability that
    the disagreement of a lost image is above that of a kept one, one half at ties and where either kind is missing. The
    disagreement (:func:`~robust_moe.evaluation.routing_measures.disagreement`) is that of the :data:`TOP` best experts,
    the mean over an image's tokens and the layers; ``mean``: over all images. Also ``change_lost`` and ``change_kept``,
    mean routing change under PGD of either kind.
    """
    layers = moe_layers(subject.model)
    run, pgd = subject.run("disagreement"), subject.attack.build(seed=subject.seed)
    stages = MoEStages(run, layers, subject.attack)

    def look(batch: Batch) -> dict[str, Tensor]:
        with layer_inputs(layers) as inputs:
            clean = stages.look(batch.images, batch.labels)
        spread = [disagreement(layer, inputs[name], layer.last_routing(), TOP) for name, layer in layers.items()]
        attacked = stages.look(run.craft(pgd, batch), batch.labels)
        changes = [routing_change(clean[f"sets/{name}"], attacked[f"sets/{name}"]) for name in layers]
        changes = [change if change.dim() == 1 else change.mean(1) for change in changes]
        return {
            "right": clean["right"],
            "robust": attacked["right"],
            "spread": torch.stack(spread).mean(0),
            "change": torch.stack(changes).mean(0),
        }

    with attack_mode(subject.model):
        found = run.over("disagreement", look)
    kept, lost = (found["right"] & (found["robust"] == wanted) for wanted in (True, False))
    right = max(int(found["right"].sum()), 1)
    return {
        "images": len(run),
        "mean": found["spread"].mean().item(),
        "above": _above(found["spread"][lost], found["spread"][kept]),
        "lost": int(lost.sum()) / right,
        "kept": int(kept.sum()) / right,
        **{
            f"change_{name}": found["change"][mask].mean().item() if mask.any() else None
            for name, mask in (("lost", lost), ("kept", kept))
        },
    }


def _above(first: Tensor, second: Tensor) -> float:
    """Probability that a number of the first kind is above one of the second (Mann and Whitney's U over the pairs)."""
    if not (len(first) and len(second)):
        return 0.5
    difference = first[:, None] - second
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def radii(subject: Subject) -> dict[str, Any]:
    """:func:`~robust_moe.evaluation.vmoe_curve` on the first of the images: ``error``, the mean over its 20 radii, and
    ``curve``, all of it."""
    count = max(subject.count // RADII_SHARE, 1)
    index = subject.images.head_index(count)
    chosen = subject.images.subset(index)
    curve = vmoe_curve(
        *(subject.model, chosen.images, chosen.labels, index),
        steps=VMOE_STEPS,
        seed=subject.seed,
        batch_size=subject.batch_size,
    )
    return {"images": count, "error": statistics.fmean(curve["error"]), "curve": curve}
