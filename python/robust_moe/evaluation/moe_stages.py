"""The stages that every evaluation of a mixture has: clean images, RA, RA-E, RA-R, and each expert alone.

SA, RA, RA-E and RA-R are the metrics of Zhang et al. (ICML 2025), the attacks those of :mod:`robust_moe.attacks`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from robust_moe.attacks import PGD, Attack, ExpertPGD, RouterPGD
from robust_moe.data import Batch
from robust_moe.evaluation.routing_measures import routes
from robust_moe.evaluation.staged import Attacked, StagedEvaluation
from robust_moe.settings import field_types, plain
from robust_moe_kernels.modules import MoELayer, only_expert

__all__ = ["MoEStages", "attack_settings", "measured_attacks", "moe_arguments", "title"]


class MoEStages:
    """What attacks find on a mixture: ``right`` and ``prediction`` of each image, and of each layer the chosen experts
    (:func:`~robust_moe.evaluation.routing_measures.routes`).

    Args:
        run: on a model whose gates decide; its seed is that of every attack.
        layers: the model's, by name.
        attack: settings of every attack; the loss is not ``"kl"``.
    """

    def __init__(self, run: StagedEvaluation, layers: dict[str, MoELayer], attack: PGD.Config) -> None:
        self.run, self.model, self.layers, self.settings = run, run.model, layers, attack
        self.number_of_classes = run.classes()
        self.attacks = measured_attacks(attack, run.seed)

    def pgd(self) -> PGD:
        """PGD on the model."""
        attack = self.settings.build(seed=self.run.seed)
        assert isinstance(attack, PGD)  # as its settings are
        return attack

    def clean_stage(self) -> dict[str, Tensor]:
        return self.run.over("clean", self.look_clean)

    def attack_stage(self, name: str) -> dict[str, Tensor]:
        """Of an entry of ``attacks``, on all images: for their routes also on those that are misclassified."""
        return self.run.over(name, partial(self.look_attacked, name))

    def single_stage(self, name: str, expert: int) -> tuple[Tensor, Tensor]:
        """Bool [n] each, clean and robust, where ``expert`` of the layer ``name`` takes every image."""
        layer = self.layers[name]
        return self.run.clean_and_robust(
            f"{title(name)} expert {expert}", self.pgd(), lambda _: only_expert(layer, expert)
        )

    # --- what a stage finds for each image of a batch -----------------------------------------------------------------

    def look(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What one forward of ``images`` shows."""
        return self.found(self.run.logits(images), labels)

    def found(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        prediction = logits.argmax(1)
        return {"right": prediction == labels, "prediction": prediction, **routes(self.layers)}

    def look_clean(self, batch: Batch) -> dict[str, Tensor]:
        return self.look(batch.images, batch.labels)

    def look_attacked(self, name: str, batch: Batch) -> dict[str, Tensor]:
        images, spent = self.craft(name, batch)
        return {**self.look(images, batch.labels), **spent}

    def craft(self, name: str, batch: Batch) -> Attacked:
        """The images of the attack ``name``."""
        return self.run.attacked(self.attacks[name], batch, self.settings.norm)


def measured_attacks(attack: PGD.Config, seed: int) -> dict[str, Attack]:
    """The attacks behind RA, RA-E and RA-R."""
    arguments = {**moe_arguments(attack), "seed": seed}
    return {"ra": attack.build(seed=seed), "ra_e": ExpertPGD(**arguments), "ra_r": RouterPGD(**arguments)}


def moe_arguments(attack: PGD.Config) -> dict[str, Any]:
    """Arguments of the attacks on mixtures: those that settings of PGD have, whatever a subclass adds."""
    return {name: value for name, value in attack.arguments().items() if name in field_types(PGD.Config)}


def attack_settings(attack: PGD.Config) -> dict[str, Any]:
    """Settings that decide the images, plain values by name: all but how the steps run (``graph``)."""
    return {name: value for name, value in plain(attack).items() if name not in ("name", "graph")}


def title(name: str) -> str:
    """What a layer is called in results: a model that is itself a layer has no name."""
    return name or "model"
