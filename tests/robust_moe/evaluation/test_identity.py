"""What a journal says of the model, the images and the attacks that its batches are of."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from suite_stages import EPS, chain
from torch import Tensor, nn

from robust_moe.attacks import APGD, PGD, Attack, AutoAttack, Square
from robust_moe.config import load_config
from robust_moe.engine.experiment import make_model
from robust_moe.evaluation import Journal, ResumeError, Stage, identity
from robust_moe.evaluation.stages import as_fraction, describe_attack, fingerprint
from robust_moe_kernels.modules import AllExperts, FixedRoutes, MoELayer, RoutingRecord, moe_layers


def test_identity_names_all_that_matters(victim):
    def me(model=victim.model, x=victim.x, y=victim.y, stages=None, **settings):
        return identity(model, x, y, stages or chain(), settings)

    base = me(eps="3/20")
    assert me(copy.deepcopy(victim.model), eps="3/20") == base
    other = copy.deepcopy(victim.model)
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-7
    x, y = victim.x.clone(), victim.y.clone()
    x[5, 0, 0, 0] += 1e-6
    y[3] = (y[3] + 1) % 10
    changed = {
        "model": me(other, eps="3/20"),
        "data": me(x=x, eps="3/20"),
        "eps": me(eps="1/10"),
        "pgd.steps": me(stages=[Stage("pgd", PGD(EPS, 6, EPS / 2, seed=1), "pgd"), *chain()[1:]], eps="3/20"),
        "square.chain": me(stages=[*chain()[:2], Stage("square", Square(EPS, 40), "own")], eps="3/20"),
    }
    for name, value in changed.items():
        assert {key for key in base if base[key] != value[key]} == {name}
    assert me(y=y, eps="3/20")["data"] != base["data"]
    assert me(x=victim.x.view(96, 1, 64, 1), eps="3/20")["data"] != base["data"]


def mixture() -> nn.Module:
    torch.manual_seed(0)
    config = load_config(None, ["model.width=4", "model.blocks=[1,2]", "model.moe.layers=[layer2.1]"])
    data = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
    return make_model(config, data).eval()


def imposed(layer: MoELayer, **options) -> None:
    for name, value in options.items():
        setattr(layer, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, layer: imposed(layer, fixed_expert=0),
        lambda model, layer: imposed(layer, top_k=1),
        lambda model, layer: imposed(layer, renormalize=not layer.renormalize),
        lambda model, layer: imposed(layer, straight_through=not layer.straight_through),
        lambda model, layer: imposed(layer, reroute=AllExperts()),
        lambda model, layer: imposed(layer, reroute=FixedRoutes(torch.zeros(3, 1, dtype=torch.int64))),
        lambda model, layer: imposed(model.bn1, eps=1e-3),
        lambda model, layer: model.fold.mul_(2),
        lambda model, layer: setattr(model, "bn1", nn.Identity()),
    ],
)
def test_identity_sees_all_of_a_model(change):
    x, y = torch.zeros(3, 1, 8, 8), torch.arange(3)
    one, other = mixture(), mixture()
    for model in (one, other):
        model.register_buffer("fold", torch.ones(2), persistent=False)
    before = identity(one, x, y, [], {})
    assert identity(other, x, y, [], {}) == before
    change(other, next(iter(moe_layers(other).values())))
    after = identity(other, x, y, [], {})
    assert {name for name in before if before[name] != after[name]} == {"model"}


def test_identity_sees_routes_and_positions_and_precision(victim):
    def me(index: Tensor | None = None) -> dict:
        return identity(victim.model, victim.x, victim.y, [], {}, index)

    def differences(other: dict) -> set[str]:
        return {name for name in base if base[name] != other[name]}

    base = me()
    assert me(torch.arange(96)) == base
    assert differences(me(torch.arange(96) + 1)) == {"index"}
    with torch.autocast("cpu", torch.bfloat16):
        assert differences(me()) == {"autocast"}
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32" if before != "tf32" else "ieee"
    try:
        assert differences(me()) == {"fp32_precision.cudnn.conv"}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    model = mixture()
    (layer,) = moe_layers(model).values()
    shas = []
    for expert in (0, 1):
        layer.reroute = FixedRoutes(torch.full((96, 1), expert))
        shas.append(identity(model, victim.x, victim.y, [], {})["model"])
    assert shas[0] != shas[1]


class Rule:
    """A rule from outside that prints its address only."""

    def __init__(self, **settings: object) -> None:
        vars(self).update(settings)

    def __call__(self, options: object, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        return record.indices, record.weights


class Slotted(Rule):
    __slots__ = ("place",)


class OtherRule(Rule):
    pass


def first(options: object, record: RoutingRecord) -> tuple[Tensor, Tensor]:
    return record.indices[:, :1], record.weights[:, :1]


def slotted(place: int) -> Slotted:
    rule = Slotted()
    rule.place = place
    return rule


def model_by(rule: object, option: str = "inference") -> nn.Module:
    model = mixture()
    imposed(next(iter(moe_layers(model).values())), **{option: rule})
    return model


@pytest.mark.parametrize("option", ["inference", "reroute"])
def test_a_rule_from_outside_is_told_by_its_class_and_attributes(option):
    rules = [
        lambda: Rule(place=1),
        lambda: Rule(place=2),
        lambda: Rule(weight=torch.ones(2)),
        lambda: Rule(weight=torch.zeros(2)),
        lambda: OtherRule(place=1),
        lambda: slotted(1),
        lambda: slotted(2),
        lambda: first,
    ]
    found = [fingerprint(model_by(make(), option)) for make in rules]
    assert found == [fingerprint(model_by(make(), option)) for make in rules]  # other objects of the same kind
    assert len(set(found)) == len(rules)


@pytest.mark.parametrize(
    "rule", [Rule(inner=object()), partial(first), lambda options, record: first(options, record), Rule().__call__]
)
def test_what_cannot_be_told_is_never_resumed(rule, tmp_path):
    model, x, y = model_by(rule), torch.zeros(3, 1, 8, 8), torch.arange(3)
    with pytest.raises(ValueError, match=r"inference: expected .*, got"):
        fingerprint(model)
    Journal(tmp_path / "journal", identity(model, x, y, [], {})).close()
    with pytest.raises(
        ResumeError, match=r"model: 'cannot be told from another one, so that nothing is resumed \(layer2"
    ):
        Journal(tmp_path / "journal", identity(model, x, y, [], {}))


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (0.1, "1/10"), (2.5 * (8 / 255) / 20, "1/255"), (0.0, "0"), (1.0, "1"), (0.3, "3/10")],
)
def test_radii_are_exact_fractions(value, text):
    assert as_fraction(value) == text
    assert as_fraction(0.1234567890123) == "0.1234567890123"


def test_settings_are_plain_and_complete():
    settings = describe_attack(APGD(8 / 255, 50, "L2", "dlr-targeted", seed=9))
    assert settings == {
        "attack": "APGD",
        "eps": "8/255",
        "steps": 50,
        "norm": "L2",
        "loss": "dlr-targeted",
        "restarts": 1,
        "seed": 9,
        "eot_iter": 1,
        "mode": "eval",
        "n_targets": 9,
        "rho": 0.75,
    }
    pgd = describe_attack(PGD(8 / 255, 20, norm="Linf", random_start=False))
    assert (pgd["alpha"], pgd["random_start"], pgd["best"]) == ("1/255", False, False)
    assert set(describe_attack(AutoAttack(0.1))["attacks"]) == {"apgd-ce", "apgd-t", "fab-t", "square"}

    class Own(Attack):
        passes = (0, 0)

        def run(self, passes, x0, sample_index, seed):
            return x0

    own = Own(steps=0)
    assert describe_attack(own)["attack"] == "Own"
    own.radii, own.target, own.none, own.climb = (0.1, [2]), torch.ones(2), None, torch.relu
    described = describe_attack(own)
    assert (described["radii"], described["none"]) == ([0.1, [2]], None)
    own.target = torch.zeros(2)
    own.radii = (0.1, [3])
    changed = describe_attack(own)
    assert {name for name in changed if changed[name] != described[name]} == {"radii", "target"}
    assert json.loads(json.dumps(changed)) == changed
    own.climb = lambda x: x
    with pytest.raises(ValueError, match=r"Own\.climb: expected plain values, tensors, .*, got <function"):
        describe_attack(own)


class Shift(nn.Module):
    """A rule that is a module, and prints nothing of what it holds."""

    def __init__(self, by: object) -> None:
        super().__init__()
        self.by = by

    def forward(self, options: object, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        return record.indices, record.weights

    def method(self) -> None:
        """Something of another object."""


def test_a_rule_that_is_a_module_is_told_by_its_attributes_too():
    found = [fingerprint(model_by(Shift(by))) for by in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    with pytest.raises(ValueError, match=r"inference: expected .*, got <bound method"):
        fingerprint(model_by(Shift(Shift(1).method)))
