"""One batch's updates: backward, gradient guards, optimiser step, as often as the method says."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robust_moe.averaging import average_gradients, may_lack_gradients
from robust_moe.data import Batch
from robust_moe.engine.guards import GateWatch
from robust_moe.engine.pass_graph import PassGraphs
from robust_moe.engine.sharding import whole
from robust_moe.graphs import Capturer
from robust_moe.methods import Method, Update
from robust_moe_kernels.modules.sharded import sharded_parts

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Updater"]

_GATE = "gate/"  # before a layer's name: whether its gate got a gradient, among the logs on their way to the GateWatch


class Updater:
    """Runs a method's updates on a model.

    Args:
        fabric: precision, backward and gradient clipping.
        model: the bare model, which attacks work on. In several processes its gradients are averaged after a backward.
        wrapped: the training pass, as ``fabric.setup`` returned it.
        optimizer: as ``fabric.setup`` returned it.
        method: what the updates are.
        max_norm: largest global gradient norm of an update; None: no clipping.
        graph: whether the training pass is captured (:class:`~robust_moe.engine.pass_graph.PassGraphs`).
        capturer: how; None: as a CUDA graph.
    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        wrapped: nn.Module,
        optimizer: Optimizer,
        method: Method,
        max_norm: float | None,
        graph: str | bool = "auto",
        capturer: Capturer | None = None,
    ) -> None:
        self.fabric, self.model, self.wrapped, self.optimizer = fabric, model, wrapped, optimizer
        self.method, self.max_norm = method, max_norm
        self.gates = GateWatch(model)
        self.some_have_none = may_lack_gradients(model)
        self.in_parts = bool(sharded_parts(model.modules()))
        # a gradient scaler's norms are scaled, and may be infinite in a step that it then leaves out
        self.measures = fabric.strategy.precision.precision != "16-mixed"
        self.passes = PassGraphs(model, fabric.backward, self._finish, self._why_no_graph(), graph, capturer)

    def run(self, batch: Batch, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """(means of the updates' logs, whether an attack met NaN or infinity); all on the device.

        Raises:
            RuntimeError: the method leaves the model in another mode than it found.
        """
        logs: dict[str, list[Tensor]] = defaultdict(list)
        flags = []
        updates = self.method.updates(self.model, batch, seed, forward=self.wrapped, learn=self.passes.learn)
        modes = [module.training for module in self.model.modules()]
        while True:
            with self.fabric.autocast():  # the method computes when asked, and only then
                update = next(updates, None)
            if update is None:
                break
            self._expect_modes(modes)
            for name, value in self._apply(update).items():
                logs[name].append(value)
            if update.nonfinite is not None:
                flags.append(update.nonfinite)
        means = {name: torch.stack(values).mean() if len(values) > 1 else values[0] for name, values in logs.items()}
        return means, torch.stack(flags).any() if flags else None

    def _apply(self, update: Update) -> dict[str, Tensor]:
        """Steps the weights by the gradients of ``update``; all that is to be logged."""
        logs = update.logs if update.learned else update.logs | self._learn(update)
        gates = {name: logs.pop(_GATE + name) for name in self.gates.layers if _GATE + name in logs}
        self.gates.look(max(group["lr"] for group in self.optimizer.param_groups), gates, update.trains)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # freed: an attack may be next
        return logs

    def _learn(self, update: Update) -> dict[str, Tensor]:
        """The gradients of ``update``, in the parameters; what :meth:`_finish` returns."""
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
        if not self.in_parts:  # FSDP2 has averaged them on the way
            average_gradients(self.model.parameters(), self.some_have_none)
        return self._finish()

    def _finish(self) -> dict[str, Tensor]:
        """What follows a backward and may be captured with it: looks at the gates' gradients, then clips all."""
        gates = {_GATE + name: flag for name, flag in self.gates.gradients().items()}
        return gates | self._gradient_norm()

    def _why_no_graph(self) -> str | None:
        """Reason why no training pass of this run can be captured, or ``None``."""
        if self.fabric.world_size > 1:
            return "several processes train together, and talk to each other between a backward and the step"
        if not self.measures:
            return "a gradient scaler (run.precision=16-mixed) decides on the host whether a step is taken"
        if self.method.perturbation is not None:
            return "the weights are perturbed and put back around each pass (method.awp_gamma)"
        return None

    def _gradient_norm(self) -> dict[str, Tensor]:
        """Clips, and measures the global norm: NaN in any gradient shows there."""
        if self.max_norm is not None:
            norm = self.fabric.clip_gradients(
                self.wrapped, self.optimizer, max_norm=self.max_norm, error_if_nonfinite=False
            )
        elif self.measures:
            grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        else:
            return {}
        assert norm is not None  # Fabric has none only where it clips by value
        return {"grad_norm": whole(norm.detach())} if self.measures else {}

    def _expect_modes(self, modes: list[bool]) -> None:
        for before, (name, module) in zip(modes, self.model.named_modules(), strict=True):
            if module.training != before:
                kinds = ("eval", "train")
                raise RuntimeError(
                    f"{type(self.method).__name__}: expected to leave {name or 'the model'!r} in {kinds[before]} mode, "
                    f"as it was, got {kinds[module.training]} mode"
                )
