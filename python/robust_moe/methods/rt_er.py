"""RT-ER: robust training with expert robustification (Zhang et al., ICML 2025, "Optimizing Robustness and Accuracy in
Mixture of Experts: A Dual-Model Approach")."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks.losses import kl_divergence
from robust_moe.data import Batch
from robust_moe.methods.adversarial import AdversarialMethod, dose, probed_gain
from robust_moe.methods.base import Forward, Objective, Scored, accuracy, full
from robust_moe.methods.moe_attacks import SecondExpertPGD, clean_second_experts, held
from robust_moe.methods.options import BetaOption, FormOption
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig
from robust_moe.seeding import derive_seed
from robust_moe.settings import ConfigError
from robust_moe_kernels.modules import rerouted

__all__ = ["RTER", "expect_experts"]


def expect_experts(model: ModelConfig, method: str) -> None:
    """Raise :class:`ConfigError` unless the model routes between two experts at least."""
    key, count, other = "model.mixture.num_experts", model.mixture.num_experts, " (or layers in model.moe.layers)"
    if model.moe.layers:
        key, count, other = "model.moe.num_experts", model.moe.num_experts, ""
    if count < 2:
        raise ConfigError(f"{key}: expected at least 2{other} for method.name={method}, got {count}")


@METHODS.register("rt_er")
class RTER(AdversarialMethod):
    """Keeps the experts that an attack could switch to robust, above all the second-ranked one, f_2.

    ``method.form: paper``: one adversary, ``max_x' CE(F(x'), y) + β KL(f_2(x') ‖ f_2(x))``, and the mean of that is
    lowered; f_2 is the expert ranked second by the gate at the clean x.
    ``released``: what the authors' code computes: x' raises CE(F(x'), y), another x'' raises CE(f_2(x''), y), and the
    loss is CE(F(x'), y) + β KL(f_2(x) ‖ f_2(x'')).

    Gradients reach both sides of the divergence. F is trained through the gate, which learns where the routing lets
    it. f_2 is the model with every layer's route held at its second expert: with whole networks as experts that network
    itself; the method trains mixtures of blocks and convolutions as well. An expert's BN statistics move once with the
    images that the gate gives it and once with those it is second for.

    Raises:
        ConfigError: a model without two routed experts, a dual model, an attack that is not a single PGD.
    """

    dense = "pgd_at"  # without the term of the experts

    @dataclass(frozen=True, kw_only=True)
    class Config(BetaOption, FormOption, AdversarialMethod.Config):
        """Settings of RT-ER."""

        def check(self) -> None:
            super().check()
            self.expect_single_pgd()

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)
        expect_experts(model, config.name)
        if model.dual.enabled and config.name == "rt_er":
            raise ConfigError("method.name: expected jtdmoe for a dual model (model.dual.enabled), got 'rt_er'")
        self.beta = config.beta
        self.form = config.form
        self.joint = SecondExpertPGD(beta=self.beta, **config.attack.arguments(), mode=config.attack_mode)

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        yield self.robust(model, batch, step_seed, forward, None)

    def robust(
        self,
        model: nn.Module,
        batch: Batch,
        seed: int,
        forward: Forward,
        trains: Collection[nn.Parameter] | None,
    ) -> Objective:
        """The objective of the mixture ``model``, moving ``trains``."""
        second = clean_second_experts(model, batch.images)
        if self.form == "paper":
            images, nonfinite = self.craft(model, batch, seed, self.joint)
            others = images
            logs = self.probed_climb(
                model, batch, seed, self.joint, images, lambda x: self._climbed(model, batch, second, x)
            )
        else:
            images, nonfinite = self.craft(model, batch, seed)
            with rerouted(model, held(second)):
                others, broken = self.craft(model, batch, derive_seed(seed, "second"))
            nonfinite = nonfinite | broken
            logs = probed_gain(self.step, model, batch, images)
        return Objective(
            lambda: self._loss(model, forward, batch, images, others, second),
            nonfinite,
            trains,
            logs,
        )

    def _climbed(self, model: nn.Module, batch: Batch, second: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """What the paper's attack raises, [B]."""
        task = F.cross_entropy(full(model(images)), batch.labels, reduction="none")
        with rerouted(model, held(second)):
            attacked, clean = model(torch.cat([images, batch.images])).chunk(2)
        return task + self.beta * kl_divergence(clean, attacked)

    def _loss(
        self,
        model: nn.Module,
        forward: Forward,
        batch: Batch,
        images: Tensor,
        others: Tensor,
        second: Mapping[str, Tensor],
    ) -> Scored:
        logits = forward(images)
        task = F.cross_entropy(full(logits), batch.labels)
        logs = {"task_loss": task.detach(), "accuracy": accuracy(logits, batch.labels)}
        loss, logs = self.balanced(model, task, logs)  # before the next forward replaces this one's routes
        with rerouted(model, held(second)):
            attacked, clean = model(torch.cat([others, batch.images])).chunk(2)
        pair = (clean, attacked) if self.form == "paper" else (attacked, clean)
        robust = kl_divergence(*pair).mean()
        return loss + self.beta * robust, {**logs, **self.term_logs(task, robust)}

    def term_logs(self, task: Tensor, robust: Tensor) -> dict[str, Tensor]:
        """The experts' divergence ``robust``, and the share that β times it contributes beside ``task``."""
        return {"expert_loss": robust.detach(), "dose": dose(task, self.beta * robust)}
