"""PGD adversarial training (Madry et al., 2018, arXiv:1706.06083)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from robust_moe.data import Batch
from robust_moe.methods.adversarial import AdversarialMethod, probed_gain
from robust_moe.methods.base import Forward, Objective

__all__ = ["PGDAdversarialTraining"]


class PGDAdversarialTraining(AdversarialMethod):
    """Mean cross-entropy on adversarial images only: k forwards and backwards to the input, then one training step."""

    heeds = frozenset({"label_smoothing", "attack_steps_schedule"})
    distributed = True

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        images, nonfinite = self.craft(model, batch, step_seed)
        yield Objective(
            partial(self.classify, model, forward),
            nonfinite,
            logs=probed_gain(self.step, model, batch, images),
            inputs=(images, batch.labels),
        )
