"""What a mixture of experts is worth under attack: RA, RA-E, RA-R, and what its routing does meanwhile.

SA, RA, RA-E and RA-R are the metrics of Zhang et al. (ICML 2025), the attacks those of :mod:`robust_moe.attacks.moe`.
Single experts and collapse: Robust Experts (arXiv:2509.05086). Routing change, and the protocols that impose routes:
Puigcerver et al. (2022, arXiv:2210.10253).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, Attack, ExpertPGD, JointPGD, RouterPGD
from robust_moe.data import Batch, ImageSet
from robust_moe.evaluation.batches import Task
from robust_moe.evaluation.results import wilson_interval
from robust_moe.evaluation.routing_measures import (
    by_class,
    disagreement,
    distance,
    expert_sets,
    expert_use,
    gradient_share,
    quantiles,
    routing_change,
    top_k_margin,
)
from robust_moe.evaluation.stages import as_fraction
from robust_moe.evaluation.store import Journal
from robust_moe.evaluation.study import Study, share
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import (
    AllExperts,
    DropTop,
    MoELayer,
    RandomRoutes,
    Reroute,
    SwapTop,
    attack_mode,
    last_routes,
    moe_layers,
    rerouted,
)
from robust_moe_kernels.ops.attack_step import random_start

__all__ = ["evaluate_moe"]

RANDOM_POINTS = 4  # of the ball, a sample, in which the Lipschitz estimate looks beside the adversarial ones
_RANDOM_STREAMS = 0x4C490000  # of those points: other numbers than the attacks' starts


def evaluate_moe(
    model: nn.Module,
    images: Tensor | ImageSet,
    labels: Tensor,
    index: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    alpha: float | None = None,
    steps: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    journal: Journal | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Everything a result file says under ``"moe"``; all shares are of all n images, all attacks PGD.

    A point is robust against an attack if it is right as it is and attacked. ``union``: against all of ``ra`` (PGD on
    the model), ``ra_e``, ``ra_r``, ``joint`` (classification and router together, soft gradient; by itself it may be
    weaker than ``ra``) and ``transfer``
    (images crafted on the soft mixture of all experts and handed to the model: where they break more than PGD on the
    model itself, hard routing hides gradients). ``lipschitz`` is an *estimate from below*: the largest ‖ΔF‖₂ / ‖Δx‖
    (the attack's norm) over the images of those attacks and ``RANDOM_POINTS`` random ones of the ball; nothing is
    certified by it.

    Of each layer: ``routing_change`` (mean 1 − IoU of the selected experts) and ``route_flips`` (share whose selected
    set changed) between an image and its ``ra`` version, and for every attack under ``by_attack``; ``margin``, k-th
    less next gate logit on clean images (null for k = E); ``disagreement`` (:mod:`.routing_measures`); ``lipschitz`` of
    the gate's logits; ``single_experts``, each taking every image of that layer, attacked through it; ``protocols``
    with that layer's routes imposed, attack included: ``drop_top``, ``swap``, ``random`` (null for one expert; for
    k = 1 the first two are one function, but the attack climbs it by the gradient of another expert's score);
    ``clean_route_on_adversarial``: the ``ra`` images on their clean routes, nothing attacked anew; the reverse,
    ``adversarial_route_on_clean``, has no attack. ``expert_by_class``: a row a class, zeros where it has no images.

    Args:
        model: with MoE layers in which the gates decide; left exactly as found, routing records included.
        images: float32 [n, C, H, W] in [0, 1], or bytes (uint8, 0..255), or an image set; n >= 1.
        labels: int64 [n], 0..classes-1.
        index: int64 [n], positions in the data set: counters of all random numbers.
        eps, norm, alpha, steps, seed: of every attack, see :class:`~robust_moe.attacks.PGD`.
        batch_size: images a forward; changes nothing but speed, up to the rounding of the model's kernels.
        journal: where every batch of every stage is kept: with a journal of the same identity, what it holds is not
            computed again; None: in memory.
        task: shows the progress of each stage; see :meth:`robust_moe.engine.Reporter.task`.

    Raises:
        ValueError: a dense model; a layer with a fixed expert or imposed routes; a bad input.
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
    """
    layers = moe_layers(model)
    expect(len(layers) > 0, "model", "at least one mixture-of-experts layer (a dense model has no such entry)", "none")
    for name, layer in layers.items():
        free = layer.fixed_expert is None and layer.reroute is None
        expect(free, f"model layer {name!r}", "its gate to decide", "a fixed expert or imposed routes")
    settings = {"eps": eps, "steps": steps, "alpha": alpha, "norm": norm, "seed": seed}
    with attack_mode(model):
        study = Study("moe", model, images, labels, index, batch_size, seed, journal, task)
        return _MoEStudy(study, layers, settings).results()


class _MoEStudy:
    """The stages of one evaluation. ``attacks``: by name, each with the routes under which it is crafted."""

    def __init__(self, study: Study, layers: dict[str, MoELayer], settings: dict[str, Any]) -> None:
        self.study, self.model, self.layers, self.settings = study, study.model, layers, settings
        self.attacks: dict[str, tuple[Attack, dict[str, Reroute]]] = {
            "ra": (PGD(**settings), {}),
            "ra_e": (ExpertPGD(**settings), {}),
            "ra_r": (RouterPGD(**settings), {}),
            "joint": (JointPGD(**settings), {}),
            "transfer": (PGD(**settings), dict.fromkeys(layers, AllExperts())),
        }
        singles = sum(layer.num_experts for layer in layers.values())
        imposed = sum(3 for layer in layers.values() if layer.num_experts > 1)
        study.stages_in_all = 2 + len(self.attacks) + singles + imposed  # and the clean images, and random points
        self.clean: dict[str, Tensor] = {}

    def results(self) -> dict[str, Any]:
        clean = self.clean = self.study.over("clean", self._clean)
        found = {
            name: self.study.over(name, self._attack(*attack, imposes=name == "ra"))
            for name, attack in self.attacks.items()
        }
        random = self.study.over("random points", self._random_points)
        robust = {name: clean["right"] & attack["right"] for name, attack in found.items()}
        shares = {"sa": clean["right"], **robust, "union": torch.stack(list(robust.values())).all(0)}
        accuracies: dict[str, Any] = {name: share(mask) for name, mask in shares.items()}
        for name in shares:
            accuracies[f"{name}_interval"] = list(wilson_interval(accuracies[name], len(self.study)))
        pgd = self.attacks["ra"][0]
        return {
            "layers": {
                _title(name): self._layer(number, name, found, random) for number, name in enumerate(self.layers)
            },
            **accuracies,
            "lipschitz": self._lipschitz("slope", found, random),
            "settings": {**self.settings, "eps": as_fraction(pgd.eps), "alpha": as_fraction(pgd.alpha)},
        }

    # --- stages: what each finds for every image of a batch -----------------------------------------------------------

    def _look(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Right or wrong, logits, and each layer's selected experts and gate logits."""
        logits = self.study.logits(images)
        found = {"right": logits.argmax(1) == labels, "logits": logits}
        for name, layer in self.layers.items():
            found[f"first/{name}"] = layer.routing.indices[:, 0]
            found[f"sets/{name}"] = expert_sets(layer.routing.indices, layer.num_experts)
            found[f"gate/{name}"] = layer.routing.clean_logits.double()  # exact for every dtype
        return found

    def _clean(self, batch: Batch) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0].detach()}))
            for name, layer in self.layers.items()
        ]
        try:
            found = self._look(batch.images, batch.labels)
        finally:
            for hook in hooks:
                hook.remove()
        for name, layer in self.layers.items():
            found[f"disagreement/{name}"] = disagreement(layer, inputs[name], layer.routing)
        for name in self.layers:
            found[f"gradient/{name}"] = gradient_share(self.model, name, batch.images, batch.labels)
        del found["logits"]  # of many images and classes; nothing reads them any more
        return found

    def _slopes(self, batch: Batch, clean: dict[str, Tensor], images: Tensor, found: dict[str, Tensor]) -> None:
        """Add to what was found at ``images`` how fast logits and gate logits moved towards it."""
        reach = distance(images, batch.images, self.settings["norm"])
        for key, slope in (("logits", "slope"), *((f"gate/{name}", f"slope/{name}") for name in self.layers)):
            found[slope] = torch.where(reach > 0, distance(found[key], clean[key], "L2") / reach, 0.0)
        del found["logits"]

    def _attack(
        self, attack: Attack, routes: dict[str, Reroute], imposes: bool
    ) -> Callable[[Batch], dict[str, Tensor]]:
        def stage(batch: Batch) -> dict[str, Tensor]:
            clean = self._look(batch.images, batch.labels)
            clean_routes = last_routes(self.model)
            with rerouted(self.model, routes):
                images = self.study.attacked(attack, batch)
            found = self._look(images, batch.labels)
            self._slopes(batch, clean, images, found)
            if imposes:
                adversarial_routes = last_routes(self.model)
                for name in self.layers:
                    with rerouted(self.model, {name: clean_routes[name]}):
                        kept = self.study.right(images, batch.labels)
                    with rerouted(self.model, {name: adversarial_routes[name]}):
                        found[f"adversarial route/{name}"] = self.study.right(batch.images, batch.labels)
                    found[f"clean route/{name}"] = clean["right"] & kept
            return found

        return stage

    def _random_points(self, batch: Batch) -> dict[str, Tensor]:
        """The steepest of several random points, by each slope."""
        clean, steepest = self._look(batch.images, batch.labels), {}
        eps, seed, norm = self.settings["eps"], self.settings["seed"], self.settings["norm"]
        for number in range(RANDOM_POINTS):
            images = random_start(batch.images, eps, seed, batch.index, _RANDOM_STREAMS + number, norm)
            found = self._look(images, batch.labels)
            self._slopes(batch, clean, images, found)
            for name, value in found.items():
                if name.startswith("slope"):
                    steepest[name] = torch.maximum(steepest.get(name, value), value)
        return steepest

    # --- what the stages found, as plain types ------------------------------------------------------------------------

    def _lipschitz(self, slope: str, found: dict[str, dict[str, Tensor]], random: dict[str, Tensor]) -> dict[str, Any]:
        steepest = torch.stack([random[slope], *(attack[slope] for attack in found.values())]).amax(0)
        return {"points": RANDOM_POINTS + len(found), **quantiles(steepest)}

    def _layer(
        self, number: int, name: str, found: dict[str, dict[str, Tensor]], random: dict[str, Tensor]
    ) -> dict[str, Any]:
        layer, clean, ra = self.layers[name], self.clean, found["ra"]
        changes = {
            attack: routing_change(clean[f"sets/{name}"], seen[f"sets/{name}"]) for attack, seen in found.items()
        }
        by_attack = {
            attack: {"routing_change": change.mean().item(), "route_flips": share(change > 0)}
            for attack, change in changes.items()
        }
        margin = top_k_margin(clean[f"gate/{name}"], layer.top_k)
        seen_by = {"clean": clean, "adversarial": ra}
        uses = {which: expert_use(seen[f"sets/{name}"], seen[f"first/{name}"]) for which, seen in seen_by.items()}
        return {
            "experts": layer.num_experts,
            "top_k": layer.top_k,
            "selected": {which: use.selected for which, use in uses.items()},
            "first": {which: use.first for which, use in uses.items()},
            "collapsed": uses["clean"].collapsed,
            "expert_by_class": {
                which: by_class(seen[f"sets/{name}"], self.study.labels.cpu(), self.study.classes)
                for which, seen in seen_by.items()
            },
            **by_attack["ra"],
            "by_attack": by_attack,
            "margin": None if margin is None else quantiles(margin),
            "disagreement": {
                **quantiles(clean[f"disagreement/{name}"]),
                "gradient_share": clean[f"gradient/{name}"].mean().item(),
            },
            "lipschitz": self._lipschitz(f"slope/{name}", found, random),
            "single_experts": [self._single(name, expert) for expert in range(layer.num_experts)],
            "protocols": self._protocols(number, name, ra),
        }

    def _single(self, name: str, expert: int) -> dict[str, Any]:
        clean, robust = self.study.clean_and_robust(
            f"{_title(name)} expert {expert}", PGD(**self.settings), lambda _: _only(self.layers[name], expert)
        )
        return {"expert": expert, "clean": clean, "robust": robust}

    def _protocols(self, number: int, name: str, ra: dict[str, Tensor]) -> dict[str, Any]:
        impose: dict[str, Callable[[Batch], Reroute]] = {
            "drop_top": lambda _: DropTop(),
            "swap": lambda _: SwapTop(),
            "random": lambda batch: RandomRoutes(batch.index, self.settings["seed"], number),
        }
        protocols: dict[str, Any] = dict.fromkeys(impose)
        if self.layers[name].num_experts > 1:
            for protocol, routes in impose.items():
                clean, robust = self.study.clean_and_robust(
                    f"{_title(name)} {protocol}",
                    PGD(**self.settings),
                    lambda batch, routes=routes: rerouted(self.model, {name: routes(batch)}),
                )
                protocols[protocol] = {"clean": clean, "robust": robust}
        kept = {"clean": share(self.clean["right"]), "robust": share(ra[f"clean route/{name}"])}
        carried = {"clean": share(ra[f"adversarial route/{name}"]), "robust": None}
        return {**protocols, "clean_route_on_adversarial": kept, "adversarial_route_on_clean": carried}


def _title(name: str) -> str:
    """What a layer is called in results: a model that is itself a layer has no name."""
    return name or "model"


@contextmanager
def _only(layer: MoELayer, expert: int) -> Iterator[None]:
    layer.fixed_expert = expert
    try:
        yield
    finally:
        layer.fixed_expert = None
