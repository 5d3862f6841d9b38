"""The gradient steps of an attack as one CUDA graph: captured once, replayed for later batches of the same shapes.

A step of PGD on a small network is some hundreds of kernel launches; replaying them costs the host one. What goes into
the graph through static buffers: the start, the clean images, the labels. Weights and running statistics are read where
they are, so optimiser steps between replays are seen; the batch norms of an ``attack_mode`` are folded inside the
graph. Routing is data on the device (the engine launches a fixed upper bound of tiles), so other images may go to other
experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from robust_moe.attacks.capture import CudaCapturer
from robust_moe.attacks.passes import Counts, Passes, Tally
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
from robust_moe_kernels.modules import attack_mode

__all__ = ["Climb", "StepGraphs"]


Climb = Callable[[Passes, Tensor, Tensor], tuple[Tensor, ...]]
"""All steps of an attack: (passes, start, clean images) to the last iterate and what else it gives."""


class _Entry(NamedTuple):
    captured: Captured
    classes: int  # logits a sample
    counts: Counts  # passes of one replay


class StepGraphs:
    """Runs the steps of one attack, eagerly or as a graph, with the same results.

    The first batch of its kind runs eagerly, which also compiles and tunes kernels; the second is captured; later ones
    are replayed. A batch is of the same kind if shapes, dtypes and layouts of all inputs are the same, the attack's
    key, the precision settings and the options of the MoE layers too, and every parameter and buffer lies where it
    lay: storage that was replaced (``load_state_dict(assign=True)``, ``.to()``) means a new graph. What else a model's
    Python code decides by must stay the same between batches, and its hooks see the capture only. At most ``CAPACITY``
    graphs a model are kept, the memory of one attack's steps each, shared between them.

    Args:
        graph: ``"auto"``: where a graph cannot be had (no GPU, several processes) eagerly; where capturing a model
            fails, with one warning, eagerly from then on. ``True``: an error instead. ``False``: always eagerly.
        capturer: how to record; ``None``: as a CUDA graph.

    Raises:
        ValueError: another ``graph``.
    """

    def __init__(self, graph: str | bool = "auto", capturer: Capturer | None = None) -> None:
        expect_choice(graph, "graph")
        self.graph = graph
        self._capturer: Capturer = CudaCapturer() if capturer is None else capturer
        self._models: WeakKeyDictionary[nn.Module, Known[_Entry]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.graph,)  # graphs are neither copied nor pickled

    def run(
        self, climb: Climb, passes: Passes, x: Tensor, x0: Tensor, settings: Mapping[str, object]
    ) -> tuple[Tensor, ...]:
        """``climb(passes, x, x0)``, replayed where it can be. It makes at least one pass, and draws on nothing but its
        arguments and ``settings``.

        Args:
            settings: the rest of the key: by name, all that decides what the steps are.

        Raises:
            ValueError, RuntimeError: with ``graph=True``, no graph can be had here, or of this model.
        """
        if self.graph is False:
            return climb(passes, x, x0)
        reason = several_processes() or _not_a_key(settings) or self._capturer.why_not(x)
        if reason is not None:
            if self.graph is True:
                raise ValueError(f"graph: expected 'auto' or False where no CUDA graph can be had, got True: {reason}")
            return climb(passes, x, x0)
        known = self._models.setdefault(passes.model, Known())
        if known.refused:
            return climb(passes, x, x0)
        inputs = (x, x0, passes.y, *passes.extras)
        key = _key(settings, passes, inputs)
        entry = known.graphs.get(key)
        if entry is None:
            if not known.see(key):
                return climb(passes, x, x0)
            try:
                entry = self._capture(climb, passes, inputs, known.any())
            except Exception as error:  # a model may fail in any way
                if self.graph is True:
                    raise RuntimeError(f"graph: expected a model that can be captured, got: {error}") from error
                found = climb(passes, x, x0)  # raises again what is no fault of the capture
                known.refuse()
                warnings.warn(
                    "the steps of an attack cannot be captured as a CUDA graph and run one by one"
                    f" (graph=False says so without trying): {error}"
                )
                return found
        known.put(key, entry)
        passes.expect_labels_below(entry.classes)
        nonfinite, *rest = entry.captured.replay(inputs)
        passes.tally.flag(nonfinite)
        passes.tally.counts.add(entry.counts)
        return tuple(rest)

    def _capture(self, climb: Climb, passes: Passes, inputs: tuple[Tensor, ...], beside: Captured | None) -> _Entry:
        tally = passes.tally

        def steps(x: Tensor, x0: Tensor, y: Tensor, *extras: Tensor) -> tuple[Tensor, ...]:
            nonlocal tally
            # made inside the graph: what lies outside may be gone when it is replayed; there may be several runs
            tally = Tally(y.device)
            with attack_mode(passes.model, passes.mode):  # again: folds inside the graph
                found = climb(replace(passes, y=y, extras=extras, tally=tally), x, x0)
            return (tally.nonfinite, *found)

        with buffers_kept(passes.model):
            captured = self._capturer.capture(steps, inputs, beside)
        return _Entry(captured, tally.classes, tally.counts)


def _not_a_key(settings: Mapping[str, object]) -> str | None:
    for name, value in settings.items():
        try:
            hash(value)
        except TypeError:
            return f"the attack's {name} is a {type(value).__name__}, which may change unseen"
    return None


def _key(settings: Mapping[str, object], passes: Passes, inputs: tuple[Tensor, ...]) -> Hashable:
    return (
        tuple(settings.items()),
        getattr(passes.loss, "__func__", passes.loss),  # of a bound method: it may be of this call's own object
        forms(inputs),
        places(passes.model),
        precisions(inputs[0].device.type),
    )
