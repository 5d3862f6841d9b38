"""TRADES (Zhang et al., 2019, arXiv:1901.08573)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.attacks.losses import kl_divergence
from robust_moe.data import Batch
from robust_moe.methods.adversarial import AdversarialMethod, pair_logs
from robust_moe.methods.base import TRAINING, Forward, Objective, Scored
from robust_moe.methods.options import BetaOption, LabelSmoothing, StepsSchedule
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig

__all__ = ["Trades"]


@METHODS.register("trades")
class Trades(AdversarialMethod):
    """Mean of CE(f(x), y) + β KL(f(x) ‖ f(x')), x' raising that divergence (eq. 5); gradients reach both forwards.

    The attack computes its constant target f(x) once. It starts uniformly in the ball, where the authors' code starts
    0.001 away from the image. Smoothed labels (``method.label_smoothing``) are those of the cross-entropy. The balance
    loss is that of the adversarial images.

    Raises:
        ConfigError: an attack other than PGD with a random start, or on another loss.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LabelSmoothing, StepsSchedule, BetaOption, AdversarialMethod.Config):
        """Settings of TRADES."""

        def check(self) -> None:
            super().check()
            why = "whose attack raises the divergence"
            self.expect_attack(why, name=["pgd"], loss=["ce", "kl"], random_start=[True])

        def passes(self, attack_steps: int) -> int:
            return 1 + self.climb(attack_steps) + self.trained(2 * TRAINING)  # the attack's target; both images

    attack: PGD

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices, loss="kl")
        self.beta = config.beta

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        images, nonfinite = self.craft(model, batch, step_seed)

        def divergence(x: Tensor) -> Tensor:
            return kl_divergence(model(x), model(batch.images))

        logs = self.probed_climb(model, batch, step_seed, self.attack, images, divergence)
        inputs = (batch.images, images, batch.labels)
        yield Objective(partial(self._loss, model, forward), nonfinite, logs=logs, inputs=inputs)

    def _loss(self, model: nn.Module, forward: Forward, images: Tensor, attacked: Tensor, labels: Tensor) -> Scored:
        clean, adversarial = forward(images), forward(attacked)
        task = self.cross_entropy(clean, labels)
        robust = kl_divergence(adversarial, clean).mean()
        logs = pair_logs(task, robust, self.beta, clean, adversarial, labels)
        return self.balanced(model, task + self.beta * robust, logs)
