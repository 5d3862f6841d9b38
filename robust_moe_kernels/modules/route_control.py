"""Routes imposed on mixture-of-experts layers for a while: held, dropped, exchanged, drawn at random, or with another
gradient.

A layer's gate runs as always, then its ``reroute`` replaces the experts and weights it decided on; the experts run on
what comes out, on the engine or by segments alike. The layer's record keeps the gate's own logits and scores beside the
indices and weights that were used. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.model import moe_layers
from robust_moe_kernels.modules.route_options import Reroute, RouteOptions
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.routing_record import RoutingRecord
from robust_moe_kernels.ops.attack_step import random_start

__all__ = [
    "AllExperts",
    "DropTop",
    "FixedRoutes",
    "RandomRoutes",
    "SoftGradient",
    "SwapTop",
    "last_routes",
    "only_expert",
    "rerouted",
]


@contextmanager
def rerouted(model: nn.Module, reroute: Reroute | Mapping[str, Reroute]) -> Iterator[None]:
    """Impose routes on a model's layers, then put back what they had; may be nested, the innermost counts.

    A layer with a ``fixed_expert`` keeps that one. Goes with ``attack_mode`` in either order.

    Args:
        model: any module with mixture-of-experts layers.
        reroute: for every layer, or for those named.

    Raises:
        ValueError: a model without such layers, or a name that is none of theirs.
    """
    layers = moe_layers(model)
    expect(len(layers) > 0, "model", "at least one mixture-of-experts layer", "none")
    chosen = reroute if isinstance(reroute, Mapping) else dict.fromkeys(layers, reroute)
    for name in chosen:
        expect(name in layers, "reroute", f"names of layers ({', '.join(map(repr, layers))})", repr(name))
    before = [(layer, layer.reroute) for layer in layers.values()]
    try:
        for name, imposed in chosen.items():
            layers[name].reroute = imposed
        yield
    finally:
        for layer, found in before:
            layer.reroute = found


@contextmanager
def only_expert(layer: MoELayer, expert: int) -> Iterator[None]:
    """Every sample goes to one expert of a layer with weight 1, its gate unused; then what the layer had is put back.

    Raises:
        ValueError: an expert out of range.
    """
    before, layer.fixed_expert = layer.fixed_expert, expert
    try:
        yield
    finally:
        layer.fixed_expert = before


@dataclass(frozen=True, eq=False)
class FixedRoutes:
    """The same samples go to the same experts, whatever the gate says now.

    indices: int64 [N, n], the experts of each sample of the batch, or of each of its tokens; on a CPU one out of range
        is refused.
    weights: [N, n], their factors, constants; ``None``: the gate's present scores of these experts, weighted by the
        layer's rule, with their gradient.

    Raises:
        ValueError: in a forward of another number of samples; weights of another shape than the indices.
    """

    indices: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        expect(self.indices.dim() == 2, "indices", "shape [B, n]", list(self.indices.shape))
        if self.weights is not None:
            ok = self.weights.shape == self.indices.shape
            expect(ok, "weights", f"shape {list(self.indices.shape)}, that of indices", list(self.weights.shape))

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        samples = record.scores.shape[0]
        expect(len(self.indices) == samples, "indices", f"routes for the {samples} samples", len(self.indices))
        if self.weights is not None:
            return self.indices, self.weights
        return self.indices, options.weigh(record.scores.gather(1, self.indices))


def last_routes(model: nn.Module) -> dict[str, FixedRoutes]:
    """Where the last forward sent its samples, with its weights as constants; keyed by the layer's name.

    Raises:
        RuntimeError: a layer that no forward has reached.
    """
    routes = {}
    for name, layer in moe_layers(model).items():
        if layer.routing is None:
            raise RuntimeError(f"model: expected a forward through {name or 'the layer'!r} first, got none")
        routes[name] = FixedRoutes(layer.routing.indices, layer.routing.weights.detach())
    return routes


@dataclass(frozen=True)
class DropTop:
    """Each sample does without its best expert: the next k take over, E − 1 if k = E, weighted by the layer's rule from
    their own scores.

    Raises:
        ValueError: in a forward of a layer with one expert.
    """

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        _expect_two(record, "DropTop")
        indices = _ranked(record)[:, 1 : options.top_k + 1]
        return indices, options.weigh(record.scores.gather(1, indices))


@dataclass(frozen=True)
class SwapTop:
    """The best and the second-best expert of each sample change places; the weights stay with the places. For k = 1 the
    second takes the first one's place.

    Raises:
        ValueError: in a forward of a layer with one expert.
    """

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        _expect_two(record, "SwapTop")
        ranked = _ranked(record)
        swapped = torch.cat([ranked[:, 1:2], ranked[:, :1], ranked[:, 2:]], 1)
        return swapped[:, : record.indices.shape[1]], record.weights


@dataclass(frozen=True, eq=False)
class RandomRoutes:
    """k different experts at random for each sample, all orders equally likely, with the weights of the places; where
    tokens are routed, for each token of a sample.

    A pure function of (seed, sample index, stream), T and E, so of neither the batch nor the device.

    sample_index: int64 [B], the samples' positions in their data set; the layer has B rows, or B T of tokens.
    seed: any 64-bit integer.
    stream: number of an independent draw, such as the layer's position in its model.
    """

    sample_index: Tensor
    seed: int = 0
    stream: int = 0

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        rows, experts = record.scores.shape
        samples = len(self.sample_index)
        ok = rows % samples == 0 if samples else rows == 0
        expect(ok, "sample_index", f"a number of samples that divides the {rows} rows", samples)
        middle = record.scores.new_full((samples, rows // max(samples, 1), experts), 0.5, dtype=torch.float32)
        draws = random_start(middle, 0.5, self.seed, self.sample_index, self.stream).flatten(0, 1)  # U[0, 1)
        return draws.sort(dim=1, stable=True).indices[:, : record.indices.shape[1]], record.weights


@dataclass(frozen=True)
class AllExperts:
    """The soft mixture, sum_i s_i e_i(x) over all E experts, s being the gate's scores: differentiable in the route, so
    a stand-in for a hard router when attacks are to be transferred to it."""

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        indices = _ranked(record)
        return indices, record.scores.gather(1, indices)


@dataclass(frozen=True)
class SoftGradient:
    """Forward what the gate decided, backward to the gate as if all E experts were mixed by its scores.

    The straight-through form of BPDA (Athalye et al., 2018, arXiv:1802.00420) for a choice that has no gradient: a hard
    router gets one, the sum over all experts of <dL/dy, e_i(x)> ds_i/dx. Runs all E experts; the output is the same, up
    to the rounding of experts that see other batches, as long as theirs are finite.
    """

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        chosen = torch.zeros_like(record.scores).scatter(1, record.indices, record.weights.detach())
        indices = _ranked(record)  # the chosen first: zeros are added behind them and change no bit of the sum
        soft = record.scores.gather(1, indices)
        return indices, chosen.gather(1, indices) + (soft - soft.detach())


def _ranked(record: RoutingRecord) -> Tensor:
    """All experts of each sample [B, E], best first, ties to the lowest index as in the gate."""
    return record.logits.detach().sort(dim=1, descending=True, stable=True).indices


def _expect_two(record: RoutingRecord, what: str) -> None:
    count = record.scores.shape[1]
    expect(count > 1, what, "a layer with at least 2 experts", count)
