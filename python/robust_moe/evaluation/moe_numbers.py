"""What the evaluation of a mixture measures beside accuracies, and the numbers that it comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_moe.attacks import PGD, Attack, JointPGD, RouterPGD, TransferPGD
from robust_moe.data import Batch
from robust_moe.evaluation.moe_stages import MoEStages, attack_settings, measured_attacks, moe_arguments, title
from robust_moe.evaluation.outcome import MOE, Stage, StageResult
from robust_moe.evaluation.results import wilson_interval
from robust_moe.evaluation.routing_measures import (
    by_class,
    by_sample,
    change_numbers,
    disagreement,
    distance,
    expert_use,
    gradient_share,
    layer_inputs,
    quantiles,
    top_k_margin,
)
from robust_moe.evaluation.staged import StagedEvaluation, share
from robust_moe.evaluation.stages import as_fraction
from robust_moe_kernels.modules import (
    DropTop,
    MoELayer,
    RandomRoutes,
    Reroute,
    SwapTop,
    last_routes,
    rerouted,
)
from robust_moe_kernels.ops.attack_step import random_start

__all__ = ["RANDOM_POINTS", "MoENumbers", "mixture_attacks"]

RANDOM_POINTS = 4  # of the ball, a sample, in which the Lipschitz estimate looks beside the adversarial ones
_RANDOM_STREAMS = 0x4C490000  # of those points: other numbers than the attacks' starts


def mixture_attacks(attack: PGD.Config, seed: int) -> dict[str, Attack]:
    """All attacks of :class:`MoENumbers`, by name."""
    arguments = {**moe_arguments(attack), "seed": seed}
    return {
        **measured_attacks(attack, seed),
        "ra_r_targeted": RouterPGD(**arguments, targeted=True, routes=None),
        "joint": JointPGD(**arguments),
        "transfer": TransferPGD(**arguments),
    }


class MoENumbers(MoEStages):
    """The stages of :func:`~robust_moe.evaluation.moe.run_moe`, and their numbers. Arguments: see
    :class:`~robust_moe.evaluation.moe_stages.MoEStages`."""

    def __init__(self, run: StagedEvaluation, layers: dict[str, MoELayer], attack: PGD.Config) -> None:
        super().__init__(run, layers, attack)
        self.attacks = mixture_attacks(attack, run.seed)
        singles = sum(layer.num_experts for layer in layers.values())
        imposed = sum(3 for layer in layers.values() if layer.num_experts > 1)
        run.stages_in_all = 2 + len(self.attacks) + singles + imposed  # and the clean images, and random points
        self.clean: dict[str, Tensor] = {}

    def results(self) -> tuple[dict[str, Any], list[StageResult]]:
        """(numbers, what each attack on the model did)."""
        clean = self.clean = self.clean_stage()
        found = {name: self.attack_stage(name) for name in self.attacks}
        random = self.run.over("random points", self._random_points)
        robust = {name: clean["right"] & attack["right"] for name, attack in found.items()}
        shares = {"sa": clean["right"], **robust, "union": torch.stack(list(robust.values())).all(0)}
        accuracies: dict[str, Any] = {name: share(mask) for name, mask in shares.items()}
        for name in shares:
            accuracies[f"{name}_interval"] = list(wilson_interval(accuracies[name], len(self.run)))
        pgd = self.pgd()
        lengths = {"eps": as_fraction(pgd.eps), "alpha": as_fraction(pgd.alpha)}
        layers = {title(name): self._layer(number, name, found, random) for number, name in enumerate(self.layers)}
        numbers = {
            "layers": layers,
            **accuracies,
            "lipschitz": self._lipschitz("slope", found, random),
            "settings": {**attack_settings(self.settings), **lengths, "seed": self.run.seed},
        }
        return numbers, [self._stage(name, seen) for name, seen in found.items()]

    def _stage(self, name: str, seen: dict[str, Tensor]) -> StageResult:
        alone = share(self.clean["right"] & seen["right"])
        return StageResult.of(
            Stage(name, self.attacks[name], f"{MOE}/{name}"),
            self.clean["prediction"].numpy(),
            self.run.labels.numpy(force=True),
            np.arange(len(self.run)),
            {key: value.numpy() for key, value in seen.items()},
            robust_after=alone,
            alone=alone,
        )

    # --- stages: what each finds for every image of a batch -----------------------------------------------------------

    def look(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Also logits, and each layer's gate logits."""
        logits = self.run.logits(images)
        found = {**self.found(logits, labels), "logits": logits}
        for name, layer in self.layers.items():
            record = layer.last_routing()
            found[f"gate/{name}"] = by_sample(record.clean_logits.double(), record)  # exact for every dtype
        return found

    def look_clean(self, batch: Batch) -> dict[str, Tensor]:
        with layer_inputs(self.layers) as inputs:
            found = self.look(batch.images, batch.labels)
        for name, layer in self.layers.items():
            found[f"disagreement/{name}"] = disagreement(layer, inputs[name], layer.last_routing())
        for name in self.layers:
            found[f"gradient/{name}"] = gradient_share(self.model, name, batch.images, batch.labels)
        del found["logits"]  # of many images and classes; nothing reads them any more
        return found

    def look_attacked(self, name: str, batch: Batch) -> dict[str, Tensor]:
        clean = self.look(batch.images, batch.labels)
        clean_routes = last_routes(self.model)
        images, spent = self.craft(name, batch)
        found = {**self.look(images, batch.labels), **spent}
        self._slopes(batch, clean, images, found)
        if name == "ra":
            adversarial_routes = last_routes(self.model)
            for layer in self.layers:
                with rerouted(self.model, {layer: clean_routes[layer]}):
                    kept = self.run.right(images, batch.labels)
                with rerouted(self.model, {layer: adversarial_routes[layer]}):
                    found[f"adversarial route/{layer}"] = self.run.right(batch.images, batch.labels)
                found[f"clean route/{layer}"] = clean["right"] & kept
        return found

    def _slopes(self, batch: Batch, clean: dict[str, Tensor], images: Tensor, found: dict[str, Tensor]) -> None:
        """Put, into what was found at ``images``, how fast logits and gate logits moved towards it in their place."""
        reach = distance(images, batch.images, self.settings.norm)
        for key, slope in (("logits", "slope"), *((f"gate/{name}", f"slope/{name}") for name in self.layers)):
            found[slope] = torch.where(reach > 0, distance(found.pop(key), clean[key], "L2") / reach, 0.0)

    def _random_points(self, batch: Batch) -> dict[str, Tensor]:
        """The steepest of several random points, by each slope."""
        clean = self.look(batch.images, batch.labels)
        steepest: dict[str, Tensor] = {}
        eps, norm = float(self.settings.eps), self.settings.norm
        for number in range(RANDOM_POINTS):
            images = random_start(batch.images, eps, self.run.seed, batch.index, _RANDOM_STREAMS + number, norm)
            found = self.look(images, batch.labels)
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
        sets = clean[f"sets/{name}"]
        by_attack = {attack: change_numbers(sets, seen[f"sets/{name}"]) for attack, seen in found.items()}
        margin = top_k_margin(clean[f"gate/{name}"], layer.top_k)
        seen_by = {"clean": clean, "adversarial": ra}
        uses = {which: expert_use(seen[f"sets/{name}"], seen[f"first/{name}"]) for which, seen in seen_by.items()}
        return {
            "experts": layer.num_experts,
            "top_k": layer.top_k,
            **({"tokens": sets.shape[1]} if sets.dim() == 3 else {}),
            "selected": {which: use.selected for which, use in uses.items()},
            "first": {which: use.first for which, use in uses.items()},
            "collapsed": uses["clean"].collapsed,
            "expert_by_class": {
                which: by_class(seen[f"sets/{name}"], self.run.labels.cpu(), self.number_of_classes)
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
        clean, robust = self.single_stage(name, expert)
        return {"expert": expert, "clean": share(clean), "robust": share(robust)}

    def _protocols(self, number: int, name: str, ra: dict[str, Tensor]) -> dict[str, Any]:
        impose: dict[str, Callable[[Batch], Reroute]] = {
            "drop_top": lambda _: DropTop(),
            "swap": lambda _: SwapTop(),
            "random": lambda batch: RandomRoutes(batch.index, self.run.seed, number),
        }
        protocols: dict[str, Any] = dict.fromkeys(impose)
        if self.layers[name].num_experts > 1:
            for protocol, routes in impose.items():
                protocols[protocol] = self._imposed(name, protocol, routes)
        kept = {"clean": share(self.clean["right"]), "robust": share(ra[f"clean route/{name}"])}
        carried = {"clean": share(ra[f"adversarial route/{name}"]), "robust": None}
        return {**protocols, "clean_route_on_adversarial": kept, "adversarial_route_on_clean": carried}

    def _imposed(self, name: str, protocol: str, routes: Callable[[Batch], Reroute]) -> dict[str, float]:
        clean, robust = self.run.clean_and_robust(
            f"{title(name)} {protocol}", self.pgd(), lambda batch: rerouted(self.model, {name: routes(batch)})
        )
        return {"clean": share(clean), "robust": share(robust)}
