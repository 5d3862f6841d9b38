"""Free adversarial training (Shafahi et al., 2019, arXiv:1904.12843)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.methods.adversarial import expect_attack, probed_gain
from robust_moe.methods.base import Forward, Method, Objective

__all__ = ["FreeAdversarialTraining"]


class FreeAdversarialTraining(Method):
    """Every batch m times; each backward moves the weights and, by its gradient to the images, the perturbation.

    ``delta <- clamp(delta + eps * sign(gradient), -eps, eps)``, kept from one batch to the next. An epoch
    makes m = ``method.replays`` updates a batch, so divide ``run.epochs`` by m. Of ``method.attack`` only ``eps``
    counts. BN statistics move once an update. With smoothed labels the perturbation climbs the smoothed loss too: there
    is one backward for both.

    Raises:
        ConfigError: a norm other than Linf, another attack than PGD, or a loss or restarts of its own.
    """

    heeds = frozenset({"label_smoothing"})

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        attack = config.method.attack
        why = "whose perturbation comes from the training's own gradients"
        expect_attack(config, why, norm=["Linf"], name=["pgd"], loss=["ce"], restarts=[1], eot_iter=[1])
        self.eps = float(attack.eps)
        self.replays = config.method.replays
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
            nonfinite = nonfinite | ~torch.isfinite(images.grad).all()
            delta = (delta + self.eps * images.grad.sign()).clamp(-self.eps, self.eps)
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
        self.delta = state["delta"]
