"""Sound ℓ∞ Lipschitz constants: of networks by norm products, of margins and probabilities over a ball by bounds on
ReLUs.

All are float64 and rounded up. "ℓ∞ Lipschitz constant" of a real function g: |g(x') − g(x)| ≤ L ‖x' − x‖∞, for a
piecewise smooth g on a convex set the largest ℓ1 norm of its gradient there.

A product of layer norms is an upper bound too, but for a deep network a vacuous one: for the margins of a ResNet-18 at
initialisation it is above 10^27.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust_moe.analysis.enclosure import Box, expect_continuous, gradient_bounds, layer_bounds, linear_bounds
from robust_moe.analysis.graph import Add, Affine, Graph, Input, Relu
from robust_moe.analysis.rounding import ABSOLUTE, RELATIVE, UNDERFLOW, gamma
from robust_moe_kernels.checks import expect, expect_tensor

__all__ = [
    "Probabilities",
    "class_margins",
    "enclose_probabilities",
    "global_probabilities",
    "lipschitz_constants",
    "norm_product",
    "other_classes",
    "pair_rows",
    "simplex_max",
]

_EXPONENT = 300.0  # e^300 is infinity as far as a sum that is no smaller than 1, and its inverse, go


def other_classes(y: Tensor, classes: int) -> Tensor:
    """The classes that are not the label, ascending; int64 [B, classes − 1] from labels int64 [B]."""
    expect_tensor(y, "y")
    ok = y.dim() == 1 and y.dtype == torch.int64
    expect(ok, "y", "int64 labels [B]", f"{y.dtype} {list(y.shape)}")
    expect(classes >= 2, "classes", "at least 2", classes)
    inside = y.numel() == 0 or bool(((y >= 0) & (y < classes)).all())
    expect(inside, "y", f"labels in 0..{classes - 1}", "a label outside")
    columns = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return columns + (columns >= y[:, None])


def class_margins(values: Tensor, y: Tensor) -> Tensor:
    """values[..., y] − values[..., j] for the other classes j, ascending: [B, ..., C] -> [B, ..., C − 1]."""
    expect_tensor(values, "values")
    expect(values.dim() >= 2, "values", "at least 2 dimensions [B, ..., C]", f"shape {list(values.shape)}")
    others = other_classes(y, values.shape[-1])
    expect(len(y) == len(values), "y", f"{len(values)} labels, as values", len(y))
    middle = [1] * (values.dim() - 2)
    index = others.view(len(y), *middle, -1).expand(*values.shape[:-1], -1)
    label = y.view(len(y), *middle, 1).expand(*values.shape[:-1], 1)
    return values.gather(-1, label) - values.gather(-1, index)


def pair_rows(classes: int, device: torch.device | None = None) -> Tensor:
    """Rows e_a − e_b for all a < b; float64 [C (C − 1) / 2, C]."""
    first, second = torch.triu_indices(classes, classes, 1, device=device)
    eye = torch.eye(classes, dtype=torch.float64, device=device)
    return eye[first] - eye[second]


def _square(values: Tensor, classes: int, mirrored: Tensor) -> Tensor:
    """[B, P] over pairs a < b as [B, C, C], with ``mirrored`` for b > a and 0 on the diagonal."""
    first, second = torch.triu_indices(classes, classes, 1, device=values.device)
    square = values.new_zeros(len(values), classes, classes)
    square[:, first, second], square[:, second, first] = values, mirrored
    return square


@torch.no_grad()
def norm_product(graph: Graph, spec: Tensor) -> Tensor:
    """Global ℓ∞ Lipschitz constants of spec · output: operator norms of the layers, multiplied; float64 [S].

    ‖A‖∞→∞ is the largest ℓ1 norm of a row; a ReLU's constant is 1; constants of summands add up. The last affine layer
    is taken together with ``spec`` [S, outputs], which keeps margins from paying twice what classes share. Cheap for
    any network without routed layers; :func:`lipschitz_constants` is never larger.
    """
    expect_continuous(graph)
    constants: list[float] = []
    for node in graph.nodes:
        if isinstance(node, Input):
            constants.append(1.0)
        elif isinstance(node, Affine):
            ones = torch.ones(1, *graph.shapes[node.source], dtype=torch.float64, device=spec.device)
            row = 1.0 if node.exact else node.linear(ones, True).max().item() * (1 + gamma(graph.size(node.source)))
            constants.append(constants[node.source] * (row + UNDERFLOW) + UNDERFLOW)
        elif isinstance(node, Relu):
            constants.append(constants[node.source])
        elif isinstance(node, Add):
            constants.append((constants[node.first] + constants[node.second]) * (1 + gamma(0)))
    last, spec = graph.nodes[-1], spec.double()
    if not isinstance(last, Affine):
        return spec.abs().sum(1) * constants[-1] * (1 + gamma(graph.outputs))
    shape, size = graph.shapes[last.source], graph.size(last.source) + graph.outputs
    rows = last.transposed(spec[None], shape).abs().flatten(2).sum(2)[0]
    error = last.transposed(spec[None].abs(), shape, absolute=True).flatten(2).sum(2)[0]
    return (rows + gamma(size) * error + UNDERFLOW) * constants[last.source] * (1 + gamma(size)) + UNDERFLOW


def lipschitz_constants(graph: Graph, spec: Tensor, boxes: list[Box] | None = None) -> Tensor:
    """ℓ∞ Lipschitz constants of spec · output; float64 [B, S], or [1, S] and global without ``boxes``.

    The ℓ1 norm of the interval that :func:`~robust_moe.analysis.enclosure.gradient_bounds` finds: with ``boxes`` (of
    :func:`~robust_moe.analysis.enclosure.layer_bounds`) on the set of images they are for, which must be convex.
    Exact, up to rounding, for an affine network, and on a set where no ReLU changes its state.
    """
    gradient = gradient_bounds(graph, spec, boxes).magnitude.flatten(2)
    return gradient.sum(2) * (1 + gamma(gradient.shape[2]))


def simplex_max(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """max Σ_b p_b v_b over low ≤ p ≤ high, Σ p = 1, rounded up; [..., n] each -> [...].

    What is left after every p_b has its ``low`` goes to the largest values first. The box must hold a distribution.
    """
    values, low, high = torch.broadcast_tensors(values, low, high)
    order = values.argsort(-1, descending=True)
    room = (high - low).gather(-1, order)
    left = (1 - low.sum(-1, keepdim=True)).clamp_min(0)
    before = room.cumsum(-1) - room
    taken = torch.minimum((left - before).clamp_min(0), room)
    total = (low * values).sum(-1) + (taken * values.gather(-1, order)).sum(-1)
    return total + RELATIVE * values.abs().amax(-1)


@dataclass(frozen=True)
class Probabilities:
    """Bounds on p = softmax(z(x')) for all images x' of a set; float64.

    With R_ab bounding z_a − z_b from both sides, p_a = 1 / Σ_b exp(z_b − z_a). Its gradient is
    ∇p_a = p_a Σ_b p_b ∇(z_a − z_b), so constants D_ab of the *differences* of logits are all it takes: what moves every
    logit alike moves no probability.
    """

    difference_low: Tensor  # [B, C, C]: z_a − z_b is at least this
    difference_lipschitz: Tensor  # [B, C, C]: D_ab, symmetric

    @property
    def difference_high(self) -> Tensor:
        """[B, C, C]: z_a − z_b is at most this."""
        return -self.difference_low.transpose(1, 2)

    @property
    def low(self) -> Tensor:
        """Lower bounds of p, [B, C]."""
        sums = self.difference_high.clamp_max(_EXPONENT).exp().sum(1)  # over b: exp(z_b − z_a)
        return (1 / sums - ABSOLUTE).clamp_min(0)

    @property
    def high(self) -> Tensor:
        """Upper bounds of p, [B, C]."""
        sums = self.difference_low.clamp_min(-_EXPONENT).clamp_max(_EXPONENT).exp().sum(1)
        return (1 / sums + ABSOLUTE).clamp_max(1)

    def margins(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) bounds of p_y − p_j, [B, C − 1] each.

        p_y − p_j = (1 − t) / (1 + t + s) with t = exp(z_j − z_y) and s the sum of exp(z_b − z_y) over the remaining
        classes: it falls in t, and in s where t < 1, and rises in s where t > 1. All three terms are divided by the
        largest, as it is their ratio that counts.
        """
        low, high = self._to_label(y)  # of z_b − z_y, b ≠ y
        largest = torch.finfo(low.dtype).max  # what is beyond it is not known to be infinite
        low, high = low.clamp_max(largest), high.clamp_min(-largest)
        return self._margin(high, low) - ABSOLUTE, self._margin(low, high) + ABSOLUTE

    def lipschitz(self) -> Tensor:
        """ℓ∞ Lipschitz constants of p_a, [B, C]: p_a Σ_b p_b D_ab, at most p_a (1 − p_a) max_b D_ab."""
        constants, low, high = self.difference_lipschitz, self.low, self.high
        sums = simplex_max(constants, low[:, None], high[:, None])
        spread = torch.where(low > 0.5, low * (1 - low), torch.where(high < 0.5, high * (1 - high), 0.25))
        return torch.minimum(high * sums, (spread + ABSOLUTE) * constants.amax(2)) * (1 + RELATIVE)

    def margin_lipschitz(self, y: Tensor) -> Tensor:
        """ℓ∞ Lipschitz constants of p_y − p_j, [B, C − 1].

        ∇(p_y − p_j) = p_y Σ_b p_b ∇(z_y − z_b) − p_j Σ_b p_b ∇(z_j − z_b): at most p_y K_y + p_j K_j with
        K_a = max Σ_b p_b D_ab. The two terms along z_y − z_j being one, it is also at most
        (2 p_y p_j + (p_y + p_j)(1 − p_y − p_j)) D ≤ (q − q²/2) D with q = p_y + p_j and D the largest D_yb or D_jb: D
        / 2 at most, which two classes attain.
        """
        constants, low, high = self.difference_lipschitz, self.low, self.high
        sums = simplex_max(constants, low[:, None], high[:, None])  # K, [B, C]
        others, label = other_classes(y, constants.shape[1]), y[:, None]
        first, second = high.gather(1, label), high.gather(1, others)
        apart = first * sums.gather(1, label) + second * sums.gather(1, others)
        largest = constants.amax(2)
        most = torch.maximum(largest.gather(1, label), largest.gather(1, others))
        q = (first + second).clamp_max(1)
        return torch.minimum(apart, (q - q**2 / 2 + ABSOLUTE) * most) * (1 + RELATIVE)

    def _to_label(self, y: Tensor) -> tuple[Tensor, Tensor]:
        others = other_classes(y, self.difference_low.shape[1])
        rows = torch.arange(len(y), device=y.device)
        low = self.difference_low[rows, :, y].gather(1, others)
        return low, self.difference_high[rows, :, y].gather(1, others)

    @staticmethod
    def _margin(own: Tensor, other: Tensor) -> Tensor:
        """The margin at the ends ``own`` of z_j − z_y, with the remaining classes at the end that makes it extreme:
        ``own`` where t < 1, ``other`` where t > 1."""
        itself = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
        rest = torch.where(own[:, :, None] < 0, own[:, None], other[:, None]).masked_fill(itself, -torch.inf)
        top = torch.maximum(own, rest.amax(2)).clamp_min(0)  # logarithms all, as long as nothing is divided
        label, one, others = (-top).exp(), (own - top).exp(), (rest - top[:, :, None]).exp().sum(2)
        margin = (label - one) / (label + one + others)
        # the limits, where an end is infinite: t outgrows all else at worst, the rest leaves nothing
        unbounded = torch.where(own == torch.inf, -1.0, 0.0).to(margin)
        return torch.where(top == torch.inf, unbounded, margin)


def enclose_probabilities(
    graph: Graph, images: Box, method: str = "crown-ibp", gradients: bool = True
) -> Probabilities:
    """Bounds on the softmax of a network over a convex set of images (:func:`~robust_moe.analysis.enclosure.ball`).

    method: how the logits' differences are bounded (:data:`~robust_moe.analysis.enclosure.METHODS`); their gradients
    always by intervals, with the ReLU states that the layers' boxes leave open.
    gradients: whether they are wanted; without, ``difference_lipschitz`` is infinite.
    """
    boxes = layer_bounds(graph, images, method)
    spec = pair_rows(graph.outputs, images.centre.device)
    if method == "ibp":
        last = boxes[-1]
        low = spec.clamp_min(0) @ last.low[:, :, None] + spec.clamp_max(0) @ last.high[:, :, None]
        high = spec.clamp_min(0) @ last.high[:, :, None] + spec.clamp_max(0) @ last.low[:, :, None]
        error = gamma(2) * (spec.abs() @ last.magnitude[:, :, None])
        low, high = (low - error)[:, :, 0], (high + error)[:, :, 0]
    else:
        low, high = linear_bounds(graph, boxes, spec), -linear_bounds(graph, boxes, -spec)
    constants = lipschitz_constants(graph, spec, boxes) if gradients else torch.full_like(low, torch.inf)
    return Probabilities(_square(low, graph.outputs, -high), _square(constants, graph.outputs, constants))


def global_probabilities(graph: Graph, batch: int, device: torch.device | None = None) -> Probabilities:
    """The same for all images there are: gradients as :func:`lipschitz_constants` bounds them without boxes, and
    probabilities anywhere in [0, 1]."""
    constants = lipschitz_constants(graph, pair_rows(graph.outputs, device)).expand(batch, -1)
    unknown = torch.full_like(constants, -torch.inf)
    return Probabilities(_square(unknown, graph.outputs, unknown), _square(constants, graph.outputs, constants))
