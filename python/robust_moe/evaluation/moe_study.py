"""The stages of a mixture's evaluation: what each finds for every image, and the numbers that it comes to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robust_moe.attacks import PGD, Attack, Counts, ExpertPGD, JointPGD, RouterPGD
from robust_moe.data import Batch
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
from robust_moe.evaluation.stages import MOE, Stage, StageResult, as_fraction
from robust_moe.evaluation.study import Study, only_expert, share
from robust_moe_kernels.modules import (
    AllExperts,
    DropTop,
    MoELayer,
    RandomRoutes,
    Reroute,
    SwapTop,
    last_routes,
    rerouted,
)
from robust_moe_kernels.ops.attack_step import random_start

__all__ = ["RANDOM_POINTS", "MoEStudy"]

RANDOM_POINTS = 4  # of the ball, a sample, in which the Lipschitz estimate looks beside the adversarial ones
_RANDOM_STREAMS = 0x4C490000  # of those points: other numbers than the attacks' starts


class MoEStudy:
    """The stages of one evaluation. ``attacks``: by name, each with the routes under which it is crafted.

    Args:
        settings: of every attack, by the names of its arguments.
        graph: see :class:`~robust_moe.attacks.PGD`.
    """

    def __init__(
        self, study: Study, layers: dict[str, MoELayer], settings: dict[str, Any], graph: str | bool = "auto"
    ) -> None:
        self.study, self.model, self.layers, self.settings = study, study.model, layers, settings
        self.graph = graph
        self.attacks: dict[str, tuple[Attack, dict[str, Reroute]]] = {
            "ra": (self._pgd(), {}),
            "ra_e": (ExpertPGD(**settings, graph=graph), {}),
            "ra_r": (RouterPGD(**settings, graph=graph), {}),
            "joint": (JointPGD(**settings, graph=graph), {}),
            "transfer": (self._pgd(), dict.fromkeys(layers, AllExperts())),
        }
        singles = sum(layer.num_experts for layer in layers.values())
        imposed = sum(3 for layer in layers.values() if layer.num_experts > 1)
        study.stages_in_all = 2 + len(self.attacks) + singles + imposed  # and the clean images, and random points
        self.clean: dict[str, Tensor] = {}

    def _pgd(self) -> PGD:
        return PGD(**self.settings, graph=self.graph)

    def results(self) -> tuple[dict[str, Any], list[StageResult]]:
        """(numbers, what each attack on the model did)."""
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
        numbers = {
            "layers": {
                _title(name): self._layer(number, name, found, random) for number, name in enumerate(self.layers)
            },
            **accuracies,
            "lipschitz": self._lipschitz("slope", found, random),
            "settings": {**self.settings, "eps": as_fraction(pgd.eps), "alpha": as_fraction(pgd.alpha)},
        }
        return numbers, [self._stage(name, seen) for name, seen in found.items()]

    def _stage(self, name: str, seen: dict[str, Tensor]) -> StageResult:
        right = self.clean["right"] & seen["right"]
        forward, backward, seconds = seen["spent"].sum(0).tolist()
        return StageResult(
            stage=Stage(name, self.attacks[name][0], f"{MOE}/{name}"),
            attacked=torch.ones_like(right).numpy(),
            broken=(self.clean["right"] & ~right).numpy(),
            prediction=seen["prediction"].numpy(),
            robust_after=share(right),
            alone=share(right),
            counts=Counts(round(forward), round(backward)),
            seconds=seconds,
            reach=seen["reach"].max().item(),
            low=seen["low"].min().item(),
            high=seen["high"].max().item(),
        )

    # --- stages: what each finds for every image of a batch -----------------------------------------------------------

    def _look(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Right or wrong, logits, and each layer's selected experts and gate logits."""
        logits = self.study.logits(images)
        prediction = logits.argmax(1)
        found = {"right": prediction == labels, "prediction": prediction, "logits": logits}
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
        found["reach"] = reach
        del found["logits"]

    def _attack(
        self, attack: Attack, routes: dict[str, Reroute], imposes: bool
    ) -> Callable[[Batch], dict[str, Tensor]]:
        def stage(batch: Batch) -> dict[str, Tensor]:
            clean = self._look(batch.images, batch.labels)
            clean_routes = last_routes(self.model)
            made, began = Counts(), time.perf_counter()
            with rerouted(self.model, routes):
                images = self.study.attacked(attack, batch, made)
            took = time.perf_counter() - began
            found = self._look(images, batch.labels)
            # each image's part of what its batch took
            spent = torch.tensor([made.forward, made.backward, took], dtype=torch.float64) / len(images)
            found["spent"] = spent.expand(len(images), 3)
            found["low"], found["high"] = (bound.double() for bound in images.flatten(1).aminmax(dim=1))
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
            f"{_title(name)} expert {expert}", self._pgd(), lambda _: only_expert(self.layers[name], expert)
        )
        return {"expert": expert, "clean": share(clean), "robust": share(robust)}

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
                    self._pgd(),
                    lambda batch, routes=routes: rerouted(self.model, {name: routes(batch)}),
                )
                protocols[protocol] = {"clean": share(clean), "robust": share(robust)}
        kept = {"clean": share(self.clean["right"]), "robust": share(ra[f"clean route/{name}"])}
        carried = {"clean": share(ra[f"adversarial route/{name}"]), "robust": None}
        return {**protocols, "clean_route_on_adversarial": kept, "adversarial_route_on_clean": carried}


def _title(name: str) -> str:
    """What a layer is called in results: a model that is itself a layer has no name."""
    return name or "model"
