"""How a training method turns a batch into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.config import ConfigError, TrainConfig
from robust_moe.data import Batch
from robust_moe_kernels.modules import BALANCE_LOSSES, balance_loss, moe_layers

__all__ = ["Method", "StepOutput"]

Forward = Callable[[Tensor], Tensor]


@dataclass
class StepOutput:
    """What one batch gave; nothing here has been read by the host."""

    loss: Tensor  # scalar with its graph: the caller runs the backward
    logs: dict[str, Tensor] = field(default_factory=dict)  # detached scalars, averaged over steps by the engine
    nonfinite: Tensor | None = None  # bool scalar: an attack met a NaN or infinite gradient; None: no attack


class Method(ABC):
    """Makes the loss of a batch: subclasses say which images the model is trained on.

    Args:
        config: the whole run's; ``method`` and ``model.moe`` are used.

    Raises:
        ConfigError: an unknown name in the configuration.
    """

    def __init__(self, config: TrainConfig) -> None:
        moe = config.model.moe
        known = ["none", *BALANCE_LOSSES]
        if moe.balance not in known:
            raise ConfigError(f"model.moe.balance: expected one of {', '.join(known)}, got {moe.balance!r}")
        self.balance = moe.balance if moe.balance_weight > 0 else "none"
        self.balance_weight = moe.balance_weight

    @abstractmethod
    def images(self, model: nn.Module, batch: Batch, step_seed: int) -> tuple[Tensor, Tensor | None]:
        """(images to train on, [B, C, H, W]; the attack's non-finite flag, or None)."""

    def __call__(self, model: nn.Module, batch: Batch, step_seed: int, forward: Forward | None = None) -> StepOutput:
        """Loss of one batch: cross-entropy, and the weighted balance loss when the model has MoE layers.

        Args:
            model: in train mode; logits [B, classes].
            batch: images [B, C, H, W] in [0, 1], labels [B], index [B].
            step_seed: of every random choice in this step; with the index it decides the attack's random start.
            forward: the training pass, e.g. a distributed wrapper of ``model``; None: ``model`` itself.
        """
        images, nonfinite = self.images(model, batch, step_seed)
        logits = (forward or model)(images)
        task = F.cross_entropy(logits.float(), batch.labels)
        loss = task
        # left on the device: the engine reads these at its logging interval
        logs = {"task_loss": task.detach(), "accuracy": (logits.argmax(1) == batch.labels).float().mean()}
        if self.balance != "none" and moe_layers(model):
            balance = balance_loss(model, self.balance)
            loss = task + self.balance_weight * balance
            logs["balance_loss"] = balance.detach()
        logs["loss"] = loss.detach()
        return StepOutput(loss, logs, nonfinite)
