"""How a mixture-of-experts layer routes, and what it makes of its experts' sum: its options in one frozen object."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar, overload, runtime_checkable

import torch
from torch import Tensor

from robust_moe_kernels.checks import FLOATS, expect, expect_dtype, expect_same_device, expect_shape, expect_tensor
from robust_moe_kernels.modules.momentum import Momentum
from robust_moe_kernels.modules.routing_record import RoutingRecord

__all__ = [
    "NOISES",
    "DrawnReroute",
    "Option",
    "Reroute",
    "RouteOptions",
    "checked_routes",
    "expect_expert",
    "kept_in_range",
]

CHOICES = ("token", "expert")
IMPLS = ("auto", "reference")
NOISES = ("logits", "released", "vmoe")
PRIORITIES = ("batch", "vanilla")
T = TypeVar("T")


class Reroute(Protocol):
    """Replaces what a layer's gate decided. Hashable; equal ones do the same."""

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        """(indices [B, n], weights [B, n]) from the layer's options and its gate's decision; n need not be k.

        Indices are int64 or int32, experts of the layer; weights any floating dtype, on the indices' device; both may
        be views with any strides. The layer refuses anything else with a ``ValueError`` or ``TypeError`` in its
        forward, an expert out of range only on the CPU: on a GPU the sample's output is NaN, and
        :func:`~robust_moe_kernels.modules.check_finite` raises.
        """


@runtime_checkable
class DrawnReroute(Reroute, Protocol):
    """One that draws random numbers, and says what it draws from: attacks on routes then see more than one draw."""

    def mean_weights(self, options: RouteOptions, record: RoutingRecord) -> Tensor:
        """Each expert's mean weight over the draws, [B, E], without a gradient; 0: never drawn."""


@dataclass(frozen=True)
class RouteOptions:
    """What a layer does with its gate's logits and its experts' sum, tensors apart. Equal options do the same.

    A recorded CUDA graph has the options of every layer fixed in it, so the object as a whole is part of the graph's
    key (:mod:`robust_moe.graphs`): an option added here, or by a subclass, makes another key by itself.

    Raises:
        ValueError: an option out of range; the layer checks those that depend on its number of experts.
    """

    top_k: int = 2  # experts of a sample, or of a token
    renormalize: bool = True  # divide the k kept scores by their sum
    straight_through: bool = True  # k = 1: forward weight exactly 1, gradient through the score
    noise_std: float = 0.0  # of the score noise in training, in the units of ``noise``; 0: none
    # "logits": added to them, in units of a row's own spread; "vmoe": added to them, in units of 1/E, the same for all
    # rows (2106.05974); "released": see `noisy_choice`.
    noise: str = "logits"
    fixed_expert: int | None = None  # takes every sample with weight 1, the gate unused
    reroute: Reroute | None = None  # replaces what the gate decides, for a while
    inference: Reroute | None = None  # replaces what the gate decides in eval mode; a reroute gets its routes
    capacity: float | None = None  # rows that an expert takes at most, in units of k*N/E; None: all that choose it
    priority: str = "batch"  # who is served first: "batch", rows with large scores; "vanilla", the first of the batch
    choice: str = "token"  # "expert": experts choose their rows, capacity*k*N/E each (capacity None: 1)
    momentum: Momentum | None = None  # over the outputs of linked layers (``link_layers``); None: none
    impl: str = "auto"  # "reference": in plain PyTorch, differentiable any number of times (``general_path``)

    def __post_init__(self) -> None:
        expect(type(self.top_k) is int, "top_k", "an integer", repr(self.top_k))
        expect(self.noise_std >= 0, "noise_std", "a number >= 0", self.noise_std)
        expect(self.noise in NOISES, "noise", f"one of {', '.join(NOISES)}", repr(self.noise))
        ok = type(self.capacity) in (int, float) and 0 < self.capacity < math.inf if self.capacity is not None else True
        expect(ok, "capacity", "a finite number > 0, or None", repr(self.capacity))
        expect(self.priority in PRIORITIES, "priority", f"one of {', '.join(PRIORITIES)}", repr(self.priority))
        expect(self.choice in CHOICES, "choice", f"one of {', '.join(CHOICES)}", repr(self.choice))
        ok = self.momentum is None or isinstance(self.momentum, Momentum)
        expect(ok, "momentum", "a Momentum, or None", repr(self.momentum))
        expect(self.impl in IMPLS, "impl", f"one of {', '.join(IMPLS)}", repr(self.impl))

    def expect_fits(self, num_experts: int) -> None:
        """Raise :class:`ValueError` unless a layer of so many experts can route by these options."""
        expect(1 <= self.top_k <= num_experts, "top_k", f"1 <= k <= num_experts = {num_experts}", self.top_k)
        if self.fixed_expert is not None:
            expect_expert(self.fixed_expert, num_experts, "fixed_expert")

    @property
    def limits(self) -> bool:
        """Whether an expert's buffer is limited, so that what becomes of a row depends on the others."""
        return self.capacity is not None or self.choice == "expert"

    def buffer(self, rows: int, experts: int) -> int:
        """Rows that each expert takes at most of so many: capacity*k*N/E to the nearest integer (2106.05974, section
        2.4), at least 1, at most N. Padding counts as rows: how much of it there is, the host does not know."""
        wanted = (1.0 if self.capacity is None else self.capacity) * self.top_k * rows / experts
        return min(max(math.floor(wanted + 0.5), 1), rows)

    def weigh(self, kept: Tensor) -> Tensor:
        """Weights of experts with scores ``kept`` [B, n], as the layer would weigh them had its gate chosen them."""
        if kept.shape[1] == 1 and self.straight_through and self.top_k == 1:
            return 1 + (kept - kept.detach())
        return kept / kept.sum(1, keepdim=True) if self.renormalize else kept


class _Routing(Protocol):
    """What has options: a layer."""

    @property
    def route_options(self) -> RouteOptions: ...

    @route_options.setter
    def route_options(self, options: RouteOptions) -> None: ...


class Option(Generic[T]):
    """An attribute of a layer that reads and replaces one of its ``route_options``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...

    @overload
    def __get__(self, layer: _Routing, owner: type) -> T: ...

    def __get__(self, layer: _Routing | None, owner: type) -> Self | T:
        return self if layer is None else getattr(layer.route_options, self.name)

    def __set__(self, layer: _Routing, value: T) -> None:
        changed: dict[str, Any] = {self.name: value}
        layer.route_options = replace(layer.route_options, **changed)


def checked_routes(routes: Any, record: RoutingRecord) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a :class:`Reroute` returned: (indices int64 [B, n], weights [B, n], number of experts out of range). Raises
    where it is anything else. On the CPU the number is None: ``sort_by_expert`` looks, and raises."""
    pair = isinstance(routes, tuple | list) and len(routes) == 2
    expect(pair, "reroute", "a function that returns (indices, weights)", type(routes).__name__)
    indices, weights = routes
    expect_tensor(indices, "reroute: indices")
    expect_dtype(indices, "reroute: indices", (torch.int64, torch.int32))
    samples, experts = record.scores.shape
    ok = indices.dim() == 2 and indices.shape[0] == samples and indices.shape[1] >= 1
    expect(ok, "reroute: indices", f"shape [{samples}, n] with n >= 1", list(indices.shape))
    expect_same_device(indices, "reroute: indices", record.scores, "the gate's scores")
    expect_tensor(weights, "reroute: weights")
    expect_dtype(weights, "reroute: weights", FLOATS)
    expect_shape(weights, "reroute: weights", tuple(indices.shape), "that of indices")
    expect_same_device(weights, "reroute: weights", record.scores, "the gate's scores")
    if indices.device.type == "cpu":
        return indices.long(), weights, None
    return kept_in_range(indices.long(), weights, experts)


def kept_in_range(indices: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Routes whose numbers the host does not read: each expert out of range becomes one in range with weight NaN, so
    that it shows in the output. Returns (indices, weights, how many there were, int32)."""
    kept = indices.clamp(0, experts - 1)
    outside = kept != indices
    return kept, weights.masked_fill(outside, float("nan")), outside.sum(dtype=torch.int32)


def expect_expert(index: int, num_experts: int, argument: str) -> None:
    """Raise :class:`ValueError` unless ``index`` is the number of one of the experts."""
    ok = type(index) is int and 0 <= index < num_experts
    expect(ok, argument, f"an expert in 0..{num_experts - 1}", index)
