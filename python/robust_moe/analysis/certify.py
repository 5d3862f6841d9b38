"""Certified ℓ∞ radii of small networks, mixtures of them and dual models, each with where its constants come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.analysis import bounds
from robust_moe.analysis.enclosure import METHODS, Box
from robust_moe.analysis.graph import Graph, lower
from robust_moe.analysis.layers import expect_plain
from robust_moe.analysis.parts import Data, HardMixture, NetworkPart, Part, SoftMixture, is_mixture, make_part
from robust_moe_kernels.checks import expect, expect_images

__all__ = ["KINDS", "STANDARDS", "Certificate", "certify_mixture", "network_graphs"]

KINDS = ("global", "local", "range")
STANDARDS = ("bounded", "any")


@dataclass(frozen=True)
class Certificate:
    """Radii of B images: the prediction is the label on the open ℓ∞ ball of ``radius``, within ``domain``."""

    radius: Tensor  # float64 [B], the best of ``radii``; 0: nothing is certified
    radii: dict[str, Tensor]  # kind -> float64 [B]
    domain: tuple[float, float] | None  # of the pixels
    slack: float  # in the unit that ``provenance["covers"]`` names: logits or probabilities
    provenance: dict[str, str]  # what each number is and how it was obtained


@torch.no_grad()
def certify_mixture(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    kinds: Sequence[str] = KINDS,
    method: str = "crown",
    standard: str = "bounded",
    domain: tuple[float, float] | None = (0.0, 1.0),
    max_radius: float = 0.25,
    steps: int = 14,
    slack: float = 0.0,
) -> Certificate:
    """The largest radii that can be certified for a soft or hard mixture, a dual model or a single network.

    For small networks: every bound runs through every layer of every expert. In a network of the size of ResNet-18 they
    are all 0; use :class:`~robust_moe.analysis.smoothing.Smoothed` there. The model is taken in evaluation mode.

    Three kinds, all sound, of which the largest is the certificate:

    - "global": the closed forms of :mod:`~robust_moe.analysis.bounds`, with constants that hold everywhere;
    - "local": the same with constants on a ball, capped at its radius; the best ball is found by bisection;
    - "range": margins bounded from below on a ball; the largest ball on which they are positive, by bisection.

    Networks with routed layers have "range" only (:mod:`~robust_moe.analysis.routed`): the others' radii are 0.

    Args:
        model: a network that :func:`~robust_moe.analysis.graph.lower` takes; a mixture of such, without routed layers
            (``gate``, ``experts.networks``, ``experts.domain``, see :mod:`~robust_moe.analysis.parts`), soft or hard;
            or a dual of two of these, with ``standard``, ``robust``, ``alpha`` and ``mix``.
        x: float32 or float64 [B, ...], in ``domain``. y: int64 labels [B]; an image the model gets wrong has radius 0.
        kinds: which of them to try.
        method: how values are enclosed, one of ``enclosure.METHODS``; "crown" is the tightest and dearest.
        standard: of a dual model, "bounded": F_S is analysed as well; "any": nothing is assumed of F_S but that it
            gives probabilities, so that it may be any network; positive for alpha > 1/2 only.
        domain: pixel range that perturbed images stay in; None: any.
        max_radius: where the search ends, > 0; steps: bisections, each an analysis of the whole model; the result is
            good to max_radius / 2**steps.
        slack: largest error of each number that margins are differences of where the model is deployed, for instance of
            float32: margins are lowered by twice as much. Those numbers are probabilities where probabilities are mixed
            (a soft mixture or a dual model of them), and *logits* otherwise (a single network, a hard mixture alone, a
            mixture of logits); ``provenance["covers"]`` tells. The leads of a hard router's logits are lowered by twice
            as much, too. 0: the model in exact arithmetic.

    Raises:
        ValueError: a setting out of range, or a model (or layer) that cannot be analysed, named.
    """
    expect_images(x, "x")
    expect(len(x) >= 1, "x", "at least one image", list(x.shape))
    expect(
        y.dtype == torch.int64 and y.shape == x.shape[:1], "y", f"int64 labels [{len(x)}]", f"{y.dtype} {list(y.shape)}"
    )
    unknown = [kind for kind in kinds if kind not in KINDS]
    expect(bool(kinds) and not unknown, "kinds", f"some of {', '.join(KINDS)}", list(kinds))
    expect(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
    expect(standard in STANDARDS, "standard", f"one of {', '.join(STANDARDS)}", repr(standard))
    expect(math.isfinite(max_radius) and max_radius > 0, "max_radius", "a finite number > 0", max_radius)
    expect(type(steps) is int and steps >= 1, "steps", "a count >= 1", steps)
    expect(math.isfinite(slack) and slack >= 0, "slack", "a finite number >= 0", slack)
    data = Data(x.detach().double(), y, method, domain, slack)
    whole = _Dual(model, data, standard) if _is_dual(model) else make_part(model, data, None, "model")
    start = torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def local(radius: Tensor) -> Tensor:
        return whole.radius(data.around(radius), radius, 2 * slack)

    def positive(radius: Tensor) -> Tensor:
        return torch.where((whole.low(radius) > 2 * slack).all(1), radius, start)

    radii = {}
    for kind in dict.fromkeys(kinds):
        if kind == "global":
            radii[kind] = whole.radius(None, max_radius, 2 * slack)
        else:
            radii[kind] = _search(local if kind == "local" else positive, start, max_radius, steps)
    best = torch.stack(list(radii.values())).amax(0)
    return Certificate(best, radii, domain, slack, _provenance(whole, kinds, method, slack, max_radius))


def network_graphs(model: nn.Module, shape: tuple[int, ...]) -> list[Graph]:
    """Every network that :func:`certify_mixture` bounds in ``model``, lowered for images of ``shape``: its own, those
    of a dual model's halves, a mixture's router and experts. Raises as ``lower``, before any bound is computed."""
    whole: Any = model  # duals and mixtures are known by their attributes
    if _is_dual(model):
        return network_graphs(whole.standard, shape) + network_graphs(whole.robust, shape)
    if is_mixture(model):
        return [lower(network, shape) for network in (whole.gate, *whole.experts.networks)]
    return [lower(model, shape)]


class _Dual:
    """(1 − α) F_S + α F_R, in the terms of :mod:`robust_moe.analysis.parts`."""

    def __init__(self, model: nn.Module, data: Data, standard: str) -> None:
        expect_plain(model, "model")
        dual: Any = model  # known by its attributes, see _is_dual
        self.alpha, self.mix = float(dual.alpha), str(dual.mix)
        any_standard = standard == "any"
        ok = not any_standard or self.mix == "probabilities"
        expect(ok, "model.mix", "'probabilities' with standard='any'", repr(self.mix))
        self.robust = make_part(dual.robust, data, self.mix, "model.robust")
        self.standard = None if any_standard else make_part(dual.standard, data, self.mix, "model.standard")

    def low(self, radius: Tensor) -> Tensor:
        floor = -1.0 if self.standard is None else self.standard.low(radius)
        low = (1 - self.alpha) * floor + self.alpha * self.robust.low(radius)
        return low - 1e-12 * (1 + low.abs())

    def radius(self, images: Box | None, within: Tensor | float, slack: float) -> Tensor:
        slope, margin = self.robust.slope(images), self.robust.margin
        if self.standard is None:
            if slope is None:
                return margin.new_zeros(len(margin))
            # less slack of the dual's margin is slack / α less of the robust one's
            robust = margin - slack / max(self.alpha, 1e-12)
            return bounds.dual_radius_any_standard(self.alpha, robust, slope, within)
        other = self.standard.slope(images)
        if slope is None or other is None:
            return margin.new_zeros(len(margin))
        return bounds.dual_radius(self.alpha, self.standard.margin - slack, other, margin - slack, slope, within)


def _is_dual(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("standard", "robust", "alpha", "mix"))


def _search(attempt: Callable[[Tensor], Tensor], start: Tensor, largest: float, steps: int) -> Tensor:
    """The largest certified radius that bisection finds; ``attempt``: ball radii [B] -> what they certify, at most
    these.

    Where a ball certifies itself a larger one is tried, elsewhere a smaller. Whatever was certified on the way counts.
    """
    low, high = start.clone(), torch.full_like(start, largest)
    at = high
    best = start
    for _ in range(steps):
        found = attempt(at)
        best = torch.maximum(best, found)
        low = torch.maximum(torch.where(found >= at, at, low), found)
        high = torch.where(found >= at, high, at)
        at = (low + high) / 2
    return best


def _provenance(
    whole: Part | _Dual, kinds: Sequence[str], method: str, slack: float, max_radius: float
) -> dict[str, str]:
    parts: dict[str, Part] = {}
    if not isinstance(whole, _Dual):
        parts["model"] = whole
    else:
        parts["robust"] = whole.robust
        if whole.standard is not None:
            parts["standard"] = whole.standard
    told = {name: _DESCRIBED[type(part)] + _routed(part) for name, part in parts.items()}
    if isinstance(whole, _Dual):
        told["dual"] = f"(1 - α) F_S + α F_R, α = {whole.alpha:g}"
        if whole.standard is None:
            told["standard"] = "F_S: any probabilities, nothing known of it"
    for kind in kinds:
        told[kind] = _KIND_TEXT[kind].format(method=method, max_radius=max_radius)
    told["rounding"] = "float64 throughout; margins rounded down and constants up by bounds on every operation's error"
    told["covers"] = "the network in exact arithmetic"
    if slack > 0:
        told["covers"] = f"evaluations whose {whole.mix} are within {slack:g} of those in exact arithmetic"
        if any(isinstance(part, HardMixture) for part in parts.values()):
            told["covers"] += ", and a hard router's logits too"
    return told


def _routed(part: Part) -> str:
    routed = isinstance(part, NetworkPart) and part.graph.routed
    return "; routed layers: weights bounded by pairs of the gate's logits; no global or local constants" * routed


_DESCRIBED = {
    NetworkPart: "one network: min_j m_j / L_j",
    SoftMixture: "soft mixture: min_j m_j / Σ_i (a_i L_ij + r_i M_ij), M_ij from the middle of the experts' margins",
    HardMixture: "hard top-1: min_k max(t_k, ρ_k), t_k from pairs of the router's logits, ρ_k = min_j g_kj / L_kj",
}
_KIND_TEXT = {
    "global": "closed form; constants valid everywhere: gradients by intervals with every ReLU open; margins of"
    " probabilities within [-1, 1], of logits unbounded",
    "local": "closed form; constants valid on a ball: ReLU states and values by {method}, gradients by intervals;"
    " ball by bisection up to {max_radius:g}",
    "range": "margins bounded below on a ball by {method}; ball by bisection up to {max_radius:g}",
}
