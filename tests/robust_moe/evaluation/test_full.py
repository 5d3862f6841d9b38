"""The preset ``full``: its attacks and what they cost, and the two flags that it measures, a planted model for each."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from whole_networks import linear
from wrapped_models import Counting, Noisy

import robust_moe
from robust_moe.attacks import PGD, Counts, JointPGD, Steering, TransferPGD
from robust_moe.attacks.autoattack import members
from robust_moe.evaluation import Stage, StageResult, preset_stages, run_suite
from robust_moe.evaluation.full import COST, full_notes
from robust_moe.evaluation.paired import ce_weak, mcnemar, route_hides_gradients
from robust_moe.evaluation.stages import describe_attack
from robust_moe.models import NetworkExperts
from robust_moe_kernels.modules import AllExperts, DropTop, MoELayer, rerouted

EPS = 0.05
ROUTED = ["joint", "transfer", "steering"]
AUTO = ["apgd-ce", "apgd-t", "fab-t", "square"]
ALL = ["pgd", "pgd-margin", *ROUTED, *AUTO]


def pgd(**settings) -> PGD.Config:
    return PGD.Config(eps=str(EPS), **{"steps": 20, **settings})


class Hidden(nn.Module):
    """The first 64 pixels decide the expert by a hard choice without a gradient, the last one the class.

    The choice reads L, the sum of the pixels' offsets from 1/2 with signs. Experts 0 and 1 see the class, the others
    the opposite one. Expert 1 is chosen above L = 3, the next below L = 0; images have L = 2.5, and the ball reaches
    3.2 to both sides. So a random search does not get across, who only leaves expert 0 takes the short way to expert 1,
    and the soft mixture's weights underflow: the wrong expert is found by those who climb its own gate logit.
    """

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.sign = torch.randn(64, generator=generator).sign()
        plane = 50 * torch.cat([self.sign, torch.tensor([0.0, -self.sign.sum().item() / 2])])
        nearer = (2 * plane).index_add(0, torch.tensor([65]), torch.tensor([-150.0]))
        gate = linear(plane.tolist(), nearer.tolist(), *([0.0] * 66 for _ in range(experts - 2)))
        right, wrong = ([[0.0] * 64 + [slope, -slope / 2] for slope in pair] for pair in ((-20, 20), (20, -20)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the gate gets no gradient
            networks = NetworkExperts(
                [linear(*right), linear(*right), *(linear(*wrong) for _ in range(experts - 2))], 1
            )
            self.layer = MoELayer(gate, networks, 1, straight_through=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def images(self, *last: float) -> tuple[Tensor, Tensor]:
        """[n, 1, 5, 13], of class 1, the last pixels being those given."""
        pixels = 0.5 + 0.4 * (torch.rand(len(last), 64, generator=torch.Generator().manual_seed(1)) - 0.5)
        pixels += (50 * EPS - (pixels - 0.5) @ self.sign)[:, None] * self.sign / 64
        x = torch.cat([pixels, torch.tensor(last)[:, None]], 1).view(-1, 1, 5, 13)
        return x, torch.ones(len(last), dtype=torch.int64)


def evaluate(model: nn.Module, x: Tensor, y: Tensor, **settings) -> dict:
    return robust_moe.evaluate(model, x, y, **{"eps": EPS, "preset": "full", "attack": pgd(), **settings})


def flag_of(results: dict, name: str) -> dict:
    (flag,) = (flag for flag in results["flags"] if flag["name"] == name)
    return flag


def passes(attacks: list[dict]) -> float:
    return sum(attack["attacked"] * sum(attack["passes_per_image"].values()) for attack in attacks)


@pytest.fixture(scope="module")
def hidden() -> dict:
    """Of ten images eight are out of reach but through the route, and two are broken by anything."""
    model = Hidden()
    return evaluate(model, *model.images(*[0.9] * 8, 0.52, 0.52))


def test_one_worst_case_over_chains_that_start_anew(hidden):
    attacks = {attack["name"]: attack for attack in hidden["attacks"]}
    assert list(attacks) == ALL
    assert [attacks[name]["chain"] for name in ALL] == ["pgd", "pgd-margin", *["moe/routes"] * 3, *["autoattack"] * 4]
    # each chain is given all images, and the later attacks of a chain what is left: two are broken at once
    given = {name: attack["attacked"] for name, attack in attacks.items()}
    assert given == dict(zip(ALL, [10, 10, 10, 8, 8, 10, 8, 8, 8], strict=True))
    assert [attacks[name]["alone"] for name in ALL] == [0.8, 0.8, 0.8, None, None, 0.8, None, None, None]
    assert attacks["steering"]["broken"] == 8
    assert (hidden["clean"], hidden["autoattack"], hidden["robust"]) == (1.0, 0.8, 0.0)


def test_an_expert_that_only_steering_reaches_raises_the_flag(hidden):
    flag = flag_of(hidden, "route_hides_gradients")
    assert (flag["raised"], flag["value"]) == (True, 2.0**-8)
    assert flag["message"].startswith(
        "attacks on the routes broke 8 of the 8 images that AutoAttack left (joint 0, transfer 0, steering 8), and "
        "missed 0 of the 2 that it broke (chance of that between equals: 0.0039, exact McNemar test): the choice"
    )
    weak = flag_of(hidden, "ce_is_weak")
    assert (weak["raised"], weak["value"]) == (False, 1.0)
    assert weak["message"].startswith("of 10 images PGD on the margin broke 0 that PGD on the cross-entropy left, and ")


def test_it_costs_at_most_half_more_than_standard(hidden):
    model = Hidden()
    nothing_left = evaluate(model, *model.images(*[0.52] * 6))
    for results, robust in ((hidden, 0.8), (nothing_left, 0.0)):
        assert results["autoattack"] == robust
        standard = [attack for attack in results["attacks"] if attack["name"] in ("pgd", *AUTO)]
        assert 1 < passes(results["attacks"]) / passes(standard) <= COST
    settings = {name: [describe_attack(stage.attack) for stage in stages] for name, stages in stages_of(model).items()}
    assert [attack["settings"] for attack in standard] == settings["standard"]


def stages_of(model: nn.Module, **settings) -> dict[str, list[Stage]]:
    return {name: preset_stages(model, pgd(**settings), name, 0) for name in ("full", "standard")}


@pytest.mark.parametrize(("layers", "experts", "routes"), [(1, 2, 2), (1, 16, 16), (4, 8, 7), (6, 8, 4), (30, 8, 2)])
def test_steering_tries_the_experts_that_the_cost_leaves_room_for(layers, experts, routes):
    model = nn.Sequential(*(Hidden(experts) for _ in range(layers)))
    stages = stages_of(model)
    (steering,) = (stage.attack for stage in stages["full"] if isinstance(stage.attack, Steering))
    assert (steering.routes, steering.loss_name) == (routes if routes < experts else None, "margin")
    full, standard = (sum(sum(stage.attack.most_passes(model)) for stage in stages[name]) for name in stages)
    assert (full <= COST * standard) == (layers < 30)  # one expert that the gate has not chosen is always tried
    notes = full_notes(model, stages["full"])
    cut = f"steering tries the gate's first {routes} of up to 8 experts a layer: all would cost too much"
    assert notes == ([] if routes == experts else [cut])


def test_no_attack_twice():
    model = Hidden()
    for settings in ({}, {"loss": "margin"}, {"loss": "dlr", "random_start": False}, {"restarts": 2}):
        stages = stages_of(model, **settings)["full"]
        assert [stage.name for stage in stages] == [
            name for name in ALL if name != "pgd-margin" or "margin" not in settings.values()
        ]
        made = [str({**describe_attack(stage.attack), "seed": None}) for stage in stages]
        assert len(set(made)) == len(made)
        (joint,) = (stage.attack for stage in stages if isinstance(stage.attack, JointPGD))
        assert (joint.loss_name, joint.restarts) == (settings.get("loss", "ce"), settings.get("restarts", 1))


@pytest.fixture
def short_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two steps, and of Square's hundred queries."""
    monkeypatch.setattr("robust_moe.evaluation.stages.members", partial(members, steps=2))


def test_without_routes_those_attacks_fall_away_with_a_note(capsys, short_autoattack):
    x, y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    found = evaluate(linear([0.0] * 5, [1.0, -1.0, 1.0, -1.0, 0.0]), x, y, progress=True)
    assert [attack["name"] for attack in found["attacks"]] == ["pgd", "pgd-margin", *AUTO]
    assert "joint, transfer and steering, which would be PGD again, do not run" in " ".join(
        capsys.readouterr().out.split()
    )
    flag = flag_of(found, "route_hides_gradients")
    assert (flag["raised"], flag["value"]) == (False, None)
    assert flag["message"] == "not measured: no attacks on the routes beside AutoAttack"


def test_a_ball_of_no_radius(short_autoattack):
    model = Hidden()
    found = evaluate(model, *model.images(0.9, 0.52), eps=0)
    assert [attack["name"] for attack in found["attacks"]] == ALL
    assert found["robust"] == found["clean"] == 1.0
    assert not flag_of(found, "route_hides_gradients")["raised"]


def test_a_model_that_draws_random_numbers_is_refused_and_told_what_to_do(tmp_path):
    model, path = Hidden(), tmp_path / "a.json"
    images = model.images(*[0.9] * 4)
    with pytest.raises(ValueError, match="model: expected one that draws no random numbers, got two forwards") as error:
        evaluate(Noisy(model), *images, results=path)
    assert "average over draws (eval.attack.eot_iter, --preset rand)" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_stopped_in_an_attack_on_the_routes_it_goes_on(tmp_path, short_autoattack):
    counting = Counting(Hidden())
    images = counting.model.images(*[0.9] * 4)
    settings = {"batch_size": 2, "results": tmp_path / "a.json"}
    clean = Counting(counting.model)
    evaluate(clean, *images, batch_size=2, preset="quick", attack=pgd(steps=0))
    stop_at = clean.calls + 3 * 2 * 21 + 2 * 21  # after pgd, pgd-margin and joint, in transfer or steering
    whole = evaluate(counting, *images, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Counting(counting.model, stop_at), *images, **settings)
    rest = Counting(counting.model)
    again = evaluate(rest, *images, **settings)
    for one in (whole, again):
        assert [attack["name"] for attack in one["attacks"]] == ALL
    for key in ("clean", "robust", "autoattack", "flags"):
        assert again[key] == whole[key]
    keys = ("attacked", "broken", "robust_after", "alone", "passes_per_image")
    assert [[a[k] for k in keys] for a in again["attacks"]] == [[a[k] for k in keys] for a in whole["attacks"]]
    assert counting.images - rest.images > 2 * stop_at - 2 * 2 * 250  # at most a batch of steering is made again


@pytest.mark.parametrize("restarts", [1, 2])
def test_the_transfer_attack_climbs_the_mixture_of_all_experts(restarts):
    model = Hidden()
    layer = model.layer
    with torch.no_grad():  # a plane that the mixture sees
        layer.gate[1].weight /= 50
        layer.gate[1].bias /= 50
    x, y = model.images(0.9, 0.9)
    settings = {"steps": 5, "restarts": restarts, "seed": 4}
    found = TransferPGD(EPS, **settings)(model, x, y)
    assert layer.reroute is None
    if restarts == 1:  # of several the one that is worst for the model itself
        with rerouted(model, {"layer": AllExperts()}):
            assert torch.equal(found, PGD(EPS, **settings)(model, x, y))
    with rerouted(model, {"layer": DropTop()}):  # the caller's routes stay
        assert torch.equal(TransferPGD(EPS, **settings)(model, x, y), PGD(EPS, **settings)(model, x, y))
    assert (model(found).argmax(1) != y).all()  # across the plane, which has no gradient for PGD on the model
    assert (model(PGD(EPS, **settings)(model, x, y)).argmax(1) == y).all()


# --- the flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (1, 0), (7, 0), (10, 5), (3, 9), (60, 31)])
def test_the_test_is_the_one_sided_binomial(more, fewer):
    expected = binomtest(more, more + fewer, alternative="greater").pvalue if more + fewer else 1.0
    assert mcnemar(more, fewer) == pytest.approx(expected, rel=1e-9)


def result(stage: Stage, broken: list[int], attacked: np.ndarray | None = None) -> StageResult:
    n = 40
    mask = np.isin(np.arange(n), broken)
    rest = {"prediction": np.zeros(n, int), "robust_after": 0.5, "alone": None, "counts": Counts(), "seconds": 0.0}
    every = np.ones(n, bool) if attacked is None else attacked
    return StageResult(stage=stage, attacked=every, broken=mask, reach=EPS, low=0.0, high=1.0, **rest)


@pytest.mark.parametrize(
    ("extra", "missed", "raised"), [(7, 0, True), (6, 0, False), (12, 2, True), (12, 3, False), (0, 20, False)]
)
def test_more_than_the_luck_of_two_equal_attacks(extra, missed, raised):
    auto = Stage("apgd-ce", PGD(EPS, 2), "autoattack")
    joint, steering = (Stage(name, PGD(EPS, 2), "moe/routes") for name in ("joint", "steering"))
    first = min(extra, 4)
    results = [
        result(joint, list(range(first))),
        result(steering, list(range(first, extra))),
        result(auto, list(range(20, 20 + missed))),
    ]
    flag = route_hides_gradients(results)
    assert flag.raised == raised
    assert f"broke {extra} of the {40 - missed} images that AutoAttack left (joint {first}, " in flag.message
    assert f"steering {extra - first}), and missed {missed} of the {missed} that it broke" in flag.message
    entropy, margin = (Stage(name, PGD(EPS, 2, loss=name), name) for name in ("ce", "margin"))
    flag = ce_weak([result(entropy, list(range(20, 20 + missed))), result(margin, list(range(extra)))])
    assert flag.raised == raised
    assert f"of 40 images PGD on the margin broke {extra} that PGD on the cross-entropy left, and left {missed}" in (
        flag.message
    )


class Spread(nn.Module):
    """Class 1 is within reach on one side; on the other are eight classes out of reach, which together weigh more in
    the cross-entropy: of logits 0, -1 + u and eight times -2 - u it falls in u below (ln 8 - 1) / 2 = 0.54, and the
    margin below -0.5."""

    def forward(self, x: Tensor) -> Tensor:
        u = 12 * (x.flatten(1) - 0.5)
        return torch.cat([0 * u, u - 1, (-2 - u).expand(-1, 8)], 1)


def test_a_cross_entropy_that_climbs_towards_classes_out_of_reach_raises_the_flag():
    x, y = torch.full((40, 1, 1, 1), 0.5), torch.zeros(40, dtype=torch.int64)
    stages = [Stage(name, PGD(0.1, 20, loss=name), name) for name in ("ce", "margin")]
    found = run_suite(Spread(), x, y, stages, eps=0.1)
    entropy, margin = found.stages
    # of random starts, uniform in u from -1.2 to 1.2, those above 0.54 for the one and above -0.5 for the other
    assert 0.1 < entropy.broken.mean() < 0.45 < 0.55 < margin.broken.mean() < 0.9
    assert (entropy.broken <= margin.broken).all()
    left = int(margin.broken.sum() - entropy.broken.sum())
    (flag,) = (flag for flag in found.flags if flag.name == "ce_is_weak")
    assert (flag.raised, flag.value) == (True, 2.0**-left)
    assert flag.message.startswith(f"of 40 images PGD on the margin broke {left} that PGD on the cross-entropy left, ")


def test_losses_are_compared_at_equal_settings_only():
    few, many = (
        Stage(f"{steps}", PGD(EPS, steps, loss=loss), f"{steps}") for steps, loss in ((2, "ce"), (9, "margin"))
    )
    flag = ce_weak([result(few, []), result(many, list(range(40)))])
    assert (flag.raised, flag.value) == (False, None)
    assert flag.message.startswith("not measured")
