"""One batch's updates: backward, gradient guards, optimiser step, as often as the method says."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robust_moe.data import Batch
from robust_moe.engine.guards import GateWatch
from robust_moe.methods import Method, Update

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Updater"]


class Updater:
    """Runs a method's updates on a model.

    Args:
        fabric: precision, backward and gradient clipping.
        model: the bare model, which attacks work on: a distributed wrapper would wait for weight gradients.
        wrapped: the training pass, as ``fabric.setup`` returned it.
        optimizer: as ``fabric.setup`` returned it.
        method: what the updates are.
        max_norm: largest global gradient norm of an update; None: no clipping.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        wrapped: nn.Module,
        optimizer: Optimizer,
        method: Method,
        max_norm: float | None,
    ) -> None:
        self.fabric, self.model, self.wrapped, self.optimizer = fabric, model, wrapped, optimizer
        self.method, self.max_norm = method, max_norm
        self.gates = GateWatch(model)
        # a gradient scaler's norms are scaled, and may be infinite in a step that it then leaves out
        self.measures = fabric.strategy.precision.precision != "16-mixed"

    def run(self, batch: Batch, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """(means of the updates' logs, whether an attack met NaN or infinity); all on the device.

        Raises:
            RuntimeError: the method leaves the model in another mode than it found.
        """
        logs: dict[str, list[Tensor]] = defaultdict(list)
        flags = []
        updates = self.method.updates(self.model, batch, seed, forward=self.wrapped)
        modes = [module.training for module in self.model.modules()]
        while True:
            with self.fabric.autocast():  # the method computes when asked, and only then
                update = next(updates, None)
            if update is None:
                break
            self._expect_modes(modes)
            for name, value in (update.logs | self._apply(update)).items():
                logs[name].append(value)
            if update.nonfinite is not None:
                flags.append(update.nonfinite)
        means = {name: torch.stack(values).mean() if len(values) > 1 else values[0] for name, values in logs.items()}
        return means, torch.stack(flags).any() if flags else None

    def _apply(self, update: Update) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)  # a gradient of an earlier update is never applied again
        try:
            self.fabric.backward(update.loss)
        finally:
            if update.after_backward is not None:
                update.after_backward()
        if update.trains is not None:
            moving = {id(parameter) for parameter in update.trains}
            for parameter in self.model.parameters():
                if id(parameter) not in moving:
                    parameter.grad = None  # the optimiser skips it: no momentum, no weight decay
        self.gates.look(max(group["lr"] for group in self.optimizer.param_groups))
        logs = self._gradient_norm()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # freed: an attack may be next
        return logs

    def _gradient_norm(self) -> dict[str, Tensor]:
        """Clips, and measures the global norm: NaN in any gradient shows there."""
        if self.max_norm is not None:
            norm = self.fabric.clip_gradients(
                self.wrapped, self.optimizer, max_norm=self.max_norm, error_if_nonfinite=False
            )
        elif self.measures:
            grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        return {"grad_norm": norm.detach()} if self.measures else {}

    def _expect_modes(self, modes: list[bool]) -> None:
        for before, (name, module) in zip(modes, self.model.named_modules(), strict=True):
            if module.training != before:
                kinds = ("eval", "train")
                raise RuntimeError(
                    f"{type(self.method).__name__}: expected to leave {name or 'the model'!r} in {kinds[before]} mode, "
                    f"as it was, got {kinds[module.training]} mode"
                )
