"""TRADES (Zhang et al., 2019, arXiv:1901.08573)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from robust_moe.attacks.losses import kl_divergence
from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.methods.adversarial import AdversarialMethod, expect_attack, pair_logs
from robust_moe.methods.base import Forward, Objective, Scored

__all__ = ["Trades"]


class Trades(AdversarialMethod):
    """Mean of CE(f(x), y) + β KL(f(x) ‖ f(x')), x' raising that divergence (eq. 5); gradients reach both forwards.

    The attack computes its constant target f(x) once. It starts uniformly in the ball, where the authors' code starts
    0.001 away from the image. Smoothed labels (``method.label_smoothing``) are those of the cross-entropy. The balance
    loss is that of the adversarial images.

    Raises:
        ConfigError: an attack other than PGD with a random start, or on another loss.
    """

    heeds = frozenset({"label_smoothing", "attack_steps_schedule"})

    def __init__(self, config: TrainConfig) -> None:
        expect_attack(config, "whose attack raises the divergence", name=["pgd"], loss=["ce", "kl"])
        super().__init__(config, loss="kl")
        self.beta = config.method.beta

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
        logs = pair_logs(task, robust, clean, adversarial, labels)
        return self.balanced(model, task + self.beta * robust, logs)
