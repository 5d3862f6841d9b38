"""Fast adversarial training: FGSM from a random start (Wong et al., 2020, arXiv:2001.03994)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import FGSM, Crafted, attack_mode
from robust_moe.content import fields, flag
from robust_moe.data import Batch
from robust_moe.methods.adversarial import AdversarialMethod, probed_gain
from robust_moe.methods.base import TRAINING, Forward, Objective, accuracy
from robust_moe.methods.options import LabelSmoothing
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig
from robust_moe.settings import setting
from robust_moe_kernels.modules import mean_over_ranks

__all__ = ["FastAdversarialTraining"]

GUARD_EVERY = 20  # batches between two comparisons with PGD
GAP = 0.2  # of accuracies, FGSM's minus PGD's: some points are usual, overfitted it is nearly the whole accuracy


@METHODS.register("fast_at")
class FastAdversarialTraining(AdversarialMethod):
    """Mean cross-entropy on images of one step of 1.25 ε from a uniform start in the ball.

    Trained so, a network may learn to withstand that one step and nothing else, within a few batches: catastrophic
    overfitting. The guard (``method.overfit_guard``) compares the accuracy on FGSM's and on PGD's images of a batch
    every ``GUARD_EVERY`` batches; while FGSM's is more than ``GAP`` above, the network is trained on PGD's images, as
    Li et al. (2020, arXiv:2006.03089) do to recover. That reads the host once a comparison.

    ``eps`` and ``norm`` of ``method.attack`` are both attacks'; the rest of it is the guard's PGD.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LabelSmoothing, AdversarialMethod.Config):
        """Settings of fast adversarial training."""

        overfit_guard: bool = setting(True, "stop raising single-step overfitting when PGD sees it")

        def passes(self, attack_steps: int) -> int:
            return 2 + self.trained(TRAINING)  # while the guard trusts FGSM, whose comparisons are not counted

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)  # self.attack: the guard's
        eps = float(config.attack.eps)
        self.fgsm = FGSM(eps, config.attack.norm, 1.25 * eps, random_start=True, mode=config.attack_mode)
        self.guard = config.overfit_guard
        self.with_pgd = False  # train on PGD's images until the next comparison
        self.met = False  # the guard has found overfitting in this run

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        logs = {}
        if self.guard and self.step % GUARD_EVERY == 0:
            logs = self._compare(model, batch, step_seed)
        images, nonfinite = self._images(model, batch, step_seed)
        logs["on_pgd"] = batch.images.new_full((), float(self.with_pgd))
        logs |= probed_gain(self.step, model, batch, images)
        inputs = (images, batch.labels)
        yield Objective(partial(self.classify, model, forward), nonfinite, logs=logs, inputs=inputs)

    def _images(self, model: nn.Module, batch: Batch, seed: int) -> Crafted:
        return self.craft(model, batch, seed, self.attack if self.with_pgd else self.fgsm)

    def _compare(self, model: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Accuracies on both attacks' images, in eval mode; decides what the next batches are trained on."""
        found = []
        for attack in (self.fgsm, self.attack):
            images = self.craft(model, batch, seed, attack).images
            with attack_mode(model), torch.no_grad():
                found.append(accuracy(model(images), batch.labels))
        gap = found[0] - found[1]
        gap = mean_over_ranks(gap) if self.over_ranks else gap  # one decision in all processes
        self.with_pgd = bool(gap > GAP)
        self.met |= self.with_pgd
        return {"fgsm_accuracy": found[0], "pgd_accuracy": found[1]}

    def warnings(self) -> list[str]:
        if not self.met:
            return []
        return [
            f"fast_at: catastrophic overfitting: FGSM's accuracy was more than {GAP:.0%} above PGD's; trained on PGD's "
            "images from there until the two agree"
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"with_pgd": self.with_pgd, "met": self.met}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        fields({"with_pgd": flag, "met": flag})(state, "method")
        # a guard that an override switched off compares no more: it would never let go of PGD
        self.with_pgd, self.met = state["with_pgd"] and self.guard, state["met"]
