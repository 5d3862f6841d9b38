"""Routing rules for evaluation: margin-soft and randomised."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from whole_networks import Networks

from robust_moe.analysis import certify_mixture
from robust_moe.attacks import PGD, ExpertPGD, JointPGD, RouterPGD
from robust_moe.config import ConfigError, TrainConfig, load_config
from robust_moe.data import load_splits
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import describe_data, load_experiment, make_model
from robust_moe.evaluation.sanity import probe_flags
from robust_moe.evaluation.stages import fingerprint
from robust_moe.models import INFERENCE_ROUTINGS, ExpertMixture, InferenceConfig, MarginSoft, RandomTop
from robust_moe.settings import setting
from robust_moe_kernels.modules import (
    AllExperts,
    DropTop,
    FixedRoutes,
    FusedConvMoE,
    MoELayer,
    RandomRoutes,
    SoftGradient,
    SwapTop,
    moe_layers,
    prune_experts,
    rerouted,
)

RULES = (MarginSoft(threshold=0.3, top=3), RandomTop(top=3))
DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
NETWORKS = ("model.moe.layers=[]", "model.mixture.num_experts=3", "model.mixture.routing=hard")


class Scores(nn.Module):
    """A gate whose logits are its parameter [B, E], whatever the maps."""

    def __init__(self, scores: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(scores, dtype=torch.float64).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def constants(count: int) -> list[nn.Module]:
    """Expert e answers row e of the identity."""

    class Answer(nn.Module):
        def __init__(self, expert: int) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.eye(count, dtype=torch.float64)[expert])

        def forward(self, x: Tensor) -> Tensor:
            return self.row.expand(len(x), -1)

    return [Answer(expert) for expert in range(count)]


def layer(scores: list[list[float]], rule: object = None, top_k: int = 1) -> MoELayer:
    """In eval mode; its output is the weight of each expert."""
    made = MoELayer(Scores(scores), Networks(constants(len(scores[0])), 1), top_k).eval()
    made.inference = rule
    return made


def maps(count: int) -> Tensor:
    return torch.zeros(count, 1, 2, 2, dtype=torch.float64)


# --- margin-soft ---


@pytest.mark.parametrize(
    ("scores", "weights"),  # tau = 0.2
    [
        ([0.6, 0.3, 0.1], [1, 0, 0]),
        ([0.4, 0.4, 0.2], [0.5, 0.5, 0]),
        ([0.45, 0.35, 0.2], [2 / 3, 1 / 3, 0]),  # r = 1, 1/2
        ([0.2, 0.35, 0.45], [0, 1 / 3, 2 / 3]),
        ([0.5, 0.3, 0.2], [1, 0, 0]),  # a margin of tau
        ([1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]),  # the first two of three
    ],
)
def test_margin_soft_mixes_what_comes_within_the_threshold(scores, weights):
    got = layer([scores], MarginSoft(threshold=0.2, top=2))(maps(1))
    torch.testing.assert_close(got, torch.tensor([weights], dtype=torch.float64), atol=1e-12, rtol=0)


def test_margin_soft_over_all_experts_is_continuous_where_a_hard_choice_jumps():
    torch.manual_seed(0)
    path = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    a, b = (torch.randn(8, dtype=torch.float64).softmax(0) for _ in range(2))
    scores = ((1 - path) * a + path * b).tolist()
    jumps = {}
    for name, rule in (("hard", None), ("soft", MarginSoft(threshold=0.2, top=8))):
        weights = layer(scores, rule)(maps(2001)).detach()
        jumps[name] = float((weights[1:] - weights[:-1]).abs().max())
    assert jumps["hard"] == 1
    assert jumps["soft"] < 0.02


def test_margin_soft_has_a_gradient_in_the_scores_where_experts_are_mixed():
    made = layer([[0.45, 0.35, 0.2], [0.8, 0.1, 0.1]], MarginSoft(threshold=0.2, top=3))
    value = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad((made(maps(2)) @ value).sum(), made.gate.logits)
    assert torch.autograd.gradcheck(
        lambda logits: MarginSoft(0.2, 3)(made.route_options, record_of(made, logits))[1],
        made.gate.logits[:1].detach().clone().requires_grad_(),
    )
    assert grad[0].abs().max() > 0.1
    assert torch.equal(grad[1], torch.zeros(3, dtype=torch.float64))  # the best alone


def record_of(made: MoELayer, logits: Tensor):
    other = copy.deepcopy(made)
    del other.gate.logits
    other.gate.logits = logits
    return other.train().decide(maps(len(logits)))[0]


# --- randomised ---


def test_random_top_draws_by_the_scores_of_the_first():
    torch.manual_seed(0)
    count = 20_000
    got = layer([[0.1, 0.5, 0.3, 0.1]] * count, RandomTop(top=2))(maps(count)).detach()
    assert set(got.sum(1).tolist()) == {1.0}
    share = got.mean(0)
    assert share[0] == share[3] == 0
    assert abs(float(share[1]) - 0.625) < 4 * math.sqrt(0.625 * 0.375 / count)


def test_the_mean_gradient_of_random_draws_is_that_of_the_mean_output():
    torch.manual_seed(0)
    made = layer([[0.1, 0.5, 0.3, 0.1]] * 300, RandomTop(top=3))
    value = torch.tensor([3.0, 1.0, -2.0, 7.0], dtype=torch.float64)
    output = made(maps(300))
    drawn = output.argmax(1)
    (grad,) = torch.autograd.grad((output @ value).sum(), made.gate.logits)
    logits = made.gate.logits[:1].detach().requires_grad_()
    kept = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # ties to the lowest
    p = logits.exp() * kept / (logits.exp() * kept).sum()
    (wanted,) = torch.autograd.grad((p * value).sum(), logits)
    mean = torch.zeros(4, dtype=torch.float64)
    for expert in range(3):  # the expectation, written out: one draw of each expert, by its chance
        assert (drawn == expert).any()
        mean += p[0, expert].detach() * grad[drawn == expert][0]
    torch.testing.assert_close(mean, wanted[0])


# --- in a layer ---


@pytest.mark.parametrize("rule", RULES, ids=["margin_soft", "random_top"])
def test_a_rule_holds_in_eval_mode_alone(rule):
    torch.manual_seed(0)
    made = FusedConvMoE.from_conv(nn.Conv2d(3, 4, 3, padding=1), 4, 1, init="fresh")
    plain = copy.deepcopy(made)
    made.inference = rule
    x = torch.randn(16, 3, 5, 5)
    assert torch.equal(made.train()(x), plain.train()(x))
    changed = made.eval()(x)
    assert made.routing.indices.shape[1] == (3 if isinstance(rule, MarginSoft) else 1)
    assert not torch.equal(changed, plain.eval()(x))
    outputs = torch.stack([plain.experts.one(expert, x) for expert in range(4)], 1)
    weights = torch.zeros(16, 4).scatter(1, made.routing.indices, made.routing.weights.detach())
    torch.testing.assert_close(changed, (weights[:, :, None, None, None] * outputs).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=["margin_soft", "random_top"])
@pytest.mark.parametrize("impose", [DropTop, SwapTop, AllExperts, lambda: RandomRoutes(torch.arange(2))])
def test_imposed_routes_go_on_top_of_a_rule(rule, impose):
    made = layer([[0.4, 0.35, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]], rule)
    with rerouted(made, impose()):
        weights = made(maps(2)).detach()
    torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
    if impose is AllExperts:
        torch.testing.assert_close(weights, made.routing.scores.detach())
    with rerouted(made, FixedRoutes(torch.tensor([[3], [0]]), torch.ones(2, 1, dtype=torch.float64))):
        assert made(maps(2)).argmax(1).tolist() == [3, 0]


def test_the_soft_gradient_goes_with_the_forward_of_the_rule():
    made = layer([[0.4, 0.35, 0.15, 0.1]], MarginSoft(threshold=0.3, top=3))
    wanted = made(maps(1)).detach()
    with rerouted(made, SoftGradient()):
        got = made(maps(1))
    torch.testing.assert_close(got.detach(), wanted)
    (grad,) = torch.autograd.grad(got[0, 3], made.gate.logits)  # of an expert that the rule leaves out
    assert float(grad[0, 3]) == pytest.approx(0.1 * 0.9)


def test_a_rule_is_printed_copied_and_part_of_the_fingerprint():
    made = layer([[0.4, 0.6]])
    before, text = fingerprint(made), made.extra_repr()
    assert "inference" not in text
    made.inference = MarginSoft(0.1, 2)
    assert "inference=MarginSoft(threshold=0.1, top=2)" in made.extra_repr()
    assert copy.deepcopy(made).inference == made.inference
    assert hash(made.route_options) == hash(copy.deepcopy(made).route_options)
    assert fingerprint(made) != before
    made.inference = None
    assert fingerprint(made) == before


# --- in a model, under attack and in checks ---


@pytest.fixture
def trained(tiny: Callable[..., TrainConfig]) -> TrainConfig:
    config = tiny("method.name=standard", *NETWORKS, "run.epochs=3", "optim.lr=0.05")
    Trainer(config, Reporter(enabled=False)).fit()
    return config


def probed(config: TrainConfig, *overrides: str) -> tuple[nn.Module, dict[str, bool], Tensor, Tensor]:
    _, model, splits, _ = load_experiment(config.run.out, list(overrides))
    x, y = splits.test.images.float() / 255, splits.test.labels
    torch.manual_seed(0)
    return model, {flag.name: flag.raised for flag in probe_flags(model, x, y, 0.05, "Linf")}, x, y


def test_a_trained_mixture_is_evaluated_by_another_rule_and_sanity_sees_draws(trained):
    plain, flags, x, y = probed(trained)
    assert not flags["randomised_output"]
    soft, flags, *_ = probed(trained, "model.mixture.inference={name: margin_soft, threshold: 1, top: 3}")
    assert not flags["randomised_output"]
    assert not torch.equal(soft(x), plain(x))
    drawn, flags, *_ = probed(trained, "model.mixture.inference=random_top")
    assert flags["randomised_output"]
    torch.manual_seed(1)
    one = drawn(x)
    torch.manual_seed(1)
    assert torch.equal(one, drawn(x))
    for attack in (PGD(0.1, 2, eot_iter=3), ExpertPGD(0.1, 2), RouterPGD(0.1, 2), JointPGD(0.1, 2)):
        for model in (soft, drawn):
            assert (attack(model, x, y) - x).abs().max() > 0.05
            assert isinstance(moe_layers(model)[""].inference, MarginSoft | RandomTop)
    with pytest.raises(ConfigError, match=r"override: expected settings of the evaluation .*model.\*.inference.\*"):
        load_experiment(trained.run.out, ["model.mixture.top_k=1"])


def test_no_certificate_is_given_for_a_routing_that_it_does_not_know(tiny):
    for overrides in (NETWORKS, ("model.moe.layers=[layer2.1]",)):
        section = "mixture" if overrides is NETWORKS else "moe"
        model = make_model(tiny(*overrides, f"model.{section}.inference=margin_soft"), DATA).eval()
        with pytest.raises(ValueError, match=r"expected .* decides, got one with a fixed expert, .*a routing rule"):
            certify_mixture(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))


@dataclass(frozen=True)
class Worst:
    """A rule from outside."""

    @dataclass(frozen=True, kw_only=True)
    class Config(InferenceConfig):
        place: int = setting(3, "rank of the expert that takes all", at_least=0)

        def build(self) -> Worst:
            return Worst(self.place)

    place: int

    def __call__(self, options, record) -> tuple[Tensor, Tensor]:
        ranked = record.logits.sort(dim=1, descending=True).indices[:, self.place, None]
        return ranked, torch.ones_like(ranked, dtype=record.weights.dtype)


def test_a_rule_from_outside_is_chosen_by_name(tiny, monkeypatch):
    monkeypatch.setattr(INFERENCE_ROUTINGS, "_entries", dict(INFERENCE_ROUTINGS._entries))
    INFERENCE_ROUTINGS.register("worst")(Worst)
    model = make_model(tiny("model.moe.inference={name: worst, place: 1}"), DATA).eval()
    (made,) = moe_layers(model).values()
    assert made.inference == Worst(1)
    model(torch.rand(4, 1, 8, 8))
    assert torch.equal(made.routing.indices[:, 0], made.routing.logits.argsort(1, descending=True)[:, 1])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.moe.inference={name: margin_soft, top: 5}"], "model.moe.inference.top: expected 2 <= m <= 4, got 5"),
        ([*NETWORKS, "model.mixture.inference={name: random_top, top: 4}"], "model.mixture.inference.top: .*3, got 4"),
        (["model.moe.inference={name: random_top, top: 1}"], "model.moe.inference.top: expected .*got 1"),
        (["model.moe.inference={name: margin_soft, threshold: 0}"], "model.moe.inference.threshold: expected .*got 0"),
        (["model.moe.inference=soft_margin"], "model.moe.inference.name: expected .*margin_soft"),
    ],
)
def test_settings_out_of_range_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MarginSoft(threshold=0.0), r"threshold: expected a number in \(0, 1\], got 0"),
        (lambda: MarginSoft(top=1), "top: expected m >= 2, got 1"),
        (lambda: RandomTop(top=1), "top: expected m >= 2, got 1"),
    ],
)
def test_a_rule_out_of_range_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("rule", RULES, ids=["margin_soft", "random_top"])
def test_a_rule_goes_on_with_the_experts_that_pruning_leaves(rule):
    torch.manual_seed(0)
    made = FusedConvMoE.from_conv(nn.Conv2d(3, 4, 3, padding=1), 4, 1, init="fresh").eval()
    made.inference = rule
    x = torch.randn(6, 3, 5, 5)
    for left in ([0, 3], [2]):
        pruned = prune_experts(made, left)
        output = pruned(x)
        assert pruned.inference == rule
        assert set(pruned.routing.indices.flatten().tolist()) <= set(range(len(left)))
    torch.testing.assert_close(output, made.expert(2)(x), rtol=1e-4, atol=1e-5)


def test_the_default_is_the_routing_of_training(tiny):
    splits = load_splits(tiny().data, 0)
    model = make_model(tiny(*NETWORKS), describe_data(splits.test))
    assert isinstance(model, ExpertMixture) and model.inference is None
