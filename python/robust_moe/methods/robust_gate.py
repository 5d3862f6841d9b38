"""Robustness-aware gating: a gate that learns which expert withstands the attack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from robust_moe.attacks import attack_mode
from robust_moe.attacks.losses import cross_entropy, kl_divergence
from robust_moe.data import Batch
from robust_moe.methods.adversarial import probed_gain
from robust_moe.methods.base import TRAINING, Forward, Objective, Scored, accuracy, full
from robust_moe.methods.options import LabelSmoothing
from robust_moe.methods.routed import RoutedMethod, experts_and_gates, run_gates
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig
from robust_moe.seeding import derive_seed
from robust_moe.settings import setting
from robust_moe.tokens import for_rows
from robust_moe_kernels.modules import moe_layers, only_expert

__all__ = ["RobustGate"]


class _Lesson(NamedTuple):
    """What one gate learns from a batch."""

    inputs: Tensor  # that it reads on the attacked images, [B, C, H, W] or tokens [N, C]
    losses: Tensor  # [B, E], each expert's attacked loss


@METHODS.register("robust_gate")
class RobustGate(RoutedMethod):
    """Experts by PGD adversarial training along the routes taken; gates by the experts' attacked losses.

    Two updates a batch, the second every ``method.every`` batches:

    1. Everything but the gates: CE(F(x'), y), x' raising it.
    2. The gates alone: Σ KL(softmax(−ℓ / T) ‖ r(x')) over the routed layers, and the balance loss. r are a gate's
       scores before noise and ℓ_e the cross-entropy where every image goes to expert e of that layer with weight 1, as
       if the layer were that expert; other layers route as they are. The target is a constant, the same for all tokens
       of an image where tokens are routed.

    ``method.attacked``: ``shared``: all experts on x'. It is the adversary of the expert that the gate chose, so
    another one often looks better than it would if it were attacked itself. ``own``: expert e on an image that is
    attacked through expert e, all from one start: E attacks more for each layer.
    Either way PGD along the chosen route overstates the robustness: judge with attacks on the routes, and through
    every expert, too.

    Losses, and the gates' inputs, are taken in eval mode at the weights that x' was made for; the second update has no
    forward of the experts, and moves no batch norm outside of a gate. The gates get no gradient from the task.

    Ours; "Robust Experts" (Pavlitska et al., 2025, arXiv:2509.05086, section 5) names robustness-aware gating and an
    adversarial signal for the router as open.

    Raises:
        ConfigError: a model without two routed experts, a dual model.
    """

    of_outputs = False

    @dataclass(frozen=True, kw_only=True)
    class Config(LabelSmoothing, RoutedMethod.Config):
        """Settings of robustness-aware gating."""

        temperature: float = setting(
            0.1, "T of the gate's target softmax(-loss / T); towards 0: the best expert alone", unit="nats", above=0
        )
        every: int = setting(1, "batches from one update of the gates to the next", unit="batches", at_least=1)
        attacked: Literal["shared", "own"] = setting(
            "shared", "images of the experts' losses: those attacked through the model, or through each expert"
        )

        def passes_of(self, attack_steps: int, batches: int, model: ModelConfig) -> int:
            """A pass along one route counts as one of the model; so does the forward that ends with the last gate."""
            layers, experts = len(model.moe.layers), model.moe.num_experts
            if not layers:
                layers, experts = 1, model.mixture.num_experts
            look = 1 + (self.climb(attack_steps) if self.attacked == "own" else 0)
            lessons = -(-batches // self.every)
            batch = self.climb(attack_steps) + self.trained(TRAINING)
            return batches * batch + lessons * (layers * experts * look + 1)

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)
        self.temperature = config.temperature
        self.every = config.every
        self.own = config.attacked == "own"

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        experts, gates = experts_and_gates(model)
        images, nonfinite = self.craft(model, batch, step_seed)
        logs = probed_gain(self.step, model, batch, images)
        lessons, broken = None, nonfinite
        if self.step % self.every == 0:
            lessons, broken = self._lessons(model, batch, images, derive_seed(step_seed, "experts"))
        yield Objective(lambda: self._task(forward, images, batch.labels), nonfinite, experts, logs)
        if lessons is not None:
            yield Objective(lambda: self._route(model, lessons), broken, gates)

    def _task(self, forward: Forward, images: Tensor, labels: Tensor) -> Scored:
        logits = forward(images)
        task = self.cross_entropy(logits, labels)
        return task, {"task_loss": task.detach(), "accuracy": accuracy(logits, labels)}

    def _lessons(self, model: nn.Module, batch: Batch, images: Tensor, seed: int) -> tuple[dict[str, _Lesson], Tensor]:
        """(what each layer's gate learns, whether an attack through an expert met NaN or infinity)."""
        broken = torch.zeros((), dtype=torch.bool, device=images.device)
        losses: dict[str, Tensor] = {}
        for name, layer in moe_layers(model).items():
            columns = []
            for expert in range(layer.num_experts):
                with only_expert(layer, expert):
                    attacked = images
                    if self.own:
                        attacked, nonfinite = self.craft(model, batch, seed)
                        broken = broken | nonfinite
                    with attack_mode(model), torch.no_grad():
                        columns.append(cross_entropy(full(model(attacked)), batch.labels))
            losses[name] = torch.stack(columns, 1)
        with attack_mode(model), torch.no_grad():
            gates = run_gates(model, images)
        return {name: _Lesson(gates[name].inputs, losses[name]) for name in losses}, broken

    def _route(self, model: nn.Module, lessons: Mapping[str, _Lesson]) -> Scored:
        terms, hits, regrets = [], [], []
        for name, layer in moe_layers(model).items():
            inputs, losses = lessons[name]
            layer.routing, _ = layer.decide(inputs)
            logits = layer.routing.clean_logits
            losses = for_rows(losses, len(logits))
            terms.append(kl_divergence(logits, -losses / self.temperature).mean())
            first, best = logits.argmax(1, keepdim=True), losses.argmin(1, keepdim=True)
            hits.append((first == best).float().mean())
            regrets.append((losses.gather(1, first) - losses.gather(1, best)).mean())
        route = torch.stack(terms).sum()
        logs = {
            "route_loss": route.detach(),
            "gate_hits": torch.stack(
                hits
            ).mean(),  # share of images, or tokens, whose first expert has the lowest attacked loss
            "gate_regret": torch.stack(regrets).mean(),  # by how much its loss is above the lowest, nats
        }
        return self.balanced(model, route, logs)
