"""Attacks on routes where a routing rule of evaluation, and not the gate's top k, chooses the experts: gates of two
pixels (a, b), of which b decides and a wrong expert is in reach."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from whole_networks import linear

from robust_moe.attacks import PGD, ExpertPGD, RouterPGD, Steering
from robust_moe.attacks.base import Attack
from robust_moe.attacks.router import router_margin
from robust_moe.evaluation import preset_stages
from robust_moe.models import MarginSoft, NetworkExperts, RandomTop
from robust_moe_kernels.modules import MoELayer, RoutingRecord

RIGHT, WRONG = linear([1, 0, 0], [0, 0, 9]), linear([0, 0, 99], [1, 0, 0])  # of class 1; a raises the right one's loss


@dataclass(frozen=True)
class Last:
    """The expert that the gate ranks last takes all."""

    def __call__(self, options: object, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        last = record.logits.argmin(1, keepdim=True)
        return last, torch.ones_like(last, dtype=record.weights.dtype)


def model_of(rule: object, top_k: int, gate: nn.Module, experts: list[nn.Module]) -> MoELayer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the gate gets no gradient
        made = MoELayer(gate, NetworkExperts(experts, 1), top_k, straight_through=False).eval()
    made.inference = rule
    return made


def at(b: float) -> tuple[Tensor, Tensor]:
    """One image of class 1."""
    return torch.tensor([[[[0.5, b]]]]), torch.tensor([1])


ATTACKS: dict[str, Callable[[], Attack]] = {
    "steering": lambda: Steering(0.1, random_start=False),
    "router": lambda: RouterPGD(0.1, 40, random_start=False),
    "targeted": lambda: RouterPGD(0.1, 40, targeted=True, random_start=False),
}
CASES: dict[str, tuple[Callable[[], MoELayer], float, tuple[str, ...]]] = {
    # k = E: the gate of training has no choice, the rule has
    "all experts in training": (
        lambda: model_of(MarginSoft(0.2), 2, linear([0, 200, -100], [0, -200, 100]), [RIGHT, WRONG]),
        0.57,
        ("steering", "router", "targeted"),
    ),
    # the wrong expert is soon among the best two, and has a weight only next to the first
    "selected without a weight": (
        lambda: model_of(MarginSoft(0.1), 2, linear([0, 0, 4], [0, 0, 0], [0, 100, -50]), [RIGHT, RIGHT, WRONG]),
        0.45,
        ("steering", "targeted"),
    ),
    # the wrong expert is second when clean, and has no weight
    "second without a weight": (
        lambda: model_of(MarginSoft(0.1), 2, linear([0, 0, 8], [0, 100, -50], [0, 0, -9]), [RIGHT, WRONG, RIGHT]),
        0.52,
        ("steering", "router", "targeted"),
    ),
    # to be chosen is to fall below the others
    "the last one": (
        lambda: model_of(Last(), 1, linear([0, 0, 20], [0, 0, 0], [0, 100, -50]), [RIGHT, RIGHT, WRONG]),
        0.55,
        ("steering", "targeted"),
    ),
}


@pytest.mark.parametrize(("case", "attack"), [(case, name) for case, (*_, names) in CASES.items() for name in names])
def test_an_expert_that_the_rule_can_reach_is_reached(case, attack):
    make, b, _ = CASES[case]
    model = make()
    x, y = at(b)
    assert not PGD(0.1, 40, random_start=False).find(model, x, y).fooled
    assert ATTACKS[attack]().find(model, x, y).fooled


@pytest.mark.parametrize("rule", [MarginSoft(0.2), RandomTop(2)], ids=["margin_soft", "random_top"])
def test_the_rule_is_that_of_the_attacks_mode(rule):
    """In train mode the layer of k = E has no choice."""
    model = CASES["all experts in training"][0]()
    model.inference = rule
    with pytest.warns(UserWarning, match="this is PGD"):
        Steering(0.1, 4, mode="train")(model, *at(0.57))
    assert Steering(0.1, 4).most_passes(model.train())[0] > Steering(0.1, 4, mode="train").most_passes(model)[0]


def drawn() -> MoELayer:
    torch.manual_seed(0)
    experts = [linear([slope, 0, 0], [0, 0, 0]) for slope in (3.0, -1.0, 50.0)]
    return model_of(RandomTop(2), 1, linear([0, 0, 1], [0, 0, 1], [0, 0, 0.5]), experts)


@pytest.mark.parametrize("make", [ExpertPGD, lambda eps, steps, **s: RouterPGD(eps, steps, **s)])
def test_attacks_on_a_rule_that_draws_do_not_depend_on_the_draw_of_the_clean_images(make):
    """Expert 0 alone would raise pixel a of class 1 and expert 1 lower it: their mean raises it."""
    model, (x, y) = drawn(), at(0.5)
    images = []
    for seed in range(6):
        torch.manual_seed(seed)
        images.append(make(0.1, 1, alpha=0.1, random_start=False)(model, x, y))
    assert all(torch.equal(image, images[0]) for image in images)
    if make is ExpertPGD:
        assert images[0].flatten().tolist() == pytest.approx([0.6, 0.5])


def test_the_mean_weights_of_a_rule_are_those_of_its_draws():
    model, x = drawn(), torch.full((4000, 1, 1, 2), 0.5)
    model(x)
    record = model.last_routing()
    share = torch.zeros(4000, 3).scatter(1, record.indices, record.weights).mean(0)
    mean = RandomTop(2).mean_weights(model.route_options, record)
    assert torch.equal(mean, torch.tensor([0.5, 0.5, 0.0]).expand(4000, 3))
    torch.testing.assert_close(share, mean[0], atol=4 * 0.5 / 4000**0.5, rtol=0)


def test_weights_that_follow_a_rule_are_refused():
    model = CASES["all experts in training"][0]()
    words = "freeze_weights: expected True where a routing rule of evaluation weighs the experts, got False with Margin"
    with pytest.raises(ValueError, match=words):
        ExpertPGD(0.1, 2, freeze_weights=False)(model, *at(0.57))
    model.fixed_expert = 0  # the rule is not used
    ExpertPGD(0.1, 2, freeze_weights=False)(model, *at(0.57))


def test_the_margin_of_a_number_of_experts_that_differs_between_images():
    h = torch.tensor([[5.0, 3.0, 2.0, 1.0]]).repeat(3, 1)
    chosen = torch.tensor([[True, False, False, False], [True, True, True, False], [True, True, True, True]])
    assert router_margin(h, chosen).tolist() == [-2.0, -1.0, 0.0]
    assert torch.equal(router_margin(h[:1], chosen[:1]), router_margin(h[:1], torch.tensor([[0]])))


def test_the_preset_full_steers_a_layer_that_only_a_rule_gives_a_choice():
    model = CASES["all experts in training"][0]()
    names = [stage.name for stage in preset_stages(model, PGD.Config(eps="0.1"), "full", 0)]
    assert names[2:5] == ["joint", "transfer", "steering"]


@pytest.mark.parametrize("rule", [RandomTop(2), MarginSoft(1.0, top=2)], ids=["drawn", "mixed"])
def test_where_all_experts_have_weight_the_targeted_attack_moves_the_gates_first(rule):
    layer = model_of(rule, 1, linear([0, 2, -1], [0, -2, 1]), [RIGHT, WRONG])
    image, label = at(0.55)
    found = RouterPGD(0.1, 20, targeted=True, random_start=False)(layer, image, label)
    firsts = []
    for x in (image, found):
        with torch.no_grad():
            layer(x)
        firsts.append(int(layer.last_routing().logits.argmax()))
    assert firsts[0] != firsts[1]


def test_the_targeted_attack_counts_the_experts_of_the_model():
    experts = [RIGHT, WRONG, WRONG, WRONG]
    layer = model_of(None, 1, linear([0, 2, -1], [0, -2, 1], [0, 0, 0], [0, 0, 0]), experts)
    every, three = (RouterPGD(0.1, 4, targeted=True, routes=routes) for routes in (None, 3))
    assert every.most_passes(layer) == three.most_passes(layer) == three.passes


def test_a_layer_may_be_called_by_its_forward():
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model_of(None, 1, linear([0, 2, -1], [0, -2, 1]), [RIGHT, WRONG])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.forward(x)

    image, label = at(0.55)
    assert not torch.equal(RouterPGD(0.1, 5, random_start=False)(Around().eval(), image, label), image)
