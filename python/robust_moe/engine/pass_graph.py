"""The training pass as one CUDA graph: forward, loss, backward, gradient norm and clipping, without the optimiser's
step.

A training pass of a small network is some hundreds of kernel launches; replaying them costs the host one. The images
and labels go in through static buffers. Weights are read, and batch-norm statistics moved, where they lie; routes are
decided anew by each replay. The gradients lie in memory of the graph's own, which every replay overwrites.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust_moe.attacks.capture import CudaCapturer
from robust_moe.graphs import (
    Captured,
    Capturer,
    Known,
    buffers_kept,
    expect_choice,
    forms,
    places,
    precisions,
    several_processes,
)
from robust_moe.methods.base import Objective, Scored
from robust_moe_kernels.modules import RoutingRecord, moe_layers
from robust_moe_kernels.modules.walk import modules_of

__all__ = ["PassGraphs"]


class _Left:
    """What the last run of a pass has left in the model. A replay runs no Python and leaves what the capture did: the
    same tensors, with new values in them."""

    grads: list[Tensor | None]  # of every parameter
    routing: list[RoutingRecord | None]  # every MoE layer's record
    names: list[str]  # of the logs, in the order of the outputs

    def take(self, model: nn.Module) -> None:
        for layer in moe_layers(model).values():
            layer.routing = _detached(layer.routing)
        self.grads = [parameter.grad for parameter in model.parameters()]
        self.routing = [layer.routing for layer in moe_layers(model).values()]

    def put(self, model: nn.Module) -> None:
        for parameter, grad in zip(model.parameters(), self.grads, strict=True):
            parameter.grad = grad
        for layer, record in zip(moe_layers(model).values(), self.routing, strict=True):
            layer.routing = record


class _Entry(NamedTuple):
    captured: Captured
    left: _Left
    trained: tuple[bool, ...]  # of every parameter, whether it is


class PassGraphs:
    """Runs the training passes of one model as graphs, with the results of the plain passes.

    The first batch of its kind is left to the caller, which also compiles and tunes kernels; the second is captured;
    later ones are replayed. A batch is of the same kind if its tensors have the same shapes, dtypes and layouts, the
    precision settings, modes, what is trained and the options of the MoE layers are the same, and every parameter and
    buffer lies where it lay. With ``"auto"``, a batch of another shape than the captured one (an epoch's last) is left
    to the caller, for a graph holds the memory of a whole pass; any other change drops the graph.
    What else a model's Python code decides by must stay the same between batches, and its hooks see the capture only.

    Only an objective that names its ``inputs`` can be captured. Of those with the same ``trains`` and shapes all must
    be one function of the inputs and of the weights.

    Args:
        model: the bare model, whose gradients are computed.
        backward: runs the backward of a loss, outside autocast.
        finish: called after the backward, inside the graph: measures and clips gradients, and returns what is to be
            logged.
        reason: why nothing can be captured in this run, or ``None``.
        graph: ``"auto"``: capture what can be, and say so once where a capture fails. ``True``: also say why, once,
            where nothing is captured, and capture batches of every shape. ``False``: capture nothing.
        capturer: how to record; ``None``: as a CUDA graph.

    Raises:
        ValueError: another ``graph``.
    """

    def __init__(
        self,
        model: nn.Module,
        backward: Callable[[Tensor], None],
        finish: Callable[[], dict[str, Tensor]],
        reason: str | None = None,
        graph: str | bool = "auto",
        capturer: Capturer | None = None,
    ) -> None:
        expect_choice(graph, "run.graph")
        self.model, self.graph = model, graph
        self.capturer: Capturer = CudaCapturer() if capturer is None else capturer
        self._backward, self._finish, self._reason = backward, finish, reason
        self._known: Known[_Entry] = Known()
        self._kind: Hashable = None  # what all of the graphs have in common
        self._told: set[str] = set()

    def learn(self, objective: Objective) -> Scored | None:
        """What ``objective.compute`` returns and, in ``.grad``, its gradients; ``None``, with nothing changed: the
        caller is to compute both. The loss has no graph any more; the logs hold those of ``finish`` too."""
        if self.graph is False or self._known.refused:
            return None
        reason = self._why_not(objective)
        if reason is not None:
            self._tell(reason)
            return None
        inputs = objective.inputs
        assert inputs is not None  # or there is a reason
        kind = (
            places(self.model),
            tuple(module.training for module in modules_of(self.model)),
            precisions(inputs[0].device.type),
        )
        if kind != self._kind:
            self._known, self._kind = Known(), kind
        trained = tuple(parameter.requires_grad for parameter in self.model.parameters())
        key = (forms(inputs), trained)
        entry = self._known.graphs.get(key)
        if entry is None:
            another_shape = any(other.trained == trained for other in self._known.graphs.values())
            if (another_shape and self.graph is not True) or not self._known.see(key):
                return None
            try:
                entry = self._capture(objective, inputs, trained)
            except Exception as error:  # a model may fail in any way
                self._known.refuse()
                warnings.warn(
                    "the training pass cannot be captured as a CUDA graph and runs step by step"
                    f" (run.graph=false says so without trying): {error}"
                )
                return None
        self._known.put(key, entry)
        loss, *values = entry.captured.replay(inputs)
        entry.left.put(self.model)
        return loss, dict(zip(entry.left.names, values, strict=True))

    def _why_not(self, objective: Objective) -> str | None:
        if self._reason is not None:
            return self._reason
        if objective.inputs is None:
            return "the method does not name the tensors that its loss is computed from"
        return several_processes() or self.capturer.why_not(objective.inputs[0])

    def _tell(self, reason: str) -> None:
        if self.graph is True and reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"run.graph: the training pass runs step by step and not as a CUDA graph: {reason}")

    def _capture(self, objective: Objective, inputs: tuple[Tensor, ...], trained: tuple[bool, ...]) -> _Entry:
        compute, left = objective.compute, _Left()

        def training_pass(*inputs: Tensor) -> tuple[Tensor, ...]:
            for parameter in self.model.parameters():
                parameter.grad = None  # the backward then writes gradients, and adds to none
            with _own_casts():
                loss, logs = compute(*inputs)
                with torch.autocast(inputs[0].device.type, enabled=False):
                    self._backward(loss)
                    logs = {**logs, **self._finish()}
            left.take(self.model)
            left.names = list(logs)
            return (loss.detach(), *logs.values())

        with buffers_kept(self.model), _pass_kept(self.model):
            # memory of its own: the gradients are read after the replay, when an attack's graph may already have run
            return _Entry(self.capturer.capture(training_pass, inputs, None), left, trained)


@contextmanager
def _pass_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards there are no gradients, as before, and the layers' records are those from before.

    The records are cut off from their graphs on entry: a graph from before would keep the parameters' accumulation
    nodes alive, which belong to the stream that it ran on, and the capture's stream would have to wait for that one.
    """
    layers = list(moe_layers(model).values())
    records = [_detached(layer.routing) for layer in layers]
    for layer in layers:
        layer.routing = None
    try:
        yield
    finally:
        for layer, record in zip(layers, records, strict=True):
            layer.routing = record
        for parameter in model.parameters():
            parameter.grad = None


def _detached(record: RoutingRecord | None) -> RoutingRecord | None:
    """A layer's record without its graph."""
    if record is None:
        return None
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    detached: dict[str, Any] = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    return dataclasses.replace(record, **detached)


@contextmanager
def _own_casts() -> Iterator[None]:
    """Autocast casts each weight once inside, as it does in a plain pass, and neither finds a cast from outside nor
    leaves one behind: the graph makes its casts anew from the weights as they are."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)
