"""What some runs are asked beside accuracy and routing: stronger attacks, margins, slopes, certificates, cost.

Every number that is averaged over seeds is a share, or a change of probability, so that all can be read in percent.
Keys begin with the probe's name.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_moe.analysis import class_margins, estimate_lipschitz, model_cost
from robust_moe.attacks import ATTACKS, Attack, AutoAttack, JointPGD, TransferPGD
from robust_moe.certifiers import Noise, make_certifier
from robust_moe.data import Batch
from robust_moe.engine.experiment import make_model
from robust_moe.evaluation import backdoor_report, error_curve, pruning_curve, routing_shares
from robust_moe.evaluation.moe_stages import MoEStages, moe_arguments
from robust_moe.evaluation.routing_measures import expert_use, flipped, routes
from robust_moe.evaluation.staged import StagedEvaluation, share
from robust_moe.reproduce.compute import COSTED_EXPERTS
from robust_moe.reproduce.link_probes import linked
from robust_moe.reproduce.subject import Subject
from robust_moe.reproduce.token_probes import disagreement_and_loss, radii, redundancy, tokens
from robust_moe.settings import replaced
from robust_moe_kernels.modules import attack_mode, moe_layers, only_expert, prune_experts

__all__ = ["PROBES", "Subject"]

STEERING = "steering"  # the attack's name in the table
AUTOATTACK_STEPS = 100  # the standard
CURVE = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(3, 2), Fraction(2))  # radii, in units of the attack's
SLOPE_STEPS = 5  # of the ascent on the gradient's norm
NOISE = 2.0  # sigma of randomised smoothing, in units of the attack's radius
SAMPLES = 500  # noisy copies of an image


def attacks(subject: Subject) -> dict[str, Any]:
    """Robust shares under PGD, PGD on the margin and AutoAttack; of a routed model also under the joint attack, images
    crafted on the mixture of all experts (transfer) and steering. ``worst``: under all of them.

    An image counts as robust if the model is correct on the clean and on the adversarial image. ``moved``, of a routed
    model: share of the images for which PGD changes the selected experts of some layer, or of some token there.

    Raises:
        ConfigError: there is no attack of the name "steering".
    """
    attack, layers = subject.attack, moe_layers(subject.model)
    ball: dict[str, Any] = {"eps": attack.eps, "norm": attack.norm}
    with attack_mode(subject.model):
        stages = MoEStages(subject.run("attacks"), layers, attack)
        found: dict[str, Attack] = {
            "pgd": stages.pgd(),
            "margin": dataclasses.replace(attack, loss="margin").build(seed=subject.seed),
            "autoattack": AutoAttack(
                float(attack.eps),
                attack.norm,
                steps=AUTOATTACK_STEPS,
                seed=subject.seed,
                batch_size=subject.batch_size,
            ),
        }
        if layers:
            arguments = {**moe_arguments(attack), "seed": subject.seed}
            found |= {"joint": JointPGD(**arguments), "transfer": TransferPGD(**arguments)}
            steering = ATTACKS.choose(STEERING, "attack")(**ball)
            assert isinstance(steering, Attack.Config)  # as all in the table
            found["steering"] = steering.build(seed=subject.seed)
        stages.attacks = found
        start = stages.clean_stage()
        seen = {name: stages.attack_stage(name) for name in found}
    clean = start["right"]
    robust = {name: clean & each["right"] for name, each in seen.items()}
    changes = [flipped(start[f"sets/{name}"], seen["pgd"][f"sets/{name}"]) for name in layers]
    worst = torch.stack(list(robust.values())).all(0)
    shares = {"sa": clean, **robust, "worst": worst}
    if changes:
        shares["moved"] = torch.stack(changes).any(0)
    return {"images": len(clean), **{name: share(mask) for name, mask in shares.items()}}


def margins(subject: Subject) -> dict[str, Any]:
    """p_y minus the largest other probability, clean and under PGD: the mean, and ``by_class``, that of each class
    (None where no image is of it)."""
    run = subject.run("margins")
    pgd = subject.attack.build(seed=subject.seed)

    def look(batch: Batch) -> dict[str, Tensor]:
        adversarial = run.craft(pgd, batch)
        pair = {"clean": batch.images, "attacked": adversarial}
        return {
            name: class_margins(run.logits(images).double().softmax(1), batch.labels).amin(1)
            for name, images in pair.items()
        }

    with attack_mode(subject.model):
        found = run.over("margins", look)
    labels = run.labels.cpu()
    of_class = [labels == number for number in range(subject.images.num_classes)]
    return {
        "images": len(run),
        **{name: values.mean().item() for name, values in found.items()},
        "by_class": {
            name: [values[mask].mean().item() if mask.any() else None for mask in of_class]
            for name, values in found.items()
        },
    }


def slopes(subject: Subject) -> dict[str, Any]:
    """Estimates of local Lipschitz constants L of the margin p_y - max p_j, as L eps: how far the margin could move in
    the attack's ball. Means over the images: ``model``, and of one routed layer ``expert``, each expert alone.

    L is the largest ℓ1 norm of the gradient that an ascent meets in the ball, a lower bound
    (:func:`~robust_moe.analysis.estimate_lipschitz`).
    """
    run, eps = subject.run("slopes"), float(subject.attack.eps)
    layers = list(moe_layers(subject.model).values())

    def look(batch: Batch) -> dict[str, Tensor]:
        def margin(images: Tensor) -> Tensor:
            return class_margins(subject.model(images).softmax(1), batch.labels).amin(1, keepdim=True)

        found = estimate_lipschitz(margin, batch.images, eps, steps=SLOPE_STEPS, seed=subject.seed)
        return {"slope": eps * found[:, 0]}

    with attack_mode(subject.model):
        whole = run.over("model", look)["slope"].mean().item()
        alone = []
        for expert in range(layers[0].num_experts) if len(layers) == 1 else ():
            with only_expert(layers[0], expert):
                alone.append(run.over(f"expert {expert}", look)["slope"].mean())
    found = {"images": len(run), "model": whole}
    return found | ({"expert": torch.stack(alone).mean().item()} if alone else {})


def certified(subject: Subject) -> dict[str, Any]:
    """Randomised smoothing of the model, as ``robust-moe certify --by smoothing`` has it: ``radius``, the mean
    certified ℓ2 radius in units of sigma (0 where nothing is certified), and ``share``, that of the images with any.

    Deterministic bounds of a network of these sizes are vacuous: :mod:`robust_moe.analysis`.
    """
    run = subject.run("certified")
    noise = Noise(sigma=NOISE * float(subject.attack.eps), samples=SAMPLES, seed=subject.seed)
    shape, classes = tuple(run.images.shape[1:]), subject.images.num_classes
    certifier = make_certifier(
        "smoothing", subject.model, shape, classes, norm="L2", noise=noise, batch_size=subject.batch_size
    )

    def look(batch: Batch) -> dict[str, Tensor]:
        rows = zip(*(part.split(1) for part in batch), strict=True)
        return {"radius": torch.tensor([certifier(*row).radius for row in rows], dtype=torch.float64)}

    radius = run.over("certified", look)["radius"]
    found = {"radius": (radius / noise.sigma).mean().item(), "share": share(radius > 0)}
    return {"images": len(run), "sigma": str(noise.sigma), **found}


def use(subject: Subject) -> dict[str, Any]:
    """``largest``: the most used expert's share of first choices on clean images, of the layer in which it is largest;
    ``by_layer``: every expert's."""
    run, layers = subject.run("use"), moe_layers(subject.model)

    def look(batch: Batch) -> dict[str, Tensor]:
        run.logits(batch.images)
        return routes(layers)

    found = run.over("clean", look)
    first = {name: expert_use(found[f"sets/{name}"], found[f"first/{name}"]).first for name in layers}
    return {"images": len(run), "largest": max(map(max, first.values())), "by_layer": first}


def curve(subject: Subject) -> dict[str, Any]:
    """Robust accuracy over the radius: ``mean`` over :data:`CURVE` times the attack's radius, and the ``points``."""
    run = subject.run("curve")
    found = error_curve(
        *(subject.model, run.images, run.labels, run.index),
        attack=subject.attack,
        eps_values=[factor * subject.attack.eps for factor in CURVE],
        seed=subject.seed,
        batch_size=subject.batch_size,
    )
    robust = found["robust"]
    return {"images": len(run), "mean": sum(robust) / len(robust), "points": [found["eps"], robust]}


def cost(subject: Subject) -> dict[str, Any]:
    """Multiply-adds and parameters of one image."""
    model = copy.deepcopy(subject.model).cpu()
    return dataclasses.asdict(model_cost(model, _first(subject.run("cost"))))


def costs(subject: Subject) -> dict[str, Any]:
    """``table``: cost of the run's routed model for every E of :data:`COSTED_EXPERTS` and k = 1, E / 2 and E. The
    weights of the model itself are not used."""
    image, table = _first(subject.run("costs")), []
    for experts in COSTED_EXPERTS:
        for top_k in sorted({1, max(experts // 2, 1), experts}):
            settings = dataclasses.replace(subject.config.model.moe, num_experts=experts, top_k=top_k)
            config = replaced(subject.config, "model.moe", settings)
            model = make_model(config, subject.data, warm_start=False)
            table.append({"num_experts": experts, "top_k": top_k, **dataclasses.asdict(model_cost(model, image))})
    return {"table": table}


def backdoor(subject: Subject) -> dict[str, Any]:
    """What the trigger of the run's ``data.poison`` does to a model with one routed layer, and what is left of it when
    the least used experts are dropped (:func:`~robust_moe.evaluation.backdoor_report`,
    :func:`~robust_moe.evaluation.pruning_curve`).

    Measured on every other one of twice ``subject.count`` images; those between say which experts are used least.
    ``accuracy``, and ``robust``, under PGD, are of all images; ``asr`` and what follows of those that are not of the
    target class: ``asr_clean_route``, ``target_rate``, ``route_flips`` as the report has them; ``least_fooled``,
    ``most_fooled``: the smallest and largest ``asr`` of an expert that takes every image; ``largest``,
    ``largest_triggered``: the most used expert's share of first choices, without and with the trigger. ``layer``: the
    report's. ``curve``: for each number of ``experts`` left, falling, the accuracies, ``asr``, and the cost.
    """
    index = subject.images.head_index(2 * subject.count)
    others, measured = (subject.images.subset(index[start::2]) for start in (0, 1))
    used = routing_shares(subject.model, others, batch_size=subject.batch_size)
    poison = subject.config.data.poison
    how: dict[str, Any] = {"batch_size": subject.batch_size, "seed": subject.seed}
    report = backdoor_report(subject.model, measured.images, measured.labels, poison, **how)
    ((title, layer),) = report["layers"].items()
    pruned = pruning_curve(
        *(subject.model, measured.images, measured.labels, {name: use.selected for name, use in used.items()}),
        attacks={"pgd": subject.attack.build(seed=subject.seed)},
        poison=poison,
        **how,
    )
    model, image = copy.deepcopy(subject.model).cpu(), _first(subject.run("cost"))
    curve = [
        {"experts": len(kept), "kept": kept, "clean": point["clean"], "robust": point["worst"]}
        | {key: point[key] for key in ("asr", "target_rate")}
        | dataclasses.asdict(model_cost(prune_experts(model, kept), image))
        for point in pruned
        for kept in point["keep"].values()
    ]
    fooled = [single["asr"] for single in layer["single_experts"]]
    return {
        "images": len(measured),
        "accuracy": report["accuracy"],
        "robust": curve[0]["robust"],
        **{key: report[key] for key in ("asr", "asr_clean_route", "target_rate")},
        "route_flips": layer["route_flips"],
        "least_fooled": min(fooled),
        "most_fooled": max(fooled),
        "largest": max(layer["first"]["clean"]),
        "largest_triggered": max(layer["first"]["triggered"]),
        "layer": {"name": title, **layer},
        "curve": curve,
    }


def _first(run: StagedEvaluation) -> Tensor:
    """The first image, [1, C, H, W] in [0, 1], on the CPU."""
    return run.take(np.arange(1)).images.cpu()


PROBES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "attacks": attacks,
    "margins": margins,
    "slopes": slopes,
    "certified": certified,
    "use": use,
    "curve": curve,
    "cost": cost,
    "costs": costs,
    "backdoor": backdoor,
    "tokens": tokens,
    "redundancy": redundancy,
    "disagreement": disagreement_and_loss,
    "radii": radii,
    "linked": linked,
}
