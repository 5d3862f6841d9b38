"""AdvMoE: routers and experts adversarially trained in turn (Zhang et al., ICCV 2023, arXiv:2308.10110)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks.losses import kl_divergence
from robust_moe.data import Batch
from robust_moe.methods.adversarial import pair_logs
from robust_moe.methods.base import Forward, Objective, Scored, full
from robust_moe.methods.moe_attacks import RoutePGD, gate_divergence, gate_logits
from robust_moe.methods.options import BetaOption
from robust_moe.methods.routed import RoutedMethod, experts_and_gates
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig
from robust_moe.seeding import derive_seed

__all__ = ["AdversarialRouters"]


@METHODS.register("advmoe")
class AdversarialRouters(RoutedMethod):
    """Two updates a batch, each on images of its own attack, which raises the divergence of the model and of its
    routes: KL(F(x) ‖ F(x')) + Σ KL(r(x) ‖ r(x')).

    1. Everything but the gates: CE(F(x), y) + β KL(F(x) ‖ F(x')), TRADES.
    2. The gates alone: the same, and β Σ KL(r(x) ‖ r(x')), r(x) a constant, and the balance loss.

    The forwards of both updates move BN statistics.

    The authors' code trains its router on ``label mod E``; the loss here is the paper's, of the task. Their target
    r(x) is not a constant, their runs end in NaN, and sign(NaN) = 0 hides it: here a non-finite attack ends the run.

    Raises:
        ConfigError: a model without two routed experts, a dual model, an attack that is not a single PGD.
    """

    dense = "trades"  # the loss of its experts

    @dataclass(frozen=True, kw_only=True)
    class Config(BetaOption, RoutedMethod.Config):
        """Settings of AdvMoE."""

        def check(self) -> None:
            super().check()
            self.expect_single_pgd()

    attack: RoutePGD

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)
        self.beta = config.beta
        self.attack = RoutePGD(**config.attack.arguments(), mode=config.attack_mode)

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        experts, gates = experts_and_gates(model)
        for level, trains in (("experts", experts), ("router", gates)):
            seed = derive_seed(step_seed, level)
            images, nonfinite = self.craft(model, batch, seed)
            yield Objective(
                lambda images=images, level=level: self._loss(model, forward, batch, images, level),
                nonfinite,
                trains,
                self.probed_climb(
                    model, batch, seed, self.attack, images, lambda x: self._divergence(model, batch.images, x)
                ),
            )

    def _divergence(self, model: nn.Module, clean: Tensor, images: Tensor) -> Tensor:
        """What the attack raises, [B]."""
        logits, routes = model(clean), gate_logits(model)
        return kl_divergence(model(images), logits) + gate_divergence(gate_logits(model), routes, len(images))

    def _loss(self, model: nn.Module, forward: Forward, batch: Batch, images: Tensor, level: str) -> Scored:
        clean = forward(batch.images)
        routes = gate_logits(model)
        adversarial = forward(images)
        task = F.cross_entropy(full(clean), batch.labels)
        robust = kl_divergence(adversarial, clean).mean()
        loss = task + self.beta * robust
        if level == "experts":
            return loss, pair_logs(task, robust, self.beta, clean, adversarial, batch.labels)
        route = gate_divergence(gate_logits(model), routes, len(images)).mean()
        return self.balanced(model, loss + self.beta * route, {"route_loss": route.detach()})
