"""Free adversarial training (Shafahi et al., 2019, arXiv:1904.12843)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.content import fields, optional, tensor
from robust_moe.data import Batch
from robust_moe.methods.adversarial import probed_gain
from robust_moe.methods.base import TRAINING, Forward, Method, Objective
from robust_moe.methods.options import AttackOptions, LabelSmoothing
from robust_moe.methods.table import METHODS
from robust_moe.models.config import ModelConfig
from robust_moe.settings import setting

__all__ = ["FreeAdversarialTraining"]


@METHODS.register("free_at")
class FreeAdversarialTraining(Method):
    """Every batch m times; each backward moves the weights and, by its gradient to the images, the perturbation.

    ``delta <- clamp(delta + eps * sign(gradient), -eps, eps)``, kept from one batch to the next. An epoch
    makes m = ``method.replays`` updates a batch, so divide ``run.epochs`` by m. Of ``method.attack`` only ``eps``
    counts. BN statistics move once an update. With smoothed labels the perturbation climbs the smoothed loss too: there
    is one backward for both.

    Raises:
        ConfigError: a norm other than Linf, another attack than PGD, or a loss or restarts of its own.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(LabelSmoothing, AttackOptions, Method.Config):
        """Settings of free adversarial training; of the attack, its ball counts."""

        replays: int = setting(4, "m, updates of weights and perturbation with a batch", at_least=1)

        def check(self) -> None:
            super().check()
            why = "whose perturbation comes from the training's own gradients"
            self.expect_attack(why, norm=["Linf"], name=["pgd"], loss=["ce"], restarts=[1], eot_iter=[1])

        def passes(self, attack_steps: int) -> int:
            return self.trained(self.replays * TRAINING)

    def __init__(self, config: Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)
        self.eps = float(config.attack.eps)
        self.replays = config.replays
        self.delta: Tensor | None = None  # of the last batch

    def objectives(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward) -> Iterator[Objective]:
        delta = self._start(batch.images)
        nonfinite = torch.zeros((), dtype=torch.bool, device=delta.device)
        for replay in range(self.replays):
            images = (batch.images + delta).clamp(0, 1).requires_grad_()
            yield Objective(
                lambda images=images: self.classify(model, forward, images, batch.labels),
                nonfinite,
                logs=probed_gain(self.step, model, batch, images.detach()) if replay + 1 == self.replays else {},
            )
            # by now the engine has run the backward; the weights' gradients of the last replay are checked there
            grad = images.grad
            if grad is None:
                raise RuntimeError("model: expected a loss that depends on the images, got none: they have no gradient")
            nonfinite = nonfinite | ~torch.isfinite(grad).all()
            delta = (delta + self.eps * grad.sign()).clamp(-self.eps, self.eps)
        self.delta = delta

    def _start(self, images: Tensor) -> Tensor:
        """The last batch's perturbation, as many images as there are, in a ball that may be another after a resume;
        zero for those beyond it."""
        delta = torch.zeros_like(images)
        if self.delta is not None and self.delta.shape[1:] == images.shape[1:]:
            count = min(len(images), len(self.delta))
            delta[:count] = self.delta[:count].clamp(-self.eps, self.eps)
        return delta

    def state_dict(self) -> dict[str, Any]:
        return {"delta": self.delta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        fields({"delta": optional(tensor(4))})(state, "method")
        self.delta = state["delta"]
