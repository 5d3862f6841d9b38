"""V-MoE's curve against its definition, step by step and token by token."""

import json
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from token_models import labelled, token_model

from robust_moe.attacks import PGD
from robust_moe.evaluation import Journal, PresetEvaluation, ResumeError, vmoe_curve
from robust_moe_kernels.modules import AllExperts, moe_layers, rerouted

INDEX = torch.arange(6)


def by_hand(model, x, y, eps, steps):
    """The attacked images of the released code: no start, steps of eps / m along the sign; kept in [0, 1]."""
    attacked = x
    for _ in range(steps):
        at = attacked.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)
        attacked = (attacked + eps / steps * gradient.sign()).clamp(0, 1)
    return attacked


def experts(model, x):
    """By layer, the set of experts of each token of each image."""
    with torch.no_grad():
        logits = model(x)
    layers = [layer.routing.indices.view(len(x), 9, -1).tolist() for layer in moe_layers(model).values()]
    return logits, [[[set(token) for token in image] for image in layer] for layer in layers]


def test_every_number_by_hand():
    model = token_model(layers=2)
    x, y = labelled(model)
    found = vmoe_curve(model, x, y, INDEX, eps_values=["4/255", "16/255"], steps=5)
    json.dumps(found, allow_nan=False)
    logits, before = experts(model, x)
    assert found["clean"]["error"] == pytest.approx(1 / 6)
    assert found["clean"]["loss"] == pytest.approx(F.cross_entropy(logits.float(), y).item())
    for number, eps in enumerate((4 / 255, 16 / 255)):
        attacked, after = experts(model, by_hand(model, x, y, eps, 5))
        assert found["error"][number] == pytest.approx((attacked.argmax(1) != y).double().mean().item())
        assert found["loss"][number] == pytest.approx(F.cross_entropy(attacked.float(), y).item(), rel=1e-5)
        assert found["changed"][number] == pytest.approx(
            (attacked.argmax(1) != logits.argmax(1)).double().mean().item()
        )
        for name, one, two in zip(found["layers"], before, after, strict=True):
            overlap = [
                len(a & b) / len(a | b) for p, q in zip(one, two, strict=True) for a, b in zip(p, q, strict=True)
            ]
            change = found["layers"][name]["routing_change"][number]
            assert change == pytest.approx(1 - sum(overlap) / len(overlap))
            assert change > 0
    assert found["loss"][1] > found["loss"][0] > found["clean"]["loss"]
    assert found["attack"]["alpha"] == "eps / 5"


def test_twenty_radii_and_forty_steps_unless_told_otherwise(monkeypatch):
    made = []

    def attack(eps, steps, seed):
        made.append((eps, steps))
        return PGD(float(eps), 0, random_start=False)

    monkeypatch.setattr("robust_moe.evaluation.vmoe._attack", attack)
    model = token_model(layers=1)
    found = vmoe_curve(model, *labelled(model), INDEX)
    assert made == [(Fraction(level, 255), 40) for level in range(1, 21)]
    assert found["eps"] == pytest.approx([level / 255 for level in range(1, 21)])
    assert found["changed"] == [0.0] * 20
    assert found["error"] == [found["clean"]["error"]] * 20


def test_batches_do_not_matter_and_the_model_is_left_as_found():
    model = token_model(layers=1)
    x, y = labelled(model)
    record = model.layers[0].routing
    model.train()
    settings = {"eps_values": ["8/255"], "steps": 3}
    whole = vmoe_curve(model, x, y, INDEX, **settings)
    parts = vmoe_curve(model, x, y, INDEX, **settings, batch_size=4)
    assert parts["layers"]["layers.0"] == whole["layers"]["layers.0"]
    assert parts["loss"] == pytest.approx(whole["loss"])
    assert model.training
    assert record is not None
    with rerouted(model, AllExperts()):
        dense = vmoe_curve(model, x, y, INDEX, **settings)
    assert dense["layers"]["layers.0"]["routing_change"] == [0.0]


def test_a_dense_model_has_no_layers_and_a_journal_is_of_one_curve(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 5)).double()
    x, y = labelled(model)
    with Journal(tmp_path / "a.journal", {}) as journal:
        found = vmoe_curve(model, x, y, INDEX, eps_values=["2/255"], steps=3, journal=journal)
        assert found["layers"] == {}
        again = vmoe_curve(model, x, y, INDEX, eps_values=["2/255"], steps=3, journal=journal)
        assert again == found
        with pytest.raises(ResumeError, match="steps"):
            vmoe_curve(model, x, y, INDEX, eps_values=["2/255"], steps=4, journal=journal)


def test_the_preset(tmp_path, monkeypatch):
    """Of float32 images, with figures and a report."""
    monkeypatch.setattr("robust_moe.evaluation.vmoe.curve_radii", lambda: (Fraction(1, 255), Fraction(2, 255)))
    model = token_model(layers=1).float()
    x, y = labelled(token_model(layers=1))
    facts = {
        "model": {"name": "tokens"},
        "data": {"name": "noise", "split": "test"},
        "settings": {"checkpoint": "best.pt"},
    }
    run = PresetEvaluation(
        *(model, x.float(), y, INDEX), attack=PGD.Config(eps="2/255", steps=1), preset="vmoe", facts=facts
    )
    found = run.complete(tmp_path / "found.json", tmp_path / "found.html")
    assert len(found["curve"]["error"]) == 2
    assert found["moe"] is None
    assert "monotone_curve" in {flag["name"] for flag in found["flags"]}
    page = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert "changed predictions" in page
    assert "routing change, layers.0" in page


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, r"steps: expected a count >= 1, got 0"),
        ({"steps": 1.5}, r"steps: expected a count >= 1, got 1\.5"),
        ({"eps_values": ["1/255", 0]}, r"eps_values: expected radii > 0, got 0"),
        ({"eps_values": ["-1/255"]}, r"eps_values: expected radii > 0, got -1/255"),
    ],
)
def test_bad_radii_and_steps_are_said(settings, said):
    model = token_model(layers=1)
    with pytest.raises(ValueError, match=said):
        vmoe_curve(model, *labelled(model), INDEX, **settings)
