"""What a backdoor trigger does to a model: attack success rate of the whole, of each expert, and by route.

The trigger is that of :mod:`robust_moe.data.poison` (BadNets, arXiv:1708.06733).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robust_moe.data import Batch, PoisonConfig, triggered
from robust_moe.evaluation.moe_stages import title
from robust_moe.evaluation.results import wilson_interval
from robust_moe.evaluation.routing_measures import change_numbers, expert_use, routes
from robust_moe.evaluation.staged import StagedEvaluation, Task, share
from robust_moe.settings import plain
from robust_moe.tokens import main_expert
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer, attack_mode, last_routes, moe_layers, only_expert, rerouted

__all__ = ["backdoor_report"]


def backdoor_report(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    poison: PoisonConfig,
    *,
    batch_size: int = 256,
    seed: int = 0,
    task: Task | None = None,
) -> dict[str, Any]:
    """Attack success rate and routing of images with the trigger of ``poison``, as plain numbers.

    ``accuracy`` is of all n clean images. Everything else is of the m images that are not of the target class:

    - ``asr``, attack success rate: share taken for the target class with the trigger; ``asr_interval``: Wilson's, 95 %.
    - ``target_rate``: share taken for the target class without the trigger, what an ``asr`` of no backdoor would be.
    - ``triggered_accuracy``: share that is right with the trigger.
    - ``asr_clean_route``: ``asr`` where every layer routes the image as its clean version, high where the experts alone
      hold the backdoor; ``target_rate_triggered_route``: ``target_rate`` where it routes the clean image as the one
      with the trigger, high where the route alone does. Null for a dense model.
    - ``layers``, by name: ``selected`` and ``first``, shares of each expert on clean and on triggered images;
      ``routing_change``, mean 1 − IoU of the selected experts between the two, and ``route_flips``, share whose
      selected set changed, of a layer that routes tokens that of any token, and ``token_flips``, share of tokens;
      ``asr_by_first``, ``asr`` of the images with the trigger whose first choice, or that of most tokens, is each
      expert, null where there is none; ``single_experts``: ``accuracy``, ``asr`` and ``target_rate`` where one expert
      takes every image of that layer.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits, dense or with MoE layers in which the gates decide; left as found.
        images: clean ones, uint8 or float32 [n, C, H, W]; at least one not of the target class.
        labels: int64 [n].
        poison: the trigger and the target; its ``share`` is not used.
        batch_size: images a forward.
        seed: of what the model itself draws.
        task: shows the progress of each stage.

    Raises:
        ValueError: a bad input; a layer with a fixed expert or imposed routes.
        FloatingPointError: a logit is NaN or infinite.
    """
    layers = moe_layers(model)
    for name, layer in layers.items():
        free = layer.fixed_expert is None and layer.reroute is None
        expect(free, f"model layer {name!r}", "its gate to decide", "a fixed expert or imposed routes")
    with attack_mode(model):
        run = StagedEvaluation(model, images, labels, name="backdoor", batch_size=batch_size, seed=seed, task=task)
        others = not_of_target(run.labels.cpu(), run.classes(), poison)
        return _Backdoor(run, layers, poison, others).report()


def not_of_target(labels: Tensor, classes: int, poison: PoisonConfig) -> Tensor:
    """Images of another class than the target of ``poison``, bool [n]: those that a trigger is put on.

    Args:
        labels: int64 [n].
        classes: of the model.
        poison: the trigger and the target.

    Raises:
        ValueError: the model has no such class; no image is of another one.
    """
    expect(poison.target < classes, "poison.target", f"a class in 0..{classes - 1}", poison.target)
    others = labels != poison.target
    expect(bool(others.any()), "labels", f"an image of another class than the target {poison.target}", "none")
    return others


class _Backdoor:
    """The stages of :func:`backdoor_report`; others: bool [n], images not of the target class."""

    def __init__(
        self, run: StagedEvaluation, layers: dict[str, MoELayer], poison: PoisonConfig, others: Tensor
    ) -> None:
        self.run, self.layers, self.poison, self.others = run, layers, poison, others
        self.labels = run.labels.cpu()

    def report(self) -> dict[str, Any]:
        found = self.run.over("whole model", self._look)
        trigger = plain(self.poison)
        del trigger["share"]
        rates = self._rates(found)
        held = {
            "asr_clean_route": self._rate(found["clean route"]) if self.layers else None,
            "target_rate_triggered_route": self._rate(found["triggered route"]) if self.layers else None,
        }
        return {
            "trigger": trigger,
            "images": len(self.labels),
            "attacked": int(self.others.sum()),
            **rates,
            "asr_interval": list(wilson_interval(rates["asr"], int(self.others.sum()))),
            "triggered_accuracy": share((found["triggered"] == self.labels)[self.others]),
            **held,
            "layers": {title(name): self._layer(name, layer, found) for name, layer in self.layers.items()},
        }

    # --- stages: what each finds for every image of a batch -----------------------------------------------------------

    def _classes(self, images: Tensor) -> Tensor:
        return self.run.logits(images).argmax(1)

    def _look_single(self, batch: Batch) -> dict[str, Tensor]:
        marked = triggered(batch.images, self.poison)
        return {"clean": self._classes(batch.images), "triggered": self._classes(marked)}

    def _look(self, batch: Batch) -> dict[str, Tensor]:
        versions = {"clean": batch.images, "triggered": triggered(batch.images, self.poison)}
        found, taken = {}, {}
        for which, images in versions.items():
            found[which] = self._classes(images)
            found |= {f"{which}/{key}": value for key, value in routes(self.layers).items()}
            taken[which] = last_routes(self.run.model)
        if self.layers:
            for which, other in (("clean", "triggered"), ("triggered", "clean")):
                with rerouted(self.run.model, taken[which]):
                    found[f"{which} route"] = self._classes(versions[other])
        return found

    # --- what the stages found, as plain types ------------------------------------------------------------------------

    def _rate(self, classes: Tensor) -> float:
        """Share of the attacked images that are taken for the target; classes: int64 [n]."""
        return share(classes[self.others] == self.poison.target)

    def _rates(self, found: dict[str, Tensor]) -> dict[str, float]:
        return {
            "accuracy": share(found["clean"] == self.labels),
            "asr": self._rate(found["triggered"]),
            "target_rate": self._rate(found["clean"]),
        }

    def _layer(self, name: str, layer: MoELayer, found: dict[str, Tensor]) -> dict[str, Any]:
        sets = {which: found[f"{which}/sets/{name}"][self.others] for which in ("clean", "triggered")}
        first = {which: found[f"{which}/first/{name}"][self.others] for which in ("clean", "triggered")}
        uses = {which: expert_use(sets[which], first[which]) for which in sets}
        hit = found["triggered"][self.others] == self.poison.target
        chosen = first["triggered"]
        chosen = chosen if chosen.dim() == 1 else main_expert(chosen, layer.num_experts)
        by_first = [hit[chosen == expert] for expert in range(layer.num_experts)]
        return {
            "experts": layer.num_experts,
            "top_k": layer.top_k,
            "selected": {which: use.selected for which, use in uses.items()},
            "first": {which: use.first for which, use in uses.items()},
            **change_numbers(sets["clean"], sets["triggered"]),
            "asr_by_first": [share(hits) if len(hits) else None for hits in by_first],
            "single_experts": [self._single(name, layer, expert) for expert in range(layer.num_experts)],
        }

    def _single(self, name: str, layer: MoELayer, expert: int) -> dict[str, Any]:
        with only_expert(layer, expert):
            found = self.run.over(f"{title(name)} expert {expert}", self._look_single)
        return {"expert": expert, **self._rates(found)}
