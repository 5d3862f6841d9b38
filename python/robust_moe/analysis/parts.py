"""What a certificate needs of each part of a model over a set of images: margins, and how fast they fall.

A part is a plain network or a mixture of networks. A mixture is known by its attributes, those of
:class:`robust_moe.models.ExpertMixture`: ``gate`` (images -> logits [B, E]), ``experts.networks``, ``experts.domain``
(what is mixed, "probabilities" or "logits"), ``top_k``, ``renormalize``, ``straight_through``, ``fixed_expert``,
``reroute``, ``inference``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust_moe.analysis import bounds
from robust_moe.analysis.enclosure import Box, ball
from robust_moe.analysis.graph import Graph, lower
from robust_moe.analysis.layers import expect_plain
from robust_moe.analysis.lipschitz import (
    Probabilities,
    enclose_probabilities,
    global_probabilities,
    other_classes,
    simplex_max,
)
from robust_moe.analysis.reach import router_reach
from robust_moe_kernels.checks import expect

__all__ = ["MIXES", "Data", "HardMixture", "Margins", "NetworkPart", "Part", "SoftMixture", "is_mixture", "make_part"]

MIXES = ("probabilities", "logits")


class Data(NamedTuple):
    """The images, and how their surroundings are enclosed."""

    x: Tensor  # [B, ...]
    y: Tensor  # int64 [B]
    method: str  # of enclosure.METHODS
    domain: tuple[float, float] | None  # of the pixels
    slack: float = 0.0  # error of a hard router's logits where the model is deployed; margins are left to the caller

    def around(self, radius: Tensor | float) -> Box:
        """Images within ``radius``, a number or [B]."""
        return ball(self.x, radius, self.domain)


class Margins(NamedTuple):
    """Bounds on margins over a set of images, and their ℓ∞ Lipschitz constants there; float64 [B, J]."""

    low: Tensor
    high: Tensor
    lipschitz: Tensor


class NetworkPart:
    """One network; its margins are differences of logits, or of probabilities: ``mix`` tells, of every part."""

    def __init__(self, network: nn.Module, data: Data, mix: str) -> None:
        self.data, self.mix = data, mix
        self.graph = lower(network, tuple(data.x.shape[1:]))
        classes = self.graph.outputs
        expect(classes >= 2, "model", "at least 2 classes", classes)
        self.others = other_classes(data.y, classes)
        self.margin = self.over(data.around(0.0), gradients=False).low

    def over(self, images: Box | None, gradients: bool = True) -> Margins:
        """Margins over the images; ``None``: anywhere."""
        found = _enclose(self.graph, images, self.data, gradients)
        if self.mix == "probabilities":
            return Margins(*found.margins(self.data.y), found.margin_lipschitz(self.data.y))
        rows = torch.arange(len(self.others), device=self.others.device)
        low, high, constants = (
            values[rows, self.data.y].gather(1, self.others)
            for values in (found.difference_low, found.difference_high, found.difference_lipschitz)
        )
        return Margins(low, high, constants)

    def slope(self, images: Box | None) -> Tensor | None:
        """How fast the margins may fall, [B, J]; ``None``: no bound, as they jump where a routed layer's choice
        changes."""
        return None if self.graph.routed else self.over(images).lipschitz

    def low(self, radius: Tensor) -> Tensor:
        """Lower bounds of the margins over the images within ``radius`` [B], [B, J]."""
        return self.over(self.data.around(radius), gradients=False).low

    def radius(self, images: Box | None, within: Tensor | float, slack: float) -> Tensor:
        """The closed form, with constants that hold on the images, which lie within ``within``; [B], 0 without."""
        slope = self.slope(images)
        if slope is None:
            return self.margin.new_zeros(len(self.margin))
        return bounds.moe_radius(self.margin - slack, slope, within)


class _Mixture:
    """A router and its experts."""

    def __init__(self, model: nn.Module, data: Data, mix: str) -> None:
        mixture: Any = model  # known by its attributes
        self.data, self.mix = data, mix
        self.experts = [NetworkPart(network, data, mix) for network in mixture.experts.networks]
        classes = [expert.graph.outputs for expert in self.experts]
        expect(len(set(classes)) == 1, "model.experts", "networks of one number of classes", classes)
        self.router = lower(mixture.gate, tuple(data.x.shape[1:]))
        plain = not any(graph.routed for graph in (self.router, *(expert.graph for expert in self.experts)))
        expect(plain, "model", "a mixture of networks without routed layers of their own", "one with them")
        outputs = self.router.outputs
        expect(outputs == len(self.experts), "model.gate", f"{len(self.experts)} logits, one an expert", outputs)
        self.routing = _enclose(self.router, data.around(0.0), data, gradients=False)  # at x itself

    def over(self, images: Box | None, gradients: bool = True) -> Margins:
        """Every expert's margins, stacked: [B, E, J]."""
        parts = [expert.over(images, gradients) for expert in self.experts]
        return Margins(*(torch.stack(values, 1) for values in zip(*parts, strict=True)))

    def points(self) -> Tensor:
        """Every expert's margins at x, rounded down; [B, E, J]."""
        return torch.stack([expert.margin for expert in self.experts], 1)


class SoftMixture(_Mixture):
    """Σ_i a_i(x) f_i(x), a = softmax of the router."""

    def __init__(self, model: nn.Module, data: Data, mix: str) -> None:
        super().__init__(model, data, mix)
        self.margin = _least(self.points(), self.routing)

    def slope(self, images: Box | None) -> Tensor | None:
        """S_j of :mod:`robust_moe.analysis.bounds`, with margins centred over the experts; ``None``: unbounded
        margins."""
        margins = self.over(images)
        middle = (margins.high.amax(1, keepdim=True) + margins.low.amin(1, keepdim=True)) / 2
        away = torch.maximum(margins.high - middle, middle - margins.low)
        if not bool(away.isfinite().all()):
            return None
        rates = _enclose(self.router, images, self.data).lipschitz()
        return bounds.mixture_slope(self.routing.high, margins.lipschitz, rates, away * (1 + 1e-12))

    def low(self, radius: Tensor) -> Tensor:
        """The least Σ a_i g_ij over all weights and margins that the images within ``radius`` allow; [B, J]."""
        images = self.data.around(radius)
        routing = _enclose(self.router, images, self.data, gradients=False)
        return _least(self.over(images, gradients=False).low, routing)

    def radius(self, images: Box | None, within: Tensor | float, slack: float) -> Tensor:
        """As :meth:`NetworkPart.radius`; 0 where margins are unbounded."""
        slope = self.slope(images)
        if slope is None:
            return self.margin.new_zeros(len(self.margin))
        return bounds.moe_radius(self.margin - slack, slope, within)


class HardMixture(_Mixture):
    """f_{argmax h(x)}(x), h being the router's logits."""

    def __init__(self, model: nn.Module, data: Data, mix: str) -> None:
        super().__init__(model, data, mix)
        chosen = self._reach(data.around(0.0)) <= 0
        self.margin = _reached(self.points(), chosen)

    def slope(self, images: Box | None) -> None:
        """None: the margins jump where the route changes."""

    def low(self, radius: Tensor) -> Tensor:
        """The least margin of the experts that are reachable within ``radius``; [B, J]."""
        images = self.data.around(radius)
        return _reached(self.over(images, gradients=False).low, self._reach(images) <= radius[:, None])

    def radius(self, images: Box | None, within: Tensor | float, slack: float) -> Tensor:
        """As :meth:`NetworkPart.radius`, by :func:`~robust_moe.analysis.bounds.hard_router_radius`."""
        constants = self.over(images).lipschitz
        return bounds.hard_router_radius(self._reach(images), self.points() - slack, constants, within)

    def _reach(self, images: Box | None) -> Tensor:
        """[B, E]; beyond the images' own radius a lower bound only where the router is affine, and never asked for."""
        constants = _enclose(self.router, images, self.data).difference_lipschitz
        return router_reach(self.routing.difference_low - 2 * self.data.slack, constants)


def is_mixture(model: nn.Module) -> bool:
    """Whether the model has a router and networks as experts."""
    return hasattr(model, "gate") and hasattr(getattr(model, "experts", None), "networks")


Part = NetworkPart | SoftMixture | HardMixture


def make_part(model: nn.Module, data: Data, mix: str | None, name: str) -> Part:
    """The part that ``model`` is; ``mix``: of what the margins must be differences (None: whatever suits the model).

    Raises:
        ValueError: a model whose output is not a mixture in ``mix``, a routing that is neither soft nor hard, hooks
    """
    if not is_mixture(model):
        return NetworkPart(model, data, mix or "logits")
    expect_plain(model, name)
    mixture: Any = model  # known by its attributes
    expect_plain(mixture.experts, f"{name}.experts")
    free = all(getattr(model, option, None) is None for option in ("fixed_expert", "reroute", "inference"))
    expect(free, name, "a mixture whose router decides", "one with a fixed expert, an imposed route or a routing rule")
    count, domain = len(mixture.experts.networks), mixture.experts.domain
    if mixture.top_k >= count:
        ok = mix in (None, domain)
        expect(ok, f"{name}.experts.domain", f"{mix!r}, which the dual model mixes", repr(domain))
        return SoftMixture(model, data, domain)
    expect(mixture.top_k == 1, f"{name}.top_k", f"1 (hard) or {count} (soft, all experts)", mixture.top_k)
    weight = mixture.renormalize or mixture.straight_through
    expect(weight, name, "a hard mixture that gives its expert weight 1", "one that scales by the score")
    ok = mix != "logits" or domain == "logits"
    expect(ok, f"{name}.experts.domain", "'logits', which the dual model mixes", repr(domain))
    return HardMixture(model, data, mix or "logits")


def _enclose(graph: Graph, images: Box | None, data: Data, gradients: bool = True) -> Probabilities:
    if images is None:
        return global_probabilities(graph, len(data.x), data.x.device)
    return enclose_probabilities(graph, images, data.method, gradients)


def _least(margins: Tensor, routing: Probabilities) -> Tensor:
    """min Σ_i a_i g_ij over the weights that the router may give; [B, E, J] -> [B, J]."""
    return -simplex_max(-margins.transpose(1, 2), routing.low[:, None], routing.high[:, None])


def _reached(margins: Tensor, reached: Tensor) -> Tensor:
    """min over the experts that are reached, [B, E, J] and bool [B, E] -> [B, J]."""
    return margins.masked_fill(~reached[:, :, None], torch.inf).amin(1)
