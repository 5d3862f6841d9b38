"""The evaluation of mixtures: every number by hand on mixtures of two-pixel linear networks, then what always holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_networks import linear
from wrapped_models import Counting, Noisy

from robust_moe.attacks import PGD, Counts
from robust_moe.data import ImageSet
from robust_moe.evaluation import (
    Journal,
    ResumeError,
    curve_radii,
    error_curve,
    evaluate_moe,
    run_moe,
    wilson_interval,
)
from robust_moe.evaluation.moe_numbers import RANDOM_POINTS
from robust_moe.evaluation.routing_measures import (
    disagreement,
    expert_sets,
    gradient_share,
    routing_change,
    top_k_margin,
)
from robust_moe.evaluation.stages import describe_attack
from robust_moe.models import BasicBlock, NetworkExperts
from robust_moe_kernels.modules import (
    AllExperts,
    MoELayer,
    RandomRoutes,
    moe_layers,
    replace_blocks,
    rerouted,
)


def pgd(eps: float, steps: int = 20, **settings) -> PGD.Config:
    return PGD.Config(eps=eps, steps=steps, **settings)


def two_experts(top_k: int = 1) -> MoELayer:
    """Router: expert 0 where b > 1/2, else expert 1; a hard choice, whose gate gets no gradient from the classes.
    Expert 0: class 1 where a > 1/2; expert 1 contradicts it."""
    gate = linear([0, 20, -10], [0, -20, 10])
    agree, contradict = linear([-10, 0, 5], [10, 0, -5]), linear([10, 0, -5], [-10, 0, 5])
    with pytest.warns(UserWarning, match="the gate gets no gradient"):
        return MoELayer(gate, NetworkExperts([agree, contradict], 1), top_k, straight_through=False).eval()


# All of class 1. Within 0.1 pixel a decides the class and b the expert; 0.0999 leaves a random point no say.
POINTS = {
    "robust": (0.9, 0.9),
    "weak expert": (0.5999, 0.9),
    "weak router": (0.9, 0.5999),
    "wrong": (0.1, 0.9),
    "robust, by the other expert": (0.1, 0.1),
}


def points() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.tensor(list(POINTS.values())).view(-1, 1, 1, 2)
    return x, torch.ones(5, dtype=torch.int64), torch.arange(5) + 40


@pytest.fixture(scope="module")
def by_hand() -> dict:
    return evaluate_moe(two_experts(), *points(), attack=pgd(0.1, 10), seed=3)


def test_accuracies(by_hand):
    # soft mixture: 20 (b − 1/2) is at least 2 there, so the better expert outweighs the other; its own attack transfers
    expected = {"sa": 0.8, "ra": 0.6, "ra_e": 0.6, "ra_r": 0.6, "ra_r_targeted": 0.6, "joint": 0.4, "union": 0.4}
    assert {name: by_hand[name] for name in expected} == expected
    for name in (*expected, "transfer"):
        assert by_hand[f"{name}_interval"] == list(wilson_interval(by_hand[name], 5))
    assert by_hand["union"] <= by_hand["transfer"] <= by_hand["sa"]
    given = {"eps": "1/10", "steps": 10, "alpha": "1/40", "norm": "Linf", "seed": 3}
    assert by_hand["settings"] == {**given, "restarts": 1, "random_start": True, "loss": "ce", "eot_iter": 1}
    assert list(by_hand["layers"]) == ["model"]


def test_every_attack_is_a_stage_with_masks_passes_and_its_ball():
    model, (x, y, index) = two_experts(), points()
    numbers, stages = run_moe(model, x, y, index, attack=pgd(0.1, 10), seed=3, batch_size=2)
    assert [stage.stage.name for stage in stages] == ["ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer"]
    right = [True, True, True, False, True]
    robust = {"ra": [0, 4, 2], "ra_e": [0, 4, 2], "ra_r": [0, 4, 1], "ra_r_targeted": [0, 4, 1], "joint": [0, 4]}
    for stage in stages:
        assert stage.attacked.all()
        wrong = stage.prediction != y.numpy()
        np.testing.assert_array_equal(stage.broken, wrong & right)
        name = stage.stage.name
        assert stage.stage.chain == f"moe/{name}"
        assert numbers[name] == stage.alone == (right & ~stage.broken).mean()
        if name in robust:
            assert set(np.flatnonzero(right & ~stage.broken)) == set(robust[name])
        more = {"ra_e": 1, "ra_r": 1, "joint": 1, "ra_r_targeted": 2}.get(name, 0)  # clean, and what a target gave
        assert stage.counts == Counts(5 * (10 + more), 5 * 10)
        assert stage.seconds > 0
        assert stage.reach == pytest.approx(0.1, rel=1e-6)
        assert 0 <= stage.low < stage.high <= 1


def test_all_settings_of_the_attack_are_those_of_every_attack():
    model, (x, y, index) = two_experts(), points()
    given = {"restarts": 3, "loss": "margin", "eot_iter": 2, "steps": 4, "alpha": 0.01}
    numbers, stages = run_moe(model, x, y, index, attack=pgd(0.1, **given, graph=False))
    assert {name: numbers["settings"][name] for name in given} == {**given, "alpha": "1/100"}
    for stage in stages:
        attack = stage.stage.attack
        assert (attack.restarts, attack.loss_name, attack.eot_iter, attack.steps) == (3, "margin", 2, 4)
    _, (ra, *_) = run_moe(model, x, y, index, attack=pgd(0.1, 4, random_start=False))
    images = PGD(0.1, 4, random_start=False)(model, x, y)
    np.testing.assert_array_equal(ra.prediction, model(images).argmax(1))
    with pytest.raises(ValueError, match="loss: expected one of ce, margin, dlr, got 'kl'"):
        run_moe(model, x, y, index, attack=pgd(0.1, 20, loss="kl"))
    counting = [Counting(model), Counting(model)]
    for one, restarts in zip(counting, (1, 3), strict=True):
        attack = pgd(0.1, 4, restarts=restarts, eot_iter=2, loss="dlr")
        error_curve(one, x, y, index, attack=attack, eps_values=[0.1])
    images = [one.images - 1 - 10 for one in counting]  # one shows the classes; two scores of five
    assert images == [5 * 8, 3 * 5 * (8 + 1)]


def test_routing(by_hand):
    layer = by_hand["layers"]["model"]
    assert (layer["experts"], layer["top_k"]) == (2, 1)
    for use in ("selected", "first"):
        assert layer[use] == {"clean": [0.8, 0.2], "adversarial": [0.8, 0.2]}  # this PGD does not see the router
    assert layer["collapsed"] is False  # four in five is not more than that
    assert layer["expert_by_class"]["clean"] == [[0.0, 0.0], [0.8, 0.2]]
    changes = {name: layer["by_attack"][name] for name in ("ra", "ra_e", "ra_r")}
    flips = {"routing_change": 0.2, "route_flips": 0.2}
    none = {"routing_change": 0.0, "route_flips": 0.0}
    assert changes == {"ra": none, "ra_e": none, "ra_r": flips}
    assert (layer["routing_change"], layer["route_flips"]) == (0.0, 0.0)
    margins = [40 * abs(b - 0.5) for _, b in POINTS.values()]
    assert layer["margin"]["mean"] == pytest.approx(sum(margins) / 5, rel=1e-5)
    assert layer["margin"]["quantiles"]["0.5"] == pytest.approx(sorted(margins)[2], rel=1e-5)
    assert layer["margin"]["max"] == pytest.approx(max(margins), rel=1e-5)


def test_single_experts(by_hand):
    # each on all five: the first is right where a > 1/2, the second where it is not
    assert by_hand["layers"]["model"]["single_experts"] == [
        {"expert": 0, "clean": 0.6, "robust": 0.4},
        {"expert": 1, "clean": 0.4, "robust": 0.4},
    ]


def test_protocols(by_hand):
    protocols = by_hand["layers"]["model"]["protocols"]
    contrary = {"clean": 0.2, "robust": 0.2}  # the other expert: right for the one that was wrong, and far from 1/2
    assert protocols["drop_top"] == contrary
    assert protocols["swap"] == contrary
    model, (x, _, index) = two_experts(), points()
    with rerouted(model, RandomRoutes(index, 3, 0)):
        model(x)
    agreeing = model.routing.indices[:, 0] == 0
    right = agreeing == (x[:, 0, 0, 0] > 0.5)
    robust = right & ((x[:, 0, 0, 0] - 0.5).abs() > 0.1)
    assert 0 < right.sum() < 5
    assert protocols["random"] == {"clean": right.double().mean().item(), "robust": robust.double().mean().item()}
    assert protocols["clean_route_on_adversarial"] == {"clean": 0.8, "robust": 0.6}
    assert protocols["adversarial_route_on_clean"] == {"clean": 0.8, "robust": None}


def test_clean_routes_undo_an_attack_that_went_through_the_router():
    """With the score's gradient the attack moves b too; on the clean route its images are right again."""
    model = two_experts()
    model.straight_through = True
    x, y, index = (tensor[2:3] for tensor in points())
    found = evaluate_moe(model, x, y, index, attack=pgd(0.1, 10))
    layer = found["layers"]["model"]
    assert (found["sa"], found["ra"], layer["route_flips"], layer["routing_change"]) == (1.0, 0.0, 1.0, 1.0)
    assert layer["protocols"]["clean_route_on_adversarial"] == {"clean": 1.0, "robust": 1.0}
    assert layer["protocols"]["adversarial_route_on_clean"] == {"clean": 0.0, "robust": None}
    assert layer["selected"] == {"clean": [1.0, 0.0], "adversarial": [0.0, 1.0]}
    assert layer["collapsed"] is True


def test_lipschitz_estimates_of_linear_functions():
    """Without a flip, logits move by (−10, 10) a pixel a, gate logits by (20, −20) a pixel b; PGD goes all the way."""
    x, y, index = (tensor[[0, 4]] for tensor in points())
    found = evaluate_moe(two_experts(), x, y, index, attack=pgd(0.05, 10))
    assert found["lipschitz"]["points"] == RANDOM_POINTS + 6
    for name, slope in (("mean", 10), ("max", 10)):
        assert found["lipschitz"][name] == pytest.approx(slope * math.sqrt(2), rel=1e-4)
        assert found["layers"]["model"]["lipschitz"][name] == pytest.approx(2 * slope * math.sqrt(2), rel=1e-4)


# --- the measures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "change"),
    [([0], [0], 0), ([0], [1], 1), ([0, 1], [1, 0], 0), ([0, 1], [1, 2], 2 / 3), ([0, 1, 2], [3, 2, 1], 1 / 2)],
)
def test_routing_change(first, second, change):
    sets = [expert_sets(torch.tensor([indices]), 4) for indices in (first, second)]
    assert routing_change(*sets).item() == pytest.approx(change)


def test_top_k_margin():
    logits = torch.tensor([[3.0, -1.0, 7.0, 2.5]])
    assert [top_k_margin(logits, k).item() for k in (1, 2, 3)] == [4.0, 0.5, 3.5]
    assert top_k_margin(logits, 4) is None


def mixture() -> tuple[MoELayer, Tensor, Tensor]:
    torch.manual_seed(0)
    gate = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(3)]
    model = MoELayer(gate, NetworkExperts(heads, 3), 1).double().eval()
    return model, torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.arange(6) % 5


def test_disagreement_by_its_definition():
    model, x, _ = mixture()
    model(x)
    scores = model.gate(x).softmax(1)
    outputs = torch.stack([network(x) for network in model.experts.networks], 1)  # [B, E, classes]
    mean = (scores[:, :, None] * outputs).sum(1)
    expected = (scores * (outputs - mean[:, None]).square().sum(2)).sum(1).sqrt() / mean.norm(dim=1)
    torch.testing.assert_close(disagreement(model, x, model.routing), expected)
    for network in model.experts.networks:
        network.load_state_dict(model.experts.networks[0].state_dict())
    assert disagreement(model, x, model.routing).max() < 1e-12


def test_share_of_routing_in_the_gradient_by_the_jacobians_identity():
    """J = Σ s_i ∇e_i + Σ (e_i − ē) ∇s_i, here with the chosen expert held in the first term."""
    model, x, y = mixture()
    model(x)
    chosen, record = model.routing.indices[:, 0], model.routing
    parts = []
    for b in range(6):
        at = x[b : b + 1].clone().requires_grad_()
        outputs = torch.stack([network(at)[0] for network in model.experts.networks])  # [E, classes]
        scores = model.gate(at).softmax(1)[0]
        logits = outputs[chosen[b]]
        (slope,) = torch.autograd.grad(F.cross_entropy(logits[None], y[b : b + 1]), logits, retain_graph=True)
        (by_experts,) = torch.autograd.grad(slope @ outputs[chosen[b]], at, retain_graph=True)
        gain = outputs.detach() @ slope  # <dL/dy, e_i>
        (by_routing,) = torch.autograd.grad((gain - gain.mean()) @ scores, at)  # Σ ∇s_i = 0: any centre will do
        parts.append(by_routing.norm() / (by_routing.norm() + by_experts.norm()))
    torch.testing.assert_close(gradient_share(model, "", x, y), torch.stack(parts))
    assert model.routing is record


def test_the_share_is_zero_where_experts_agree():
    model, x, y = mixture()
    for network in model.experts.networks:
        network.load_state_dict(model.experts.networks[0].state_dict())
    model(x)
    assert gradient_share(model, "", x, y).max() < 1e-12


# --- what always holds --------------------------------------------------------------------------------------------


def bright(count: int) -> Tensor:
    """Images of whole 255ths and any brightness."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(count, 1, 5, 5, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    return (255 * x).round() / 255


def network(top_k: int = 2, experts: int = 3) -> nn.Module:
    """A routed block and a routed convolution, random, in training mode but for a batch norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        BasicBlock(4, 4),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(100, 4),
    )
    replace_blocks(model, ["1", "3"], num_experts=experts, top_k=top_k, init="fresh")
    model.train()
    for layer in (model[1], model[3]):  # experts used alike, and routes that an attack can change
        nn.init.normal_(layer.gate.fc.weight, 0, 20)
        model(bright(16))
        layer.gate.fc.bias.data -= layer.routing.logits.detach().mean(0)
    model[2].eval()
    return model


def labelled(model: nn.Module, count: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """Images of which the model gets most right."""
    x = bright(count)
    index = torch.arange(count) * 3
    training = [module.training for module in model.modules()]
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    y[0] = (y[0] + 1) % 4
    return x, y, index


SETTINGS = {"attack": pgd(0.03, 3)}


@pytest.mark.parametrize(("top_k", "experts"), [(1, 3), (2, 3), (3, 3), (1, 1)])
def test_any_number_of_experts(top_k, experts):
    model = network(top_k, experts)
    inputs = labelled(model)
    found = evaluate_moe(model, *inputs, **SETTINGS)
    json.dumps(found, allow_nan=False)
    attacks = ("ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer")
    assert found["sa"] == pytest.approx(12 / 13)
    assert found["union"] <= min(found[name] for name in attacks)
    assert max(found[name] for name in attacks) <= found["sa"]
    assert list(found["layers"]) == ["1", "3"]
    for layer in found["layers"].values():
        assert sum(layer["selected"]["clean"]) == pytest.approx(top_k)
        assert sum(layer["first"]["adversarial"]) == pytest.approx(1)
        classes = layer["expert_by_class"]["adversarial"]
        assert [pytest.approx(top_k) if y in inputs[1] else 0 for y in range(4)] == [sum(row) for row in classes]
        assert len(layer["single_experts"]) == experts
        for name, protocol in layer["protocols"].items():
            assert (protocol is None) == (experts == 1 and name in ("drop_top", "swap", "random"))
        assert layer["protocols"]["clean_route_on_adversarial"]["clean"] == found["sa"]
        if top_k == experts:  # nothing can flip
            assert layer["margin"] is None
            assert all(change == {"routing_change": 0, "route_flips": 0} for change in layer["by_attack"].values())
        else:
            assert layer["margin"]["quantiles"]["0.05"] >= 0
    if top_k < experts:
        flips = {name: change["route_flips"] for name, change in found["layers"]["1"]["by_attack"].items()}
        assert flips["ra_r"] > max(flips["ra"], flips["ra_e"])
    if experts == 1:
        for layer in found["layers"].values():
            (only,) = layer["single_experts"]
            assert only["clean"] == found["sa"]
            assert only["robust"] == pytest.approx(
                found["ra"], abs=1.01 / 13
            )  # run by another kernel: last bits differ


def test_deterministic_and_independent_of_batch_size():
    """In float64, so that no decision hangs on last bits."""
    model = network()
    x, y, index = labelled(model)
    x, model = x.double(), model.double()
    whole = evaluate_moe(model, x, y, index, **SETTINGS)
    assert evaluate_moe(model, x, y, index, **SETTINGS) == whole
    parts = evaluate_moe(model, x, y, index, **SETTINGS, batch_size=4)
    flat, other = json.dumps(whole, sort_keys=True), json.dumps(parts, sort_keys=True)
    numbers = [[float(n) for n in _numbers(json.loads(text))] for text in (flat, other)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-6)
    assert evaluate_moe(model, x, y, index, **SETTINGS, seed=1) != whole


def _numbers(tree: object) -> list[float]:
    if isinstance(tree, dict):
        return [number for key in sorted(tree) for number in _numbers(tree[key])]
    if isinstance(tree, list):
        return [number for item in tree for number in _numbers(item)]
    return [tree] if isinstance(tree, int | float) else []


def test_the_model_stays_as_it_was():
    model = network()
    inputs = labelled(model)
    model[5].weight.requires_grad_(False)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    learnt = [parameter.requires_grad for parameter in model.parameters()]
    records = [layer.routing for layer in moe_layers(model).values()]
    generator = torch.get_rng_state()
    evaluate_moe(model, *inputs, **SETTINGS)
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in model.parameters()] == learnt
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.routing is record for layer, record in zip(moe_layers(model).values(), records, strict=True))
    assert all(layer.reroute is None and layer.fixed_expert is None for layer in moe_layers(model).values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_image_sets_bytes_and_floats_alike():
    model = network()
    x, y, index = labelled(model)
    pixels = (x * 255).round().to(torch.uint8)
    images = ImageSet(pixels, y, tuple("abcd"), "noise")
    expected = evaluate_moe(model, x, y, index, **SETTINGS)
    assert evaluate_moe(model, images, y, index, **SETTINGS) == expected
    assert evaluate_moe(model, pixels, y, index, **SETTINGS) == expected


class Told:
    """What progress was told."""

    def __init__(self) -> None:
        self.stages: list[list] = []  # (title, images, of them done), and the images done after each batch

    @contextmanager
    def __call__(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        self.stages.append([(what, total, done)])
        yield lambda advance=1, note=None: self.stages[-1].append(advance)


def test_progress_names_every_stage():
    model = network()
    told = Told()
    run_moe(model, *labelled(model), **SETTINGS, batch_size=5, task=told)
    stages = 1 + 6 + 1 + 2 * (3 + 3)  # clean, attacks, random points; of two layers three experts and three protocols
    assert [stage[1:] for stage in told.stages] == [[5, 5, 3]] * stages
    titles, totals, done = zip(*(stage[0] for stage in told.stages), strict=True)
    assert (set(totals), set(done)) == ({13}, {0})
    assert [title.partition(":")[0] for title in titles] == [f"moe {at}/{stages}" for at in range(1, stages + 1)]
    assert titles[1] == f"moe 2/{stages}: ra"
    assert len({title.partition(": ")[2] for title in titles}) == stages


def test_progress_of_the_curve():
    told = Told()
    error_curve(linear([-10, 0, 5], [10, 0, -5]), *points(), attack=pgd(0, 1), eps_values=[0.01, "8/255"], task=told)
    assert told.stages == [[("curve 1/2: eps 1/100", 5, 0), 5], [("curve 2/2: eps 8/255", 5, 0), 5]]


# --- gone on with after a kill ------------------------------------------------------------------------------------


def moe_study(model: nn.Module, **settings) -> dict:
    return run_moe(model, *labelled(network()), **SETTINGS, batch_size=5, **settings)[0]


def curve_study(model: nn.Module, **settings) -> dict:
    return error_curve(model, *labelled(network()), **SETTINGS, eps_values=[0.01, 0.03], batch_size=5, **settings)


@pytest.mark.parametrize("study", [moe_study, curve_study])
@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.95])
def test_stopped_anywhere_it_goes_on_and_repeats_one_batch_at_most(tmp_path, study, place):
    model = network()
    whole_model = Counting(model)
    whole = study(whole_model)
    stopped, rest, idle = Counting(model, max(2, int(place * whole_model.calls))), Counting(model), Counting(model)
    with Journal(tmp_path / "a", {}) as journal, pytest.raises(KeyboardInterrupt):
        study(stopped, journal=journal)
    told = Told()
    with Journal(tmp_path / "a", {}) as journal:
        assert study(rest, journal=journal, task=told) == whole
    again = stopped.images + rest.images - whole_model.images - 1  # one image shows the number of classes
    assert 0 <= again <= 5 * 12  # of a batch: look, clean gradient or attack, and imposed routes
    assert sum(done + sum(new) for (_, _, done), *new in told.stages) == 13 * len(told.stages)
    with Journal(tmp_path / "a", {}) as journal:
        assert study(idle, journal=journal) == whole
    assert idle.images == 1


def test_a_journal_keeps_its_seconds(tmp_path):
    journal = Journal(tmp_path / "a", {})
    curve_study(network(), journal=journal)
    assert journal.seconds > 0
    journal.close()
    assert Journal(tmp_path / "a", {}).seconds == journal.seconds


@pytest.mark.parametrize(("study", "stop_at"), [(curve_study, 20), (moe_study, 60)])
def test_a_random_model_draws_the_same_when_resumed(tmp_path, study, stop_at):
    """And what it draws does not show outside."""
    whole = study(Counting(Noisy(network())))
    torch.manual_seed(123)
    stopped = Counting(Noisy(network()), stop_at)
    state = torch.get_rng_state()
    with Journal(tmp_path / "a", {}) as journal, pytest.raises(KeyboardInterrupt):
        study(stopped, journal=journal)
    assert torch.equal(torch.get_rng_state(), state)
    with Journal(tmp_path / "a", {}) as journal:
        assert study(Counting(Noisy(network())), journal=journal) == whole


@pytest.mark.parametrize("study", [moe_study, curve_study])
def test_batches_of_another_model_are_refused(study):
    journal, other = Journal(None, {}), network()
    whole = study(network(), journal=journal)
    assert study(network(), journal=journal) == whole
    moe_layers(other)["1"].renormalize ^= True
    with pytest.raises(ResumeError, match="another's: model: "):
        study(other, journal=journal)


# --- what cannot be evaluated -------------------------------------------------------------------------------------


def test_models_that_it_cannot_evaluate_are_refused():
    inputs = points()
    with pytest.raises(ValueError, match=r"model: expected at least one mixture-of-experts layer \(a dense model has"):
        evaluate_moe(linear([1, 0, 0], [0, 1, 0]), *inputs, **SETTINGS)
    model = two_experts()
    model.fixed_expert = 0
    with pytest.raises(ValueError, match="model layer '': expected its gate to decide, got a fixed expert or imposed"):
        evaluate_moe(model, *inputs, **SETTINGS)
    model.fixed_expert = None
    with rerouted(model, AllExperts()), pytest.raises(ValueError, match="expected its gate to decide"):
        evaluate_moe(model, *inputs, **SETTINGS)


def test_whole_networks_mixed_softly():
    """Two experts an image, on images and returning logits: the shares are those of the model written out."""
    model, x, _ = mixture()
    model = MoELayer(model.gate, model.experts, 2).double().eval()
    with torch.no_grad():
        scores, indices = model.gate(x).softmax(1).topk(2, dim=1)
        outputs = torch.stack([expert(x) for expert in model.experts.networks], 1)
        picked = outputs.gather(1, indices[:, :, None].expand(-1, -1, 5))
        y = (scores[:, :, None] * picked).sum(1).argmax(1)
        alone = outputs.argmax(2) == y[:, None]
    y[0] = (y[0] + 1) % 5
    alone[0] = (outputs.argmax(2) == y[:, None])[0]
    found = evaluate_moe(model, x, y, torch.arange(6), attack=pgd(0.0, 2))
    assert {found[name] for name in ("sa", "ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "union")} == {5 / 6}
    layer = found["layers"]["model"]
    assert [row["clean"] for row in layer["single_experts"]] == pytest.approx(alone.double().mean(0).tolist())
    first = torch.nn.functional.one_hot(indices[:, 0], 3).double().mean(0)
    assert layer["first"]["clean"] == pytest.approx(first.tolist())
    attacked = evaluate_moe(model, x, y, torch.arange(6), attack=pgd(0.5, 5))
    assert attacked["ra"] < 5 / 6
    assert attacked["union"] <= min(attacked[name] for name in ("ra", "ra_e", "ra_r", "joint", "transfer"))


@pytest.mark.parametrize("count", [1, 13])
def test_one_image_and_the_last_batch_of_one(count):
    model = network()
    inputs = [tensor[:count] for tensor in labelled(model)]
    whole = evaluate_moe(model.double(), inputs[0].double(), *inputs[1:], **SETTINGS)
    ones = evaluate_moe(model, inputs[0].double(), *inputs[1:], **SETTINGS, batch_size=1 if count == 1 else 12)
    assert (ones["sa"], ones["ra"], ones["union"]) == (whole["sa"], whole["ra"], whole["union"])


def test_nan_stops_the_evaluation():
    model = two_experts()
    model.experts.networks[1][1].bias.data.fill_(torch.nan)  # one point of five is sent there
    with pytest.raises(FloatingPointError, match=r"model: .* NaN or infinity for 1 image\(s\); a NaN never counts"):
        evaluate_moe(model, *points(), **SETTINGS)


@pytest.mark.parametrize("function", [evaluate_moe, error_curve])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, i: (x[:0], y[:0], i[:0]), "images: expected at least one image to evaluate on, got an empty set"),
        (lambda x, y, i: (x[0], y, i), "images: expected shape [n, C, H, W], got shape [1, 1, 2]"),
        (
            lambda x, y, i: (255 * x, y, i),
            "images: expected finite pixels in [0, 1], got values from 25.5 to 229.5; divide them by 255, or give them "
            "as uint8",
        ),
        (lambda x, y, i: (x, y + 1, i), "labels: expected 0..1, as many as logits, got 2..2"),
        (lambda x, y, i: (x, y[:4], i), "labels: expected int64 of shape [5], got torch.int64 of shape [4]"),
        (lambda x, y, i: (x, y, i.int()), "index: expected int64 of shape [5], got torch.int32 of shape [5]"),
    ],
)
def test_bad_inputs(function, change, message):
    with pytest.raises(ValueError) as error:
        function(two_experts(), *change(*points()), attack=pgd(0.1, 20))
    assert str(error.value) == message


# --- error against the radius -------------------------------------------------------------------------------------


def test_the_curve_of_a_linear_model():
    """A point is robust as long as the radius is below its distance from the boundary."""
    model = linear([-10, 0, 5], [10, 0, -5])
    distances = torch.tensor([0.01, 0.03, 0.05, 0.07, -0.02])  # the last on the wrong side
    x = torch.stack([0.5 + distances, torch.full((5,), 0.3)], 1).view(-1, 1, 1, 2)
    y, index = torch.ones(5, dtype=torch.int64), torch.arange(5)
    found = error_curve(model, x, y, index, attack=pgd(0, 5))
    assert found["eps"] == pytest.approx([level / 255 for level in range(1, 21)])
    assert found["robust"] == [(distances > eps).double().mean().item() for eps in found["eps"]]
    assert found["attack"]["steps"] == 5
    few = error_curve(model, x, y, index, attack=pgd(0, 5), eps_values=["0", "4/255", 0.06], batch_size=2)
    assert few["robust"] == [0.8, 0.6, 0.2]


def test_the_curve_of_a_mixture_is_its_attack_at_each_radius():
    model = network()
    inputs = labelled(model)
    curve = error_curve(model, *inputs, attack=pgd(0, 3), eps_values=[0.01, 0.03], seed=2)
    expected = [evaluate_moe(model, *inputs, attack=pgd(eps, 3), seed=2)["ra"] for eps in (0.01, 0.03)]
    assert curve["robust"] == expected


@pytest.mark.parametrize(
    ("eps", "last"),
    [("8/255", Fraction(20, 255)), ("20/255", Fraction(20, 255)), (0.1, Fraction(1, 10)), ("0.5", Fraction(1, 2))],
)
def test_the_radii_of_a_curve_reach_20_255_and_the_attacks_own(eps, last):
    radii = curve_radii(eps)
    assert radii == tuple(last * level / 20 for level in range(1, 21))
    assert curve_radii("8/255") == curve_radii() == tuple(Fraction(level, 255) for level in range(1, 21))


def test_models_of_other_numbers_of_experts_have_all_attacks_in_common():
    """Settings of the user's make an attack another one; what follows from the model does not."""

    def attacks(experts: int, steps: int = 1) -> dict[str, dict]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        replace_blocks(model, "0", num_experts=experts, top_k=1)
        _, stages = run_moe(
            model, torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), torch.arange(2), attack=pgd(0.1, steps)
        )
        return {stage.stage.name: describe_attack(stage.stage.attack) for stage in stages}

    three = attacks(3)
    assert three["ra_r_targeted"]["routes"] is None
    assert three == attacks(2)
    again = attacks(3, steps=2)
    assert all(again[name] != settings for name, settings in three.items())
