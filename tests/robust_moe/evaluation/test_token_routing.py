"""The evaluation of models that route tokens: metrics against loops over images and tokens, and what always holds."""

import json

import pytest
import torch
from token_models import CLASSES, images, labelled, token_model

from robust_moe.attacks import PGD
from robust_moe.data import ImageSet, PoisonConfig
from robust_moe.evaluation import backdoor_report, evaluate_moe, routing_shares
from robust_moe.evaluation.html_report.moe import moe_sections
from robust_moe.evaluation.routing_measures import (
    by_class,
    change_numbers,
    disagreement,
    expert_use,
    flipped,
    routes,
    routing_change,
    top_k_margin,
)
from robust_moe.evaluation.sanity import probe_flags
from robust_moe_kernels.modules import DropTop, RandomRoutes, SwapTop, moe_layers, rerouted

ATTACK = {"attack": PGD.Config(eps=0.05, steps=3)}
E, T = 4, 9


def sets(*rows):
    """Bool [1, T, E] of tokens given by their experts."""
    found = torch.zeros(1, len(rows), E, dtype=torch.bool)
    for token, experts in enumerate(rows):
        found[0, token, list(experts)] = True
    return found


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ("01", "01", 0.0),
        ("01", "02", 2 / 3),
        ("01", "23", 1.0),
        ("0", "1", 1.0),
        ("01", "0", 0.5),  # an expert without room for it any more
        ("", "1", 1.0),
        ("", "", 0.0),  # V-MoE's code counts 1
    ],
)
def test_the_change_of_a_tokens_experts(before, after, change):
    first, second = (sets(map(int, each), (0, 1)) for each in (before, after))
    assert routing_change(first, second).tolist() == [[pytest.approx(change), 0.0]]
    assert flipped(first, second).tolist() == [change > 0]
    numbers = {"routing_change": pytest.approx(change / 2), "route_flips": float(change > 0)}
    assert change_numbers(first, second) == {**numbers, "token_flips": 0.5 * (change > 0)}


def test_what_a_forward_shows_is_of_tokens():
    model = token_model(layers=1)
    x, y = labelled(model)
    found = routes(moe_layers(model))
    record = model.layers[0].routing
    indices = record.indices.view(len(x), T, 2)
    assert torch.equal(found["first/layers.0"], indices[:, :, 0])
    for b in range(len(x)):
        for t in range(T):
            assert found["sets/layers.0"][b, t].nonzero()[:, 0].tolist() == sorted(indices[b, t].tolist())
    use = expert_use(found["sets/layers.0"], found["first/layers.0"])
    for e in range(E):
        assert use.selected[e] == pytest.approx((indices == e).any(2).double().mean().item())
        assert use.first[e] == pytest.approx((indices[:, :, 0] == e).double().mean().item())
    assert sum(use.selected) == pytest.approx(2)
    table = by_class(found["sets/layers.0"], y, CLASSES)
    for c in range(CLASSES):
        of_class = found["sets/layers.0"][y == c].double()
        assert table[c] == (pytest.approx(of_class.mean((0, 1)).tolist()) if len(of_class) else [0.0] * E)
    logits = record.logits.view(len(x), T, E)
    top = logits.sort(dim=2, descending=True).values
    torch.testing.assert_close(top_k_margin(logits, 2), (top[:, :, 1] - top[:, :, 2]).flatten())


@pytest.mark.parametrize("options", [{"capacity": 0.25}, {"choice": "expert", "capacity": 0.5}])
def test_an_expert_without_room_is_not_selected(options):
    model = token_model(layers=1, **options)
    model(images())
    found, record = routes(moe_layers(model)), model.layers[0].routing
    taken = [[e for e, out in zip(*row, strict=True) if not out]
             for row in zip(record.indices.tolist(), record.dropped.tolist(), strict=True)]  # fmt: skip
    assert [] in taken
    assert found["first/layers.0"].flatten().tolist() == [row[0] if row else E for row in taken]
    got = found["sets/layers.0"].flatten(0, 1)
    assert [row.nonzero()[:, 0].tolist() for row in got] == [sorted(row) for row in taken]
    use = expert_use(found["sets/layers.0"], found["first/layers.0"])
    assert sum(use.first) < 1
    assert sum(use.first) == pytest.approx(sum(map(bool, taken)) / len(taken))
    assert sum(use.selected) == pytest.approx(sum(map(len, taken)) / len(taken))


@pytest.mark.parametrize("top", [None, 2])
def test_disagreement_is_the_mean_of_an_images_tokens(top):
    model = token_model(layers=1)
    x, _ = labelled(model)
    layer, inputs = model.layers[0], []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(x)
    handle.remove()
    expected = []
    for b in range(len(x)):
        of_tokens = []
        for t in range(T):
            row = inputs[0][b, t]
            scores = layer.gate(row).softmax(0)
            best = scores.topk(top or E)
            weights = best.values / best.values.sum()
            outputs = torch.stack([layer.experts.networks[e](row) for e in best.indices])
            mean = weights @ outputs
            of_tokens.append((weights @ (outputs - mean).square().sum(1)).sqrt() / mean.norm())
        expected.append(torch.stack(of_tokens).mean())
    torch.testing.assert_close(disagreement(layer, inputs[0], layer.routing, top), torch.stack(expected))


def test_random_routes_are_of_the_sample_and_of_each_token():
    model = token_model(layers=1)
    x = images(6)
    index = torch.tensor([40, 3, 7, 8, 9, 10])

    def drawn(at, **settings):
        with rerouted(model, RandomRoutes(index[at], **settings)):
            model(x[at])
        return model.layers[0].routing.indices.view(len(at), T, 2)

    whole = drawn(torch.arange(6), seed=1)
    assert torch.equal(drawn(torch.tensor([4, 1]), seed=1), whole[[4, 1]])
    assert not torch.equal(drawn(torch.arange(6), seed=2), whole)
    assert (whole[:, :, 0] != whole[:, :, 1]).all()
    assert len({tuple(row) for row in whole[0].tolist()}) > 1  # not one draw for all tokens of an image
    many = torch.cat([drawn(torch.arange(6), seed=seed).flatten() for seed in range(40)]).bincount(minlength=E)
    assert ((many.double() / many.sum() - 1 / E).abs() < 0.03).all()
    with rerouted(model, RandomRoutes(index)), pytest.raises(ValueError, match="sample_index: expected a number of"):
        model(x[:5])


def test_all_numbers_of_an_evaluation():
    model = token_model(layers=2)
    x, y = labelled(model, 8)
    index = torch.arange(8) + 5
    found = evaluate_moe(model, x, y, index, **ATTACK, seed=1)
    json.dumps(found, allow_nan=False)
    attacked = ATTACK["attack"].build(seed=1)(model, x, y, index)

    def seen(at):
        with torch.no_grad():
            right = model(at).argmax(1) == y
        return right, {name: value.clone() for name, value in routes(moe_layers(model)).items()}

    (right, before), (still, after) = seen(x), seen(attacked)
    assert found["sa"] == pytest.approx(right.double().mean().item())
    assert found["ra"] == pytest.approx((right & still).double().mean().item())
    assert found["union"] <= min(found[name] for name in ("ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer"))
    for number, (name, layer) in enumerate(found["layers"].items()):
        assert layer["tokens"] == T
        moved = before[f"sets/{name}"] != after[f"sets/{name}"]
        assert layer["token_flips"] == pytest.approx(moved.any(2).double().mean().item())
        assert layer["route_flips"] == pytest.approx(moved.any(2).any(1).double().mean().item())
        assert layer["token_flips"] < layer["route_flips"]
        assert layer["by_attack"]["ra_r"]["token_flips"] > layer["by_attack"]["ra_e"]["token_flips"]
        for protocol, imposed in (
            ("drop_top", DropTop()),
            ("swap", SwapTop()),
            ("random", RandomRoutes(index, 1, number)),
        ):
            with rerouted(model, {name: imposed}):
                clean = seen(x)[0]
                robust = clean & seen(ATTACK["attack"].build(seed=1)(model, x, y, index))[0]
            shares = {"clean": clean.double().mean().item(), "robust": robust.double().mean().item()}
            assert layer["protocols"][protocol] == pytest.approx(shares)
        assert layer["margin"]["quantiles"]["0.05"] >= 0
    parts = evaluate_moe(model, x, y, index, **ATTACK, seed=1, batch_size=3)
    for attack, changes in found["layers"]["layers.1"]["by_attack"].items():
        assert parts["layers"]["layers.1"]["by_attack"][attack] == pytest.approx(changes)


def test_clean_routes_on_attacked_images_and_the_reverse():
    model = token_model(layers=1)
    x, y = labelled(model, 8)
    index = torch.arange(8)
    found = evaluate_moe(model, x, y, index, **ATTACK)["layers"]["layers.0"]["protocols"]
    attacked = ATTACK["attack"].build(seed=0)(model, x, y, index)

    def along(at, other):
        """The network on one image, token by token on the other's routes and weights."""
        with torch.no_grad():
            model(other)
            record = model.layers[0].routing
            tokens = model.patches(at).flatten(2).transpose(1, 2)
            inputs = (tokens + tokens.mean(1, keepdim=True)).flatten(0, 1)
            rows = [sum(w * model.layers[0].experts.networks[e](inputs[n]) for e, w in zip(*pair, strict=True))
                    for n, pair in enumerate(zip(record.indices, record.weights, strict=True))]  # fmt: skip
            return model.head((tokens + torch.stack(rows).view_as(tokens)).mean(1)).argmax(1) == y

    with torch.no_grad():
        right = model(x).argmax(1) == y
    kept, carried = right & along(attacked, x), along(x, attacked)
    assert found["clean_route_on_adversarial"]["robust"] == pytest.approx(kept.double().mean().item())
    assert found["adversarial_route_on_clean"]["clean"] == pytest.approx(carried.double().mean().item())


@pytest.mark.parametrize("options", [{}, {"capacity": 0.5}])
def test_a_capacity_that_binds_is_flagged(options):
    """An image's logits depend on the others of its batch then."""
    model = token_model(layers=1, **options)
    x, y = labelled(model)
    flags = {flag.name: flag.raised for flag in probe_flags(model, x, y, 0.02, "Linf")}
    assert flags["batch_dependent"] == bool(options)
    assert not flags["randomised_output"]


def test_shares_while_training_are_of_tokens():
    model = token_model(layers=1).float()
    pixels = (images(6) * 255).round().to(torch.uint8)
    data = ImageSet(pixels, torch.arange(6) % CLASSES, tuple("abcde"), "noise")
    found = routing_shares(model, data, batch_size=4)["layers.0"]
    model(pixels.float() / 255)
    first = model.layers[0].routing.indices[:, 0]
    assert found.first == pytest.approx((first.bincount(minlength=E).double() / len(first)).tolist())


def test_a_backdoor_is_reported_by_the_expert_of_most_tokens():
    model = token_model(layers=1)
    x, y = labelled(model, 12)
    report = backdoor_report(model, x, y, PoisonConfig(target=1, size=2), batch_size=5)["layers"]["layers.0"]
    assert 0 < report["token_flips"] < 1
    assert len(report["asr_by_first"]) == E
    assert sum(share is not None for share in report["asr_by_first"]) >= 1


def test_the_report_names_tokens():
    model = token_model(layers=1)
    x, y = labelled(model)
    moe = evaluate_moe(model, x, y, torch.arange(len(x)), **ATTACK)
    for key in ("sa", "ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer", "union"):
        moe.setdefault(f"{key}_interval", [0.0, 1.0])
    text = str(list(moe_sections({"moe": moe, "routing": {}, "data": {}})))
    assert "tokens of an image" in text
    assert "token flips" in text
