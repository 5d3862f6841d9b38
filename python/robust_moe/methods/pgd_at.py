"""PGD adversarial training (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from robust_moe.data import Batch
from robust_moe.methods.adversarial import AdversarialMethod, probed_gain
from robust_moe.methods.base import TRAINING, Forward, Objective
from robust_moe.methods.options import LabelSmoothing, StepsSchedule
from robust_moe.methods.table import METHODS

__all__ = ["PGDAdversarialTraining"]


@METHODS.register("pgd_at")
class PGDAdversarialTraining(AdversarialMethod):
    """Mean cross-entropy on adversarial images only: k forwards and backwards to the input, then one training step."""

    @dataclass(frozen=True, kw_only=True)
    class Config(LabelSmoothing, StepsSchedule, AdversarialMethod.Config):
        """Settings of PGD adversarial training."""

        def passes(self, attack_steps: int) -> int:
            return self.climb(attack_steps) + self.trained(TRAINING)

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        images, nonfinite = self.craft(model, batch, step_seed)
        yield Objective(
            partial(self.classify, model, forward),
            nonfinite,
            logs=probed_gain(self.step, model, batch, images),
            inputs=(images, batch.labels),
        )
