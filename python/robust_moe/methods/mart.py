"""MART: misclassification-aware adversarial training (Wang et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robust_moe.attacks.losses import kl_divergence
from robust_moe.data import Batch
from robust_moe.methods.adversarial import AdversarialMethod, pair_logs, probed_gain
from robust_moe.methods.base import TRAINING, Forward, Objective, Scored, full
from robust_moe.methods.options import BetaOption, StepsSchedule
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig

__all__ = ["Mart", "boosted_cross_entropy"]


@METHODS.register("mart")
class Mart(AdversarialMethod):
    """Mean of BCE(f(x'), y) + β KL(f(x) ‖ f(x')) (1 − p_y(x)), x' raising the cross-entropy (β is
    the paper's λ).

    Images that are misclassified when clean count more. Gradients reach both forwards, as in the authors' code. The
    balance loss is that of the adversarial images.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(StepsSchedule, BetaOption, AdversarialMethod.Config):
        """Settings of MART."""

        def passes(self, attack_steps: int) -> int:
            return self.climb(attack_steps) + self.trained(2 * TRAINING)

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)
        self.beta = config.beta

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        images, nonfinite = self.craft(model, batch, step_seed)
        gain = probed_gain(self.step, model, batch, images)
        inputs = (batch.images, images, batch.labels)
        yield Objective(partial(self._loss, model, forward), nonfinite, logs=gain, inputs=inputs)

    def _loss(self, model: nn.Module, forward: Forward, images: Tensor, attacked: Tensor, labels: Tensor) -> Scored:
        clean, adversarial = forward(images), forward(attacked)
        task = boosted_cross_entropy(adversarial, labels).mean()
        right = full(clean).softmax(1).gather(1, labels[:, None])[:, 0]
        robust = (kl_divergence(adversarial, clean) * (1 - right)).mean()
        logs = pair_logs(task, robust, self.beta, clean, adversarial, labels)
        return self.balanced(model, task + self.beta * robust, logs)


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y − log(1 − max_{k≠y} p_k), [B], from logits [B, classes] with at least two classes.

    The second term comes from log-sums, so it is finite where a probability rounds to 1.
    """
    z = full(logits)
    right = labels[:, None]
    other = z.scatter(1, right, -torch.inf).argmax(1, keepdim=True)  # the strongest wrong class
    total = z.logsumexp(1)
    without = z.scatter(1, other, -torch.inf).logsumexp(1)
    return (total - z.gather(1, right)[:, 0]) + (total - without)
