"""What a certificate allows for besides the model in exact arithmetic: slack, and logits that are huge.

Networks here are affine or constant, so that every radius is a formula written out by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_moe.analysis import ball, certify_mixture, class_margins, lower
from robust_moe.analysis.certify import KINDS
from robust_moe.analysis.lipschitz import enclose_probabilities, global_probabilities, simplex_max
from robust_moe.analysis.parts import Data, make_part
from robust_moe.models import DualModel, ExpertMixture

F64 = torch.float64
SHAPE, SLACK = (1, 2, 2), 0.01
X, Y = torch.full((1, *SHAPE), 0.5, dtype=F64), torch.tensor([0])


def affine(outputs: int, seed: int, scale: float = 1.0, bias: list[float] | None = None) -> nn.Module:
    """Flatten and one linear layer; with a scale of 0 a constant."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, outputs)).double()
    network[1].weight.data *= scale
    if bias is not None:
        network[1].bias.data = torch.tensor(bias, dtype=F64)
    return network.eval()


def expert(seed: int) -> nn.Module:
    return affine(3, seed, 1.0, [2.0, 0.5, 0.0])


def margins(network: nn.Module, probabilities: bool) -> Tensor:
    with torch.no_grad():
        outputs = network(X)
        return class_margins(outputs.softmax(1) if probabilities else outputs, Y)


def logit_slopes(network: nn.Module) -> Tensor:
    weight = network[1].weight.detach()
    return (weight[:1] - weight[1:]).abs().sum(1)[None]


def probability_slopes(network: nn.Module) -> Tensor:
    return global_probabilities(lower(network, SHAPE), 1).margin_lipschitz(Y)


def radii(model: nn.Module, slack: float = SLACK, **settings) -> dict[str, float]:
    found = certify_mixture(model, X, Y, slack=slack, steps=30, domain=None, max_radius=4.0, **settings).radii
    return {kind: radius.item() for kind, radius in found.items()}


def soft(networks: list[nn.Module], gate: nn.Module, mix: str = "probabilities") -> ExpertMixture:
    return ExpertMixture(gate, networks, 1, mix=mix).double().eval()


def hard(networks: list[nn.Module], gate: nn.Module, mix: str = "logits") -> ExpertMixture:
    return ExpertMixture(gate, networks, 1, routing="hard", mix=mix).double().eval()


@pytest.mark.parametrize("slack", [0.0, SLACK, 0.1])
@pytest.mark.parametrize("routed", [False, True])
def test_slack_of_logits_is_twice_off_the_margin(slack, routed):
    """(m − 2 slack) / L for a network, and for a hard mixture of two of them: by every kind, L being exact."""
    network = expert(0)
    model = hard([network, network], affine(2, 1)) if routed else network
    expected = ((margins(network, False) - 2 * slack) / logit_slopes(network)).min().item()
    found = radii(model, slack)
    assert found["global"] == pytest.approx(expected, rel=1e-9)
    assert found["local"] == pytest.approx(expected, rel=1e-6)
    assert found["range"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
def test_slack_of_a_dual_is_twice_off_its_margin(alpha):
    standard, robust = expert(0), expert(1)
    slope = (1 - alpha) * probability_slopes(standard) + alpha * probability_slopes(robust)
    margin = (1 - alpha) * margins(standard, True) + alpha * margins(robust, True)
    found = radii(DualModel(standard, robust, alpha))
    assert found["global"] == pytest.approx(((margin - 2 * SLACK) / slope).min().item(), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_slack_of_a_dual_with_any_standard_model_is_twice_off_its_margin(alpha):
    """[α m − (1 − α) − 2 slack] / (α L)."""
    robust = affine(3, 1, 1.0, [5.0, 0.5, 0.0])
    margin = alpha * margins(robust, True) - (1 - alpha) - 2 * SLACK
    found = radii(DualModel(expert(0), robust, alpha), standard="any")
    assert margin.min() > 0.1
    expected = (margin / (alpha * probability_slopes(robust))).min().item()
    assert found["global"] == pytest.approx(expected, rel=1e-6)


def joined() -> dict[str, tuple[nn.Module, float, dict]]:
    """Models that are constant, with their margin and settings."""
    p, q = affine(3, 0, 0.0, [2.0, 0.5, 0.0]), affine(3, 1, 0.0, [1.0, 0.3, 0.9])
    low, high = margins(q, True).min().item(), margins(p, True).min().item()
    apart = margins(p, True) + 3 * margins(q, True)
    even = affine(2, 2, 0.0, [0.0, 0.0])
    return {
        "soft": (soft([p, q], even), ((margins(p, True) + margins(q, True)) / 2).min().item(), {}),
        "soft logits": (soft([p, q], even, "logits"), ((margins(p, False) + margins(q, False)) / 2).min().item(), {}),
        "hard": (hard([p, q], affine(2, 2, 0.0, [0.0, 1.0])), margins(q, False).min().item(), {}),
        "hard tie": (hard([p, q], even), margins(q, False).min().item(), {}),
        "dual": (DualModel(p, q, 0.75), (apart / 4).min().item(), {}),
        "any": (DualModel(q, p, 0.8), 0.8 * high - 0.2, {"standard": "any"}),
        "dual of a hard one": (DualModel(q, hard([q, q], affine(2, 2)), 0.5), low, {}),
    }


@pytest.mark.parametrize("name", joined())
def test_a_constant_model_is_certified_up_to_a_slack_of_half_its_margin(name):
    """By every kind that has a slope; a little more leaves nothing, at any radius."""
    model, margin, settings = joined()[name]
    assert margin > 0
    below, above = (radii(model, margin / 2 * factor, **settings) for factor in (1 - 1e-6, 1 + 1e-6))
    # the margins of logits are unbounded globally, and jump with a hard router
    without = {"soft logits": {"global"}, "dual of a hard one": {"global", "local"}}.get(name, set())
    assert {kind for kind, radius in below.items() if radius >= 4} == {*KINDS} - without
    assert all(radius == 0 for radius in above.values())


@pytest.mark.parametrize(
    ("name", "unit"),
    [("soft", "probabilities"), ("soft logits", "logits"), ("hard", "logits"), ("dual", "probabilities")],
)
def test_the_unit_of_slack_is_told(name, unit):
    covers = certify_mixture(joined()[name][0], X, Y, steps=1, slack=0.001).provenance["covers"]
    assert covers.startswith(f"evaluations whose {unit} are within 0.001 of those in exact arithmetic")
    assert covers.endswith("and a hard router's logits too") == (name == "hard")


def test_a_slack_of_logits_says_nothing_of_probabilities():
    """Logits 0.03 apart stand a slack of 0.01 each, the probabilities (0.003 apart) do not."""
    network = affine(10, 0, 0.0, [0.03] + [0.0] * 9)
    assert radii(network, 0.01)["range"] == 4.0
    alone = DualModel(network, network, 0.5)  # the same network, by its probabilities
    assert radii(alone, 0.01)["range"] == 0.0
    assert radii(alone, 0.001)["range"] == 4.0


def test_an_expert_that_ties_at_the_image_is_reached_there():
    """A ball of radius 0 is the image itself, whose router may choose either."""
    p, q = affine(3, 0, 0.0, [2.0, 0.5, 0.0]), affine(3, 1, 0.0, [1.0, 0.3, 0.9])
    part = make_part(hard([p, q], affine(2, 2, 0.0, [1.0, 1.0])), Data(X, Y, "crown", None), None, "model")
    low = part.low(torch.zeros(1, dtype=F64))
    expected = torch.minimum(margins(p, False), margins(q, False))
    assert torch.allclose(low, expected, rtol=1e-9)
    assert torch.equal(low, part.margin)


@pytest.mark.parametrize("size", [1e9, 1e12, 1e15])
def test_large_router_logits_with_a_small_lead(size):
    """Rounding leaves the weights open, so that every weight that is left open counts with the slope of its expert."""
    flat, steep = affine(3, 0, 0.0, [2.0, 0.5, 0.0]), affine(3, 1, 1.0, [2.0, 0.5, 0.0])
    steep[1].bias.data -= steep[1].weight.data @ X.flatten()  # they agree at the image: the router's share is nothing
    gate = affine(2, 2, 0.0, [0.0, 0.0])
    gate[1].weight.data.fill_(size)
    model = soft([flat, steep], gate)
    part = make_part(model, Data(X, Y, "crown", None), None, "model")
    routing = enclose_probabilities(lower(gate, SHAPE), ball(X, 0.0), "crown")
    local = [enclose_probabilities(lower(network, SHAPE), ball(X, 0.0)) for network in (flat, steep)]
    constants = torch.stack([found.margin_lipschitz(Y) for found in local], 2)  # [B, J, E]
    worst = simplex_max(constants, routing.low[:, None], routing.high[:, None])
    slope = part.slope(ball(X, 0.0))
    assert ((slope >= worst * (1 - 1e-11)) & (slope < 1.001 * worst)).all()  # the worst is rounded up, too
    if size == 1e15:
        assert routing.high.sum() > 1.2  # the case in question
    assert (certify_mixture(model, X, Y, steps=3).radius > 0).all()


@pytest.mark.parametrize("kind", [torch.float32, F64])
def test_a_saturated_expert_is_not_half_right(kind):
    """Logits (0, 1000, 990) against the label by all of a probability: the mixture of 0.6 and 0.4 is wrong."""
    wrong, right = affine(3, 0, 0.0, [0.0, 1000.0, 990.0]), affine(3, 1, 1.0, [50.0, 0.0, 0.0])
    gate = affine(2, 2, 0.0, [0.4055, 0.0])
    model = soft([wrong, right], gate).to(kind)
    assert model(X.to(kind)).argmax(1).item() == 1
    assert certify_mixture(model, X.to(kind), Y).radius.item() == 0
    assert certify_mixture(model, X.to(kind), Y + 1).radius.item() > 0


def test_experts_of_different_classes_are_refused():
    with pytest.raises(ValueError, match=r"^model.experts: expected networks of one number of classes, got \[3, 4\]"):
        certify_mixture(soft([affine(3, 0), affine(4, 1)], affine(2, 2)), X, Y)
