"""Sound bounds over a set of images: on every layer's values, on linear functions of the output, on its gradient.

Interval propagation (IBP; Gowal et al., 2018, arXiv:1810.12715) and backward linear relaxation (CROWN; Zhang et al.,
2018, arXiv:1811.00866), over the graph of :mod:`robust_moe.analysis.graph`, in float64 with every rounding bounded
(:mod:`robust_moe.analysis.rounding`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe.analysis.graph import Add, Affine, Graph, Input, Relu
from robust_moe.analysis.rounding import UNDERFLOW, gamma
from robust_moe.analysis.routed import Mix, Mixed, Weights, relaxed_mix, weight_bounds
from robust_moe_kernels.checks import expect, expect_shape, expect_tensor

__all__ = ["METHODS", "Box", "ball", "expect_continuous", "gradient_bounds", "layer_bounds", "linear_bounds"]

METHODS = ("ibp", "crown-ibp", "crown")


class Box(NamedTuple):
    """|value − centre| ≤ radius for all values; float64 [B, ...]."""

    centre: Tensor
    radius: Tensor

    @property
    def low(self) -> Tensor:
        """Lower ends, rounded down."""
        return self.centre - self.radius - gamma(0) * self.magnitude

    @property
    def high(self) -> Tensor:
        """Upper ends, rounded up."""
        return self.centre + self.radius + gamma(0) * self.magnitude

    @property
    def magnitude(self) -> Tensor:
        """No value is larger than this."""
        return self.centre.abs() + self.radius

    @classmethod
    def between(cls, low: Tensor, high: Tensor) -> Box:
        """The box with these ends, rounded outwards."""
        centre, radius = (low + high) / 2, (high - low).clamp_min(0) / 2
        return cls(centre, radius + gamma(0) * (low.abs() + high.abs()) + UNDERFLOW)


def ball(x: Tensor, eps: Tensor | float, domain: tuple[float, float] | None = (0.0, 1.0)) -> Box:
    """Images of ``domain`` (None: anywhere) within ``eps``, a number or [B], of ``x`` [B, ...] in ℓ∞."""
    expect_tensor(x, "x")
    expect(x.dim() >= 2, "x", "at least 2 dimensions [B, ...]", f"shape {list(x.shape)}")
    x = x.detach().double()
    eps = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
    expect(bool(((eps >= 0) & eps.isfinite()).all()), "eps", "finite radii >= 0", eps.min().item())
    if eps.dim():
        expect_shape(eps, "eps", (x.shape[0],), "B")
        eps = eps.view(-1, *[1] * (x.dim() - 1))
    low, high = x - eps, x + eps
    if domain is not None:
        inside = (x >= domain[0]) & (x <= domain[1])
        expect(bool(inside.all()), "x", f"pixels in [{domain[0]:g}, {domain[1]:g}]", f"{x.min():g} to {x.max():g}")
        low, high = low.clamp_min(domain[0]), high.clamp_max(domain[1])
    return Box.between(low, high)


@torch.no_grad()
def layer_bounds(graph: Graph, images: Box, method: str = "ibp") -> list[Box]:
    """A box for every node of the graph.

    method: ``"ibp"`` or ``"crown-ibp"``: intervals, layer by layer; ``"crown"``: what each ReLU reads is bounded by
        backward relaxation too, which costs a backward pass for each of its numbers: small networks only.
    """
    expect(method in METHODS, "method", f"one of {', '.join(METHODS)}", repr(method))
    wanted = graph.shapes[0]
    shape = images.centre.shape[1:]
    expect(shape == wanted, "images", f"shape [B, {', '.join(map(str, wanted))}]", list(images.centre.shape))
    read = {node.source for node in graph.nodes if isinstance(node, Relu)}
    boxes: list[Box] = []
    for i, node in enumerate(graph.nodes):
        if isinstance(node, Input):
            box = images
        elif isinstance(node, Affine):
            box = _affine(node, boxes[node.source], max(graph.size(node.source), graph.size(i)))
        elif isinstance(node, Relu):
            source = boxes[node.source]
            box = Box.between(source.low.clamp_min(0), source.high.clamp_min(0))
        elif isinstance(node, Weights):
            low, high = weight_bounds(_leads(graph, boxes, node.source, method), node.top_k, node.renormalize)
            box = Box.between(low, high)
            box = Box(box.centre, torch.where(high > 0, box.radius, 0.0))
        elif isinstance(node, Mix):
            box = _mixed(node, boxes)
        else:
            first, second = boxes[node.first], boxes[node.second]
            centre = first.centre + second.centre
            error = gamma(2) * (first.magnitude + second.magnitude)
            box = Box(centre, first.radius + second.radius + error)
        boxes.append(box)
        if method == "crown" and i in read and not isinstance(node, Input) and _matters(graph, boxes, i):
            spec = torch.eye(graph.size(i), dtype=torch.float64, device=box.centre.device)
            low = linear_bounds(graph, boxes, spec, i).view_as(box.centre)
            high = -linear_bounds(graph, boxes, -spec, i).view_as(box.centre)
            boxes[i] = Box.between(torch.maximum(low, box.low), torch.minimum(high, box.high))
    return boxes


def _matters(graph: Graph, boxes: list[Box], node: int) -> bool:
    """Whether it is no part of an expert that no image is sent to, whose bounds would be for nothing."""
    weights, expert = graph.experts.get(node, (None, 0))
    return weights is None or bool((boxes[weights].high[:, expert] > 0).any())


def _leads(graph: Graph, boxes: list[Box], node: int, method: str) -> Tensor:
    """Lower bounds of a node's differences v_i − v_j at [b, i, j]; [B, n, n]."""
    box = boxes[node]
    size = box.magnitude
    low = box.low[:, :, None] - box.high[:, None] - gamma(2) * (size[:, :, None] + size[:, None])
    if method == "ibp":
        return low
    eye = torch.eye(graph.size(node), dtype=torch.float64, device=low.device)
    pairs = (eye[:, None] - eye).flatten(0, 1)
    return torch.maximum(low, linear_bounds(graph, boxes, pairs, node).view_as(low))


def _relaxed_mix(node: Mix, boxes: list[Box]) -> Mixed:
    low, high = (torch.stack([getattr(boxes[i], end) for i in node.experts], 1) for end in ("low", "high"))
    return relaxed_mix(*boxes[node.weights], low, high, node.convex)


def _mixed(node: Mix, boxes: list[Box]) -> Box:
    """What the affine map gives, and no more than the hull of the experts that may be chosen."""
    mixed = _relaxed_mix(node, boxes)
    experts = [boxes[i] for i in node.experts]
    shares = mixed.coefficients.view(*mixed.coefficients.shape, *[1] * (mixed.lift.dim() - 1)).unbind(1)
    centre, radius, size = mixed.lift, mixed.error, mixed.lift.abs() + mixed.error
    for share, box in zip(shares, experts, strict=True):
        centre, radius, size = centre + share * box.centre, radius + share * box.radius, size + share * box.magnitude
    box = Box(centre, radius + gamma(len(experts) + 4) * size + UNDERFLOW)
    if not node.convex:
        return box
    ever = (boxes[node.weights].high > 0).view(len(centre), -1, *[1] * (centre.dim() - 1))
    low = torch.stack([expert.low for expert in experts], 1).masked_fill(~ever, torch.inf).amin(1)
    high = torch.stack([expert.high for expert in experts], 1).masked_fill(~ever, -torch.inf).amax(1)
    return Box.between(torch.maximum(box.low, low), torch.minimum(box.high, high))


def _affine(node: Affine, box: Box, size: int) -> Box:
    centre, radius = node.linear(box.centre, False), node.linear(box.radius, True)
    if node.exact:
        return Box(centre, radius)
    scale = node.linear(box.magnitude, True)
    if node.bias is not None:
        assert node.bias_size is not None
        centre, scale = centre + node.bias, scale + node.bias_size
    return Box(centre, radius + gamma(size) * scale + UNDERFLOW)


@torch.no_grad()
def linear_bounds(graph: Graph, boxes: list[Box], spec: Tensor, node: int | None = None) -> Tensor:
    """Lower bounds of spec · value over the images, by backward linear relaxation (CROWN); float64 [B, S].

    spec: [S, n] for the n numbers of ``node`` (None: the output), flattened; upper bounds: minus the bounds of −spec.
    Every ReLU lies between two lines: above both ends' chord, and below 0 or x, whichever wastes less. With λ the
    coefficients that have come back to a node, λ·A x is computed as (λA)·x with an error of at most γ |λ||A| · max |x|,
    which is taken off the bound: the coefficients themselves may be rounded, the bound is safe. Each may underflow,
    too, which takes UNDERFLOW · Σ max |x| off at every node.
    """
    target = len(graph.nodes) - 1 if node is None else node
    batch, count = boxes[0].centre.shape[0], spec.shape[0]
    start = spec.double().reshape(1, count, *graph.shapes[target]).expand(batch, -1, *graph.shapes[target])
    pending = {target: start}
    bound = start.new_zeros(batch, count)
    slack = start.new_zeros(batch, count)

    def total(values: Tensor) -> Tensor:
        return values.flatten(2).sum(2)

    def give(to: int, values: Tensor) -> None:
        nonlocal slack
        if to in pending:
            values = values + pending[to]
            slack = slack + gamma(0) * total(values.abs() * boxes[to].magnitude[:, None])
        pending[to] = values

    for i in range(target, 0, -1):
        if i not in pending:
            continue
        coefficients, part = pending.pop(i), graph.nodes[i]
        if isinstance(part, Mix):
            for source in part.experts:
                slack = slack + UNDERFLOW * (1 + total(boxes[source].magnitude[:, None]))
        elif isinstance(part, Affine | Relu | Weights):
            slack = slack + UNDERFLOW * (1 + total(boxes[part.source].magnitude[:, None]))
        if isinstance(part, Affine):
            shape, size = graph.shapes[part.source], max(graph.size(part.source), graph.size(i))
            if part.bias is not None:
                assert part.bias_size is not None
                bound = bound + total(coefficients * part.bias)
                slack = slack + gamma(size) * (total(coefficients.abs() * part.bias_size) + bound.abs())
            if not part.exact:
                spread = part.transposed(coefficients.abs(), shape, absolute=True)
                slack = slack + gamma(size) * total(spread * boxes[part.source].magnitude[:, None])
            give(part.source, part.transposed(coefficients, shape))
        elif isinstance(part, Relu):
            slope_low, slope_high, lift = (value[:, None] for value in _relaxed(boxes[part.source]))
            up, down = coefficients.clamp_min(0), coefficients.clamp_max(0)
            constant = down * lift
            bound = bound + total(constant)
            sizes = total(constant.abs()) + total(coefficients.abs() * boxes[part.source].magnitude[:, None])
            slack = slack + gamma(graph.size(i)) * (sizes + bound.abs())
            give(part.source, up * slope_low + down * slope_high)
        elif isinstance(part, Mix):
            mixed = _relaxed_mix(part, boxes)
            constant = coefficients * mixed.lift[:, None]
            error = total(coefficients.abs() * mixed.error[:, None])
            bound = bound + total(constant) - error
            slack = slack + gamma(graph.size(i)) * (total(constant.abs()) + error + bound.abs())
            for source, share in zip(part.experts, mixed.coefficients.unbind(1), strict=True):
                if bool(share.any()):
                    scaled = coefficients * share.view(-1, *[1] * (coefficients.dim() - 1))
                    slack = slack + gamma(2) * total(scaled.abs() * boxes[source].magnitude[:, None])
                    give(source, scaled)
        elif isinstance(part, Add):
            give(part.first, coefficients)
            give(part.second, coefficients)
    if 0 in pending:
        images, coefficients = boxes[0], pending[0]
        bound = (
            bound + total(coefficients * images.centre[:, None]) - total(coefficients.abs() * images.radius[:, None])
        )
        sizes = total(coefficients.abs() * images.magnitude[:, None])
        slack = slack + gamma(graph.size(0)) * (sizes + bound.abs()) + UNDERFLOW
    return bound - slack * (1 + 1e-6)  # the slack's own rounding


def _relaxed(box: Box) -> tuple[Tensor, Tensor, Tensor]:
    """(slope below, slope above, lift above): slope_low · x ≤ max(x, 0) ≤ slope_high · x + lift on the box."""
    low, high = box.low, box.high
    active, dead = low >= 0, high <= 0
    width = torch.where(active | dead, 1.0, high - low)
    chord = high / width * (1 + gamma(0)) + UNDERFLOW  # a steeper line through (low, 0) is above as well
    slope_high = torch.where(active, 1.0, torch.where(dead, 0.0, chord))
    slope_low = torch.where(active, 1.0, torch.where(dead, 0.0, (high > -low).double()))
    return slope_low, slope_high, torch.where(active | dead, 0.0, UNDERFLOW - chord * low)


def expect_continuous(graph: Graph) -> None:
    """Raise ValueError for a network with routed layers."""
    wanted = "a network without routed layers: where a route changes its output jumps, and no Lipschitz constant holds"
    expect(not graph.routed, "model", wanted, "one with them")


@torch.no_grad()
def gradient_bounds(graph: Graph, spec: Tensor, boxes: list[Box] | None = None) -> Box:
    """Every gradient of spec · output that the images meet; a box [B, S, *input] (B = 1 without ``boxes``).

    Backwards through the graph: an affine map multiplies an interval of gradients by its transpose; a ReLU whose input
    is positive on the whole box passes it, one whose input is negative stops it, any other multiplies it by something
    in [0, 1]. Without ``boxes`` every ReLU is of the last kind: the box holds everywhere. The function is piecewise
    linear, so on a convex set the largest ℓ1 norm in the box is an ℓ∞ Lipschitz constant.

    spec: [S, outputs].

    Raises:
        ValueError: a network with routed layers, which is not continuous.
    """
    expect_continuous(graph)
    expect(spec.dim() == 2 and spec.shape[1] == graph.outputs, "spec", f"shape [S, {graph.outputs}]", list(spec.shape))
    last = len(graph.nodes) - 1
    spec = spec.double()
    batch = 1 if boxes is None else boxes[0].centre.shape[0]
    start = spec.expand(batch, *spec.shape)
    pending = {last: Box(start, torch.zeros_like(start))}

    def give(to: int, box: Box) -> None:
        if to in pending:
            old = pending[to]
            error = gamma(2) * (old.magnitude + box.magnitude)
            box = Box(old.centre + box.centre, old.radius + box.radius + error)
        pending[to] = box

    for i in range(last, 0, -1):
        if i not in pending:
            continue
        box, part = pending.pop(i), graph.nodes[i]
        if isinstance(part, Affine):
            shape, size = graph.shapes[part.source], max(graph.size(part.source), graph.size(i))
            radius = part.transposed(box.radius, shape, absolute=True)
            if not part.exact:
                radius = radius + gamma(size) * part.transposed(box.magnitude, shape, absolute=True)
            give(part.source, Box(part.transposed(box.centre, shape), radius + UNDERFLOW))
        elif isinstance(part, Relu):
            low, high = box.low.clamp_max(0), box.high.clamp_min(0)
            partly = Box.between(low, high)
            if boxes is None:
                give(part.source, partly)
                continue
            active = (boxes[part.source].low > 0)[:, None]
            dead = (boxes[part.source].high < 0)[:, None]
            centre = torch.where(active, box.centre, torch.where(dead, 0.0, partly.centre))
            give(part.source, Box(centre, torch.where(active, box.radius, torch.where(dead, 0.0, partly.radius))))
        elif isinstance(part, Add):
            give(part.first, box)
            give(part.second, box)
    zero = spec.new_zeros(batch, spec.shape[0], *graph.shapes[0])
    return pending.get(0, Box(zero, zero))
