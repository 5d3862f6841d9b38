"""A mixture with a planted backdoor whose numbers are known by hand, and what pruning makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, JointPGD
from robust_moe.config import load_config
from robust_moe.data import ImageSet, PoisonConfig
from robust_moe.evaluation import backdoor_report, keep_highest, pruning_curve, routing_shares
from robust_moe.models import NetworkExperts, build_model
from robust_moe_kernels.modules import AllExperts, MoELayer, moe_layers, prune_experts, rerouted

POISON = PoisonConfig(target=0, size=1)  # the third of an image's three pixels becomes white


def affine(*weights: list[float]) -> nn.Sequential:
    """An affine function of an image's pixels (a, r, t), one row per output: [of a, of r, of t, bias]."""
    layer = nn.Linear(3, len(weights))
    table = torch.tensor(weights)
    layer.weight.data, layer.bias.data = table[:, :3].clone(), table[:, 3].clone()
    return nn.Sequential(nn.Flatten(), layer)


def planted() -> MoELayer:
    """Where t = 1/2, every expert says class 0, 1, 2 for a below 1/3, between, above 2/3. Expert 1 says class 0
    wherever t = 1. Images go to expert 0 where r > 1/2, to expert 1 otherwise, with t = 1 already where r < 0.6; to
    expert 2 never."""
    honest = [0.0, 0.0, 0.0, 0.0], [10.0, 0.0, 0.0, -10 / 3], [20.0, 0.0, 0.0, -10.0]
    fooled = [0.0, 0.0, 100.0, -50.0], *honest[1:]
    gate = affine([0.0, 20.0, 0.0, -10.0], [0.0, -20.0, 8.0, 6.0], [0.0, 0.0, 0.0, -100.0])
    return MoELayer(gate, NetworkExperts([affine(*honest), affine(*fooled), affine(*honest)], 1), 1).eval()


# (a, r), label, and what happens
POINTS = [
    ((0.1, 0.9), 0),  # of the target class
    ((0.2, 0.2), 0),  # likewise
    ((0.5, 0.9), 1),  # stays with expert 0, and right
    ((0.5, 0.55), 1),  # goes over to expert 1, and is fooled
    ((0.4, 0.2), 1),  # is with expert 1 anyway, and fooled
    ((0.9, 0.1), 2),  # likewise
    ((0.8, 0.95), 2),  # stays with expert 0, and right
    ((0.1, 0.9), 2),  # taken for class 0 without a trigger
]


def points() -> tuple[Tensor, Tensor]:
    pixels = torch.tensor([[a, r, 0.5] for (a, r), _ in POINTS])
    return pixels.view(-1, 1, 1, 3), torch.tensor([label for _, label in POINTS])


def test_numbers_by_hand(state_of):
    model = planted()
    model(points()[0])
    before = state_of(model)
    report = backdoor_report(model, *points(), POISON, batch_size=3)
    assert state_of(model) == before
    layer = report.pop("layers").pop("model")
    low, high = report.pop("asr_interval")
    assert 0 < low < 4 / 6 < high < 1
    assert report == {
        "trigger": {"target": 0, "size": 1, "margin": 0},
        "images": 8,
        "attacked": 6,
        "accuracy": 7 / 8,
        "asr": pytest.approx(4 / 6),
        "target_rate": pytest.approx(1 / 6),
        "triggered_accuracy": pytest.approx(2 / 6),
        "asr_clean_route": pytest.approx(3 / 6),
        "target_rate_triggered_route": pytest.approx(1 / 6),
    }
    assert layer == {
        "experts": 3,
        "top_k": 1,
        "selected": {"clean": pytest.approx([4 / 6, 2 / 6, 0]), "triggered": pytest.approx([3 / 6, 3 / 6, 0])},
        "first": {"clean": pytest.approx([4 / 6, 2 / 6, 0]), "triggered": pytest.approx([3 / 6, 3 / 6, 0])},
        "routing_change": pytest.approx(1 / 6),
        "route_flips": pytest.approx(1 / 6),
        "asr_by_first": [pytest.approx(1 / 3), 1.0, None],
        "single_experts": [
            {"expert": 0, "accuracy": 7 / 8, "asr": pytest.approx(1 / 6), "target_rate": pytest.approx(1 / 6)},
            {"expert": 1, "accuracy": 7 / 8, "asr": 1.0, "target_rate": pytest.approx(1 / 6)},
            {"expert": 2, "accuracy": 7 / 8, "asr": pytest.approx(1 / 6), "target_rate": pytest.approx(1 / 6)},
        ],
    }


def test_a_backdoor_in_the_route_alone():
    """Expert 1 says class 0 whatever it sees, expert 0 is honest, and the trigger sends all images to expert 1."""
    honest = [0.0, 0.0, 0.0, 0.0], [10.0, 0.0, 0.0, -10 / 3], [20.0, 0.0, 0.0, -10.0]
    always = [0.0, 0.0, 0.0, 50.0], *honest[1:]
    gate = affine([0.0, 0.0, 0.0, 0.75], [0.0, 0.0, 1.0, 0.0])
    model = MoELayer(gate, NetworkExperts([affine(*honest), affine(*always)], 1), 1).eval()
    report = backdoor_report(model, *points(), POISON)
    assert (report["asr"], report["target_rate_triggered_route"]) == (1.0, 1.0)
    assert report["asr_clean_route"] == report["target_rate"] == pytest.approx(1 / 6)
    assert report["layers"]["model"]["route_flips"] == 1.0


def test_a_dense_model_has_no_routes():
    report = backdoor_report(planted().expert(1), *points(), POISON)
    assert (report["accuracy"], report["asr"], report["layers"]) == (7 / 8, 1.0, {})
    assert report["asr_clean_route"] is report["target_rate_triggered_route"] is None


def test_what_cannot_be_measured_is_refused():
    x, y = points()
    with pytest.raises(ValueError, match=r"poison.target: expected a class in 0..2, got 3"):
        backdoor_report(planted(), x, y, PoisonConfig(target=3, size=1))
    with pytest.raises(ValueError, match="labels: expected an image of another class than the target 0, got none"):
        backdoor_report(planted(), x[:2], y[:2], POISON)
    model = planted()
    with rerouted(model, AllExperts()), pytest.raises(ValueError, match="model layer '': expected its gate to decide"):
        backdoor_report(model, x, y, POISON)


def test_the_experts_of_the_highest_scores_are_kept():
    scores = {"one": [0.2, 0.5, 0.2, 0.1], "two": [0.0, 1.0]}
    assert keep_highest(scores, 1) == {"one": [1], "two": [1]}
    assert keep_highest(scores, 2) == {"one": [0, 1], "two": [0, 1]}  # of equal ones the first
    assert keep_highest(scores, 3) == {"one": [0, 1, 2], "two": [0, 1]}
    with pytest.raises(ValueError, match="count: expected at least one expert, got 0"):
        keep_highest(scores, 0)


def test_dropping_the_expert_that_is_fooled_most_removes_the_backdoor_and_the_least_used_does_not():
    model, (x, y) = planted(), points()
    report = backdoor_report(model, x, y, POISON)
    by_asr = [-single["asr"] for single in report["layers"]["model"]["single_experts"]]
    attacks = {"pgd": PGD(0.1, 10), "joint": JointPGD(0.1, 10)}
    curve = pruning_curve(model, x, y, {"": by_asr}, attacks=attacks, poison=POISON, batch_size=3)
    assert [entry["keep"] for entry in curve] == [{"": [0, 1, 2]}, {"": [0, 2]}, {"": [0]}]
    assert [entry["clean"] for entry in curve] == [7 / 8] * 3
    assert [entry["asr"] for entry in curve] == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert [entry["target_rate"] for entry in curve] == pytest.approx([1 / 6] * 3)
    assert [entry["parameters"] for entry in curve] == [48, 32, 16]  # 12 an expert, 4 its row of the gate
    # expert 1 is fooled by a tenth of a trigger; where a is 1/3 ± 0.1 or 2/3 ± 0.1 the honest ones are, too
    assert [entry["worst"] for entry in curve] == [3 / 8, 6 / 8, 6 / 8]
    for entry in curve:
        assert entry["worst"] <= min(entry["robust"].values())
        assert list(entry["robust"]) == ["pgd", "joint"]

    images = ImageSet((x * 255).round().to(torch.uint8), y, tuple("abc"), "points")
    use = {name: layer.selected for name, layer in routing_shares(model, images).items()}
    assert use == {"": pytest.approx([5 / 8, 3 / 8, 0])}
    curve = pruning_curve(model, x, y, use, poison=POISON)
    assert [entry["keep"][""] for entry in curve] == [[0, 1, 2], [0, 1], [0]]
    assert [entry["asr"] for entry in curve] == pytest.approx([4 / 6, 4 / 6, 1 / 6])
    assert [(entry["robust"], entry["worst"]) for entry in curve] == [({}, None)] * 3
    assert "asr" not in pruning_curve(model, x, y, use)[0]


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="scores of layer '': expected 3 numbers, one per expert, got 2"):
        pruning_curve(planted(), *points(), {"": [1.0, 2.0]})
    with pytest.raises(ValueError, match="scores: expected names of layers"):
        pruning_curve(planted(), *points(), {"layer4.1": [1.0]})
    with pytest.raises(ValueError, match="scores: expected at least one layer, got none"):
        pruning_curve(planted(), *points(), {})
    with pytest.raises(ValueError, match=r"scores of layer 'a': expected finite numbers, got \[nan, 1, 2\]"):
        keep_highest({"a": [math.nan, 1, 2]}, 1)
    x, y = points()
    with pytest.raises(ValueError, match=r"poison.target: expected a class in 0..2, got 3"):
        pruning_curve(planted(), x, y, {"": [1.0, 2.0, 3.0]}, poison=PoisonConfig(target=3, size=1))
    with pytest.raises(ValueError, match="labels: expected an image of another class than the target 0, got none"):
        pruning_curve(planted(), x, torch.zeros_like(y), {"": [1.0, 2.0, 3.0]}, poison=POISON)


BLOCKS = (
    "model.width=4",
    "model.blocks=[1,2]",
    "model.moe.layers=[layer2.0,layer2.1.conv2]",
    "model.moe.num_experts={}",
)
MIXTURE = ("model.width=4", "model.blocks=[1]", "model.mixture.num_experts={}", "model.mixture.routing=hard")


@pytest.mark.parametrize("settings", [BLOCKS, MIXTURE, (*MIXTURE, "model.dual.enabled=true")])
def test_a_pruned_state_loads_into_the_model_of_a_configuration_with_fewer_experts(settings: tuple[str, ...]):
    def build(experts: int) -> nn.Module:
        config = load_config(None, [setting.format(experts) for setting in settings])
        return build_model(config.model, num_classes=4, channels=1, image_size=8).eval()

    torch.manual_seed(0)
    model, smaller = build(4), build(2)
    pruned = prune_experts(model, [1, 3])
    smaller.load_state_dict(pruned.state_dict())
    x = torch.rand(6, 1, 8, 8)
    assert torch.equal(smaller(x), pruned(x))
    assert not torch.equal(smaller(x), model(x))
    assert [layer.num_experts for layer in moe_layers(pruned).values()] == [2] * len(moe_layers(model))
