"""Certified radii against attacks on thousands of random toy mixtures, and against brute force.

A toy is softmax experts and a softmax router on affine logits in three dimensions, hundreds in one batch;
their Lipschitz constants are known. An attack: all corners of the ball, random points in it, and projected gradient
steps.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from robust_moe.analysis import (
    class_margins,
    dual_radius,
    dual_radius_any_standard,
    hard_router_radius,
    mixture_margin,
    mixture_slope,
    moe_radius,
    router_reach,
)

F64 = torch.float64
TOYS, EXPERTS, CLASSES, PIXELS = 500, 3, 4, 3


class Toys:
    """N mixtures with an image and a label each: the experts' and the router's affine logits."""

    def __init__(self, seed: int, scale: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(TOYS, *shape, generator=generator, dtype=F64)

        self.a, self.b = scale * draw(EXPERTS, CLASSES, PIXELS), draw(EXPERTS, CLASSES)
        self.a *= 0.3 + torch.rand(TOYS, 1, 1, 1, generator=generator, dtype=F64)  # some steep, some flat
        self.w, self.v = 2 * draw(EXPERTS, PIXELS), draw(EXPERTS)
        self.x = draw(PIXELS)
        self.y = self.mixed(self.x[:, None])[:, 0].argmax(1)

    def expert(self, x: Tensor) -> Tensor:
        """[N, P, pixels] -> probabilities [N, P, E, C]."""
        return (torch.einsum("necd,npd->npec", self.a, x) + self.b[:, None]).softmax(-1)

    def scores(self, x: Tensor) -> Tensor:
        return torch.einsum("ned,npd->npe", self.w, x) + self.v[:, None]

    def mixed(self, x: Tensor) -> Tensor:
        return (self.scores(x).softmax(-1)[..., None] * self.expert(x)).sum(2)

    def hard(self, x: Tensor) -> Tensor:
        chosen = self.scores(x).argmax(-1)
        return self.expert(x).gather(2, chosen[..., None, None].expand(-1, -1, 1, CLASSES))[:, :, 0]

    def margin_constants(self) -> Tensor:
        """L_ij = max_{a,b} ‖w_a − w_b‖₁ / 2, [N, E, J]: the softmax's steepest."""
        apart = (self.a[:, :, :, None] - self.a[:, :, None]).abs().sum(-1).amax((2, 3))
        return (apart / 2)[:, :, None].expand(-1, -1, CLASSES - 1)

    def weight_constants(self) -> Tensor:
        """r_i = max_k ‖w_i − w_k‖₁ / 4, [N, E]."""
        return (self.w[:, :, None] - self.w[:, None]).abs().sum(-1).amax(2) / 4

    def parts(self) -> tuple[Tensor, Tensor]:
        """(m_j, S_j) of the soft mixture."""
        weights = self.scores(self.x[:, None])[:, 0].softmax(-1)
        margins = class_margins(self.expert(self.x[:, None])[:, 0], self.y)
        slope = mixture_slope(weights, self.margin_constants(), self.weight_constants())
        return mixture_margin(weights, margins), slope


def points(toys: Toys, radius: Tensor, output, seed: int = 0, steps: int = 6) -> Tensor:
    """[N, P, pixels] in the closed balls: corners, random points, and what gradient descent on the margin makes of
    these."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=F64)] * PIXELS).expand(TOYS, -1, -1)
    inside = 2 * torch.rand(TOYS, 8, PIXELS, generator=generator, dtype=F64) - 1
    ball = radius[:, None, None]
    start = toys.x[:, None] + ball * torch.cat([corners, inside, torch.zeros(TOYS, 1, PIXELS, dtype=F64)], 1)
    at = start
    for step in range(steps):
        at = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(lowest(output(at), toys.y).sum(), at)
        stride = ball * (0.5 if step < steps // 2 else 0.1)
        at = torch.minimum(torch.maximum(at - stride * gradient.sign(), toys.x[:, None] - ball), toys.x[:, None] + ball)
    return torch.cat([start, at.detach()], 1)


def lowest(outputs: Tensor, y: Tensor) -> Tensor:
    """The smallest margin at every point, [N, P]."""
    return class_margins(outputs, y).amin(-1)


def broken(toys: Toys, radius: Tensor, output) -> Tensor:
    """Whether the attack finds a wrong class within the radius, bool [N]."""
    return (lowest(output(points(toys, radius, output)), toys.y) < 0).any(1)


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_breaks_a_soft_mixture_within_its_radius(seed):
    toys = Toys(seed)
    margin, slope = toys.parts()
    radius = moe_radius(margin, slope)
    assert (radius > 0).all()
    assert not broken(toys, radius, toys.mixed).any()
    assert broken(toys, 8 * radius, toys.mixed).float().mean() > 0.2  # the attack can, a little further out


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_breaks_a_dual_whatever_the_standard_model(seed):
    """F_S is the worst there is at every point: it puts everything on the runner-up."""
    toys = Toys(seed, scale=1.0)
    margin, slope = toys.parts()
    alpha = 0.5 + 0.5 * torch.rand(TOYS, generator=torch.Generator().manual_seed(seed), dtype=F64)
    radius = dual_radius_any_standard(alpha, margin, slope)

    def worst(x: Tensor) -> Tensor:
        robust = toys.mixed(x)
        label = torch.nn.functional.one_hot(toys.y, CLASSES)[:, None]
        enemy = torch.nn.functional.one_hot((robust - 2 * label).argmax(-1), CLASSES)
        share = alpha[:, None, None]
        return (1 - share) * enemy + share * robust

    assert 0.1 < (radius > 0).float().mean() < 0.9
    certified = radius > 0
    assert not (broken(toys, radius, worst) & certified).any()
    assert (broken(toys, 8 * radius, worst) & certified).float().mean() > 0.1
    assert broken(toys, radius, worst)[margin.amin(1) < (1 - alpha) / alpha - 1e-9].all()  # 0 is then all there is


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5])
def test_an_unknown_standard_model_leaves_nothing_up_to_one_half(alpha):
    toys = Toys(0)
    assert (dual_radius_any_standard(alpha, *toys.parts()) == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.7, 1.0])
def test_no_attack_breaks_a_dual_of_two_mixtures(alpha):
    standard, robust = Toys(1, scale=4.0), Toys(2, scale=1.0)
    standard.x = robust.x

    def dual(x: Tensor) -> Tensor:
        return (1 - alpha) * standard.mixed(x) + alpha * robust.mixed(x)

    robust.y = standard.y = dual(robust.x[:, None])[:, 0].argmax(1)
    radius = dual_radius(alpha, *standard.parts(), *robust.parts())
    assert (radius > 0).all()
    assert not broken(robust, radius, dual).any()
    assert broken(robust, 8 * radius, dual).float().mean() > 0.15


def hard_parts(toys: Toys) -> tuple[Tensor, Tensor]:
    """(t_k, g_kj) of the hard mixture with the label it gives."""
    scores = toys.scores(toys.x[:, None])[:, 0]
    toys.y = toys.hard(toys.x[:, None])[:, 0].argmax(1)
    apart = (toys.w[:, :, None] - toys.w[:, None]).abs().sum(-1)
    reach = router_reach(scores[:, :, None] - scores[:, None, :], apart)
    return reach, class_margins(toys.expert(toys.x[:, None])[:, 0], toys.y)


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_breaks_a_hard_mixture_within_its_radius(seed):
    toys = Toys(seed)
    reach, margins = hard_parts(toys)
    radius = hard_router_radius(reach, margins, toys.margin_constants())
    assert (radius > 0).all()
    assert not broken(toys, radius * (1 - 1e-12), toys.hard).any()  # on the very edge an expert may tie
    assert broken(toys, 6 * radius, toys.hard).float().mean() > 0.2
    # the route itself does not change before the second expert's distance, and the attack gets at it just beyond
    second = reach.topk(2, dim=1, largest=False).values[:, 1]
    chosen = toys.scores(toys.x[:, None]).argmax(-1)
    corner = toys.x[:, None] + second[:, None, None] * torch.cartesian_prod(
        *[torch.tensor([-1.0, 1.0], dtype=F64)] * PIXELS
    ).expand(TOYS, -1, -1)
    nearer = toys.x[:, None] + (1 - 1e-9) * (corner - toys.x[:, None])
    beyond = toys.x[:, None] + (1 + 1e-9) * (corner - toys.x[:, None])
    assert (toys.scores(nearer).argmax(-1) == chosen).all()
    assert (toys.scores(beyond).argmax(-1) != chosen).any(1).all()


def test_hard_radius_is_the_supremum_over_sorted_break_points():
    """By definition: the largest ε such that every expert that is reachable below it still says y there."""
    toys = Toys(5)
    reach, margins = hard_parts(toys)
    constants = toys.margin_constants()
    got = hard_router_radius(reach, margins, constants)
    holds = torch.where((margins > 0).all(2), (margins / constants).amin(2), torch.zeros((), dtype=F64))
    for row in range(0, TOYS, 5):
        points = sorted({*reach[row].tolist(), *holds[row].tolist(), 0.0, 1e9})
        expected = 0.0
        for low, high in itertools.pairwise(points):
            middle = (low + high) / 2
            if any(reach[row, k] <= middle and holds[row, k] <= middle for k in range(EXPERTS)):
                break
            expected = high
        assert math.isclose(got[row].item(), expected, rel_tol=1e-12)


def test_per_class_constants_claim_too_much():
    """Dividing the margin by constants of single classes (the paper's equation 8, as it is transcribed) is not sound.

    One expert, two classes, one pixel: f^y = 1/2 + x, f^j = 1/2 − x, each 1-Lipschitz. At x = 0.1 the margin is 0.2:
    the per-class form claims 0.2, but at distance 0.15 the other class has won; margin constants (2) give 0.1, exactly.
    """

    def probabilities(x: Tensor) -> Tensor:
        return torch.stack([0.5 + x, 0.5 - x], -1)

    def per_class(weights: Tensor, margins: Tensor, class_lipschitz: float, weight_lipschitz: float) -> Tensor:
        """min_j m_j / Σ_i (a_i l_i + r_i): unsound, here to be refuted."""
        slope = mixture_slope(weights, torch.full_like(margins, class_lipschitz), torch.tensor([[weight_lipschitz]]))
        return moe_radius(mixture_margin(weights, margins), slope)

    x, y, one = torch.tensor([0.1], dtype=F64), torch.tensor([0]), torch.ones(1, 1, dtype=F64)
    margins = class_margins(probabilities(x), y)[:, None]
    claimed = per_class(one, margins, 1.0, 0.0)
    assert claimed.item() == pytest.approx(0.2)
    wrong = probabilities(x - 0.15)
    assert wrong.argmax(1).item() == 1
    ours = moe_radius(
        mixture_margin(one, margins), mixture_slope(one, torch.full_like(margins, 2.0), torch.zeros(1, 1, dtype=F64))
    )
    assert ours.item() == pytest.approx(0.1, rel=1e-12)
    assert ours <= 0.1
    assert probabilities(x - ours * (1 - 1e-9)).argmax(1).item() == 0


def test_the_per_class_form_breaks_on_random_mixtures_and_ours_does_not():
    """Near-linear experts of two classes, and a router: half the constant is too little for many."""
    toys = Toys(3, scale=0.3)
    toys.a[:, :, 2:], toys.b[:, :, 2:] = 0, -40.0  # two classes matter
    toys.a[:, :, 1] = -toys.a[:, :, 0]
    toys.a, toys.w = toys.a[:, :1].expand(-1, EXPERTS, -1, -1), 0.1 * toys.w  # the experts agree in slope
    toys.b = toys.b[:, :1] * 0.1 * torch.tensor([1.0, 1.0, 400.0, 400.0], dtype=F64)
    toys.b = toys.b.expand(-1, EXPERTS, -1)
    toys.y = toys.mixed(toys.x[:, None])[:, 0].argmax(1)
    margins = class_margins(toys.expert(toys.x[:, None])[:, 0], toys.y)
    weights = toys.scores(toys.x[:, None])[:, 0].softmax(-1)
    # one class's probability: p (1 − p) ‖w_0 − w_1‖₁ ≤ a quarter of it
    quarter = (toys.a[:, :, 0] - toys.a[:, :, 1]).abs().sum(-1)[:, :, None] / 4
    margin = mixture_margin(weights, margins)
    claimed = moe_radius(margin, mixture_slope(weights, quarter.expand_as(margins), torch.zeros(TOYS, EXPERTS)))
    ours = moe_radius(margin, mixture_slope(weights, 2 * quarter.expand_as(margins), torch.zeros(TOYS, EXPERTS)))
    assert broken(toys, claimed, toys.mixed).float().mean() > 0.5
    assert not broken(toys, ours, toys.mixed).any()


def test_closed_forms_are_their_formulas():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=F64)

    weights = draw(6, 3)
    weights /= weights.sum(1, keepdim=True)
    margins, lipschitz, rates, limits = 2 * draw(6, 3, 4) - 0.7, draw(6, 3, 4), draw(6, 3), draw(6, 3, 4)
    m, s = mixture_margin(weights, margins), mixture_slope(weights, lipschitz, rates, limits)
    got = [moe_radius(m, s), dual_radius_any_standard(0.9, m, s), dual_radius(0.6, m / 2, s * 3, m, s, ball=0.05)]
    for b in range(6):
        margin = [sum(weights[b, i] * margins[b, i, j] for i in range(3)).item() for j in range(4)]
        slope = [
            sum(weights[b, i] * lipschitz[b, i, j] + rates[b, i] * limits[b, i, j] for i in range(3)).item()
            for j in range(4)
        ]
        pairs = list(zip(margin, slope, strict=True))
        single = min(max(p, 0) / q for p, q in pairs)
        unknown = min(max(0.9 * p - 0.1, 0) / (0.9 * q) for p, q in pairs)
        both = min(0.05, min(max(0.4 * p / 2 + 0.6 * p, 0) / (0.4 * 3 * q + 0.6 * q) for p, q in pairs))
        for radius, expected in zip(got, (single, unknown, both), strict=True):
            assert radius[b].item() == pytest.approx(expected, rel=1e-12)
            assert radius[b].item() <= expected


def test_margins_may_be_bounded_from_any_centre():
    """Weights sum to 1 everywhere, so M may bound |g − c|: with experts that agree the router costs nothing."""
    toys = Toys(4)
    toys.a, toys.b = toys.a[:, :1].expand(-1, EXPERTS, -1, -1), toys.b[:, :1].expand(-1, EXPERTS, -1)
    toys.y = toys.mixed(toys.x[:, None])[:, 0].argmax(1)
    margin, slope = toys.parts()
    weights = toys.scores(toys.x[:, None])[:, 0].softmax(-1)
    centred = mixture_slope(weights, toys.margin_constants(), toys.weight_constants(), 0.0)
    radius = moe_radius(margin, centred)
    assert (radius > moe_radius(margin, slope)).all()
    assert not broken(toys, radius, toys.mixed).any()


def test_edges():
    margin = torch.tensor([[0.5, 0.2], [0.5, -0.1], [0.3, 0.3]], dtype=F64)
    slope = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=F64)
    assert moe_radius(margin, slope).tolist() == [pytest.approx(0.5), 0.0, math.inf]
    assert moe_radius(margin, slope, 0.1).tolist() == [0.1, 0.0, 0.1]
    assert moe_radius(margin, slope, torch.tensor([0.7, 1.0, 2.0])).tolist() == [pytest.approx(0.5), 0.0, 2.0]
    assert dual_radius_any_standard(0.0, margin, slope).tolist() == [0.0, 0.0, 0.0]
    assert dual_radius_any_standard(1.0, margin, slope)[0].item() == pytest.approx(0.5)
    none = torch.full((1, 2), math.inf, dtype=F64)
    none[0, 0] = 0.0  # the other expert is never used
    margins = torch.tensor([[[0.4], [-0.9]]], dtype=F64)
    assert hard_router_radius(none, margins, torch.tensor(2.0)).item() == pytest.approx(0.2)
    assert hard_router_radius(none, margins, torch.tensor(0.0)).item() == math.inf
    assert hard_router_radius(torch.zeros(1, 2, dtype=F64), margins, torch.tensor(2.0)).item() == 0.0


def test_weights_may_be_upper_bounds_of_weights():
    """Every distribution below the bounds has a slope that is no larger."""
    generator = torch.Generator().manual_seed(0)
    high = torch.tensor([[0.7, 0.9, 0.4]], dtype=F64)
    lipschitz, rates = torch.rand(1, 3, 2, generator=generator, dtype=F64), torch.rand(1, 3, generator=generator)
    slope = mixture_slope(high, lipschitz, rates)
    weights = torch.rand(2000, 3, generator=generator, dtype=F64)
    weights /= weights.sum(1, keepdim=True)
    weights = weights[(weights <= high).all(1)]
    assert len(weights) > 500
    assert (
        mixture_slope(weights, lipschitz.expand(len(weights), -1, -1), rates.expand(len(weights), -1)) <= slope
    ).all()


def test_what_underflows_is_no_slope_and_no_margin():
    """A quotient of the two would be any number."""
    tiny = torch.full((1, 1), 1e-310, dtype=F64)
    assert moe_radius(tiny, torch.zeros(1, 1, dtype=F64)).item() == 0
    assert moe_radius(torch.ones(1, 1, dtype=F64), tiny).item() < 1.01e290
    steep = mixture_slope(torch.ones(1, 1, dtype=F64), tiny[None], torch.zeros(1, 1, dtype=F64))
    assert moe_radius(torch.ones(1, 1, dtype=F64), steep).item() < 1.01e290


OK = torch.ones(2, 3, dtype=F64) / 3
MARGINS = torch.ones(2, 3, 4, dtype=F64)
PAIR = torch.ones(2, 4, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dual_radius_any_standard(1.5, PAIR, PAIR), "alpha: expected a number in [0, 1], got 1.5"),
        (
            lambda: dual_radius(torch.tensor([0.5, -0.1]), PAIR, PAIR, PAIR, PAIR),
            "alpha: expected a number in [0, 1], got values from -0.1 to 0.5",
        ),
        (lambda: dual_radius(math.nan, PAIR, PAIR, PAIR, PAIR), "alpha: expected a number in [0, 1], got nan"),
        (lambda: moe_radius(PAIR, -PAIR), "slope: expected finite numbers >= 0, got values from -1 to -1"),
        (lambda: moe_radius(PAIR, PAIR, -1.0), "ball: expected radii >= 0, got -1"),
        (lambda: moe_radius(PAIR[0], PAIR), "margin: expected 2 dimensions [B, J] with J >= 1, got shape [4]"),
        (lambda: moe_radius(PAIR, MARGINS), "slope: expected a shape that broadcasts to [2, 4], got [2, 3, 4]"),
        (lambda: moe_radius(PAIR * math.nan, PAIR), "margin: expected finite numbers, got values from nan to nan"),
        (lambda: mixture_margin(OK * 2, MARGINS), "weights: expected rows that sum to 1, got sums values from 2 to 2"),
        (
            lambda: mixture_slope(OK / 2, MARGINS, OK),
            "weights: expected rows that sum to at least 1, got sums values from 0.5",
        ),
        (lambda: mixture_margin(OK[:1], MARGINS), "weights: expected shape [2, 3], got [1, 3]"),
        (lambda: mixture_slope(OK, MARGINS, -OK), "weight_lipschitz: expected finite numbers >= 0"),
        (lambda: mixture_slope(OK, MARGINS[:, :2], OK), "margin_lipschitz: expected a shape that broadcasts to [2, 3"),
        (lambda: mixture_slope(OK, MARGINS, OK, -1.0), "margin_bound: expected finite numbers >= 0, got -1"),
        (lambda: dual_radius(0.5, PAIR[:, :2], PAIR[:, :2], PAIR, PAIR), "standard_margin: expected shape [2, 4]"),
        (lambda: hard_router_radius(-OK, MARGINS, torch.tensor(1.0)), "reach: expected distances >= 0, got values"),
        (lambda: hard_router_radius(OK[:, :2], MARGINS, torch.tensor(1.0)), "reach: expected shape [2, 3] (B, E"),
        (lambda: class_margins(PAIR, torch.tensor([0, 4])), "y: expected labels in 0..3, got a label outside"),
        (lambda: class_margins(PAIR, torch.tensor([0.0, 1.0])), "y: expected int64 labels [B], got torch.float32 [2]"),
        (lambda: router_reach(MARGINS, MARGINS), "lead: expected shape [B, E, E], got [2, 3, 4]"),
        (
            lambda: router_reach(torch.zeros(1, 2, 2), -torch.ones(2, 2)),
            "difference_lipschitz: expected numbers >= 0, got -1.0",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message)
