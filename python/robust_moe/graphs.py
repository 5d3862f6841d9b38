"""What every CUDA graph of the package shares: how one is recorded, what it has fixed in it, which ones are kept.

The steps of an attack (:mod:`robust_moe.attacks.graph`) and the training pass (:mod:`robust_moe.engine.pass_graph`) are
recorded once and replayed. All that is CUDA's about that is in :mod:`robust_moe.attacks.capture`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from robust_moe.precision import switches
from robust_moe_kernels.modules import MoELayer
from robust_moe_kernels.modules.walk import modules_of, tensors_of

__all__ = [
    "CAPACITY",
    "GRAPHS",
    "REMEMBERED",
    "Captured",
    "Capturer",
    "Known",
    "buffers_kept",
    "expect_choice",
    "forms",
    "places",
    "precisions",
    "several_processes",
]

GRAPHS = ("auto", True, False)
CAPACITY = 16  # graphs a model: of whole and last batches, of attacks through the model and through each expert
REMEMBERED = 64  # kinds of batches a model that were seen once


class Captured(Protocol):
    """A function of tensors that was recorded once."""

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the function returns for ``inputs``, which have the shapes of those it was recorded with."""


class Capturer(Protocol):
    """How functions are recorded; :class:`~robust_moe.attacks.capture.CudaCapturer` on a GPU."""

    def why_not(self, x: Tensor) -> str | None:
        """Reason why nothing can be recorded on this input's device now, or ``None``."""

    def capture(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], beside: Captured | None
    ) -> Captured:
        """Record ``function(*inputs)``, which may run several times on the way; ``beside``: an earlier recording whose
        memory may be shared. Raises if it cannot be recorded; random generators are left as found either way."""


class HasCaptured(Protocol):
    """What is kept of a graph, the graph among it."""

    @property
    def captured(self) -> Captured:
        """The graph."""


Entry = TypeVar("Entry", bound=HasCaptured)
Value = TypeVar("Value")


class Known(Generic[Entry]):
    """What is known of one model's graphs; least recently used first."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[Hashable, Entry] = OrderedDict()
        self.seen: OrderedDict[Hashable, None] = OrderedDict()  # batches that came once
        self.refused = False  # not to be tried again

    def put(self, key: Hashable, entry: Entry) -> None:
        self.seen.pop(key, None)
        _put(self.graphs, key, entry, CAPACITY)

    def see(self, key: Hashable) -> bool:
        """Whether such a batch came before."""
        before = key in self.seen
        _put(self.seen, key, None, REMEMBERED)
        return before

    def refuse(self) -> None:
        self.refused = True
        self.graphs.clear()
        self.seen.clear()

    def any(self) -> Captured | None:
        return next((entry.captured for entry in self.graphs.values()), None)


def _put(table: OrderedDict[Hashable, Value], key: Hashable, value: Value, capacity: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > capacity:
        table.popitem(last=False)


def expect_choice(graph: object, argument: str) -> None:
    """Raise :class:`ValueError` unless ``graph`` is one of :data:`GRAPHS`."""
    if not any(graph is choice for choice in GRAPHS) and graph != "auto":
        raise ValueError(f"{argument}: expected 'auto', True or False, got {graph!r}")


def several_processes() -> str | None:
    """Reason why nothing is captured where several processes train together, or ``None``."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes train together, and may talk to each other in a forward"
    return None


# What a graph has fixed in it. Equal keys, same graph.


def forms(tensors: Iterable[Tensor]) -> Hashable:
    """What a graph has fixed of its inputs."""
    return tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)


def places(model: nn.Module) -> Hashable:
    """What a graph has fixed of a model: where every parameter and buffer lies, and how its layers choose experts."""
    modules = modules_of(model)
    with torch._C.DisableTorchFunction():  # inside an attack each question would pass through its function modes
        lie = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors_of(modules))
    return lie, tuple(module.route_options for module in modules if isinstance(module, MoELayer))


def precisions(device: str) -> Hashable:
    """What a graph has fixed of the precisions and algorithms that are set for a kind of device."""
    return (
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        tuple(op.fp32_precision for op in switches().values()),
        (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        torch.are_deterministic_algorithms_enabled(),
    )


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, the buffers (running statistics) hold afterwards what they held, where they held it."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
