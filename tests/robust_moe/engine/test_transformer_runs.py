"""Whole runs of vision transformers that route tokens: every method, mixed precision, averages, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import TOKENS, assert_same_run

from robust_moe.attacks import APGD, FAB, AutoAttack, Square
from robust_moe.engine import Reporter, Trainer, load_checkpoint, read_metrics
from robust_moe.engine.experiment import make_model
from robust_moe.methods import METHODS
from robust_moe_kernels.modules import moe_layers

LAYER = "network.blocks.1.mlp"
ADAM = ("optim.name=adam", "optim.lr=0.003", "optim.weight_decay=0")
# every layer gets what the one before has made of a token
LINKED = (
    "model.moe.layers=[blocks.0.mlp,blocks.1.mlp]",
    "model.moe.gate=adaptive_clustering",
    "model.moe.momentum=0.7",
)
# V-MoE's router, its noise among what a resumed run has to draw again; experts that drop tokens
VMOE = ("model.moe.noise=vmoe", "model.moe.noise_std=1", "model.moe.renormalize=false", "model.moe.balance=vmoe")
DATA = {"name": "x", "class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.5], "std": [0.3]}


def fit(config, **options):
    trainer = Trainer(config, Reporter(enabled=False))
    return trainer, trainer.fit(**options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_in_bfloat16_with_averages_and_perturbed_weights(tiny, name):
    dual = ("model.dual.enabled=true", "model.dual.experts=true") if name == "jtdmoe" else ()
    settings = ("run.precision=bf16-mixed", "run.ema_decay=0.5", "method.awp_gamma=0.005", "run.max_steps=2", *ADAM)
    config = tiny(*TOKENS, f"method.name={name}", *dual, *settings)
    torch.manual_seed(config.run.seed)
    trainer, outcome = fit(config)
    assert outcome.finished and outcome.steps == 2
    state = load_checkpoint(outcome.folder / "last.pt")
    average = state["ema"]["model"]
    assert state["model"].keys() == average.keys()
    moved = [key for key, value in state["model"].items() if not torch.equal(value, average[key])]
    layers = list(moe_layers(trainer.model))
    assert layers == ([f"{half}.{LAYER}" for half in ("standard", "robust")] if dual else [LAYER])
    for layer in layers:
        assert f"{layer}.gate.fc.weight" in moved  # the balance loss moves it in any case
        assert sum(key.startswith(f"{layer}.experts.") for key in moved) >= 2 * 4  # top_k experts of four tensors each
    for value in state["model"].values():
        assert value.dtype == torch.float32 and value.isfinite().all()


@pytest.mark.parametrize(
    "more",
    [
        (*VMOE, "run.precision=bf16-mixed"),
        ("model.moe.capacity=0.5", "run.precision=32-true", "method.name=trades", "run.ema_decay=0.5"),
        ("model.moe.choice=expert", "run.precision=32-true", "method.name=robust_gate", "method.awp_gamma=0.01"),
        (*LINKED, "run.precision=bf16-mixed", "method.name=robust_gate", "run.ema_decay=0.5"),
        (*LINKED, "run.precision=32-true", "method.name=prc"),
    ],
    ids=["noise", "capacity", "expert choice", "linked, gates taught", "linked, consistent"],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tiny, monkeypatch, tmp_path: Path, more):
    settings = (*TOKENS, *ADAM, *more, "data.augment.flip=true", "run.checkpoint_steps=3")
    fit(tiny(*settings, out="whole"))
    step = Trainer._step

    def killed(self, batch):
        if self.state.step == 5:  # in the second epoch
            raise KeyboardInterrupt
        step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_step", killed)
        fit(tiny(*settings, out="killed"))
    assert load_checkpoint(tmp_path / "killed" / "last.pt")["position"]["step"] < 5
    assert fit(tiny(*settings, out="killed"))[1].finished
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_learns_and_says_where_tokens_go(tiny):
    settings = ("method.name=standard", "data.train_limit=400", "run.epochs=10", "data.validation_fraction=0.1")
    _, outcome = fit(tiny(*TOKENS, *ADAM, *settings, "model.width=16", "eval.every=10"))
    epochs = read_metrics(outcome.folder, "epoch")
    assert epochs[-1]["train_task_loss"] < 0.7 * epochs[0]["train_task_loss"]
    assert epochs[-1]["val_clean"] > 0.35  # chance is 0.1
    lines = read_metrics(outcome.folder, "routing")
    assert {line["layer"] for line in lines} == {LAYER}
    for line in lines:
        assert sum(line["selected"]) == pytest.approx(2)  # top_k
        assert sum(line["first"]) == pytest.approx(1)


def test_an_upcycled_run_starts_where_the_dense_one_ended(tiny, tmp_path: Path):
    dense = (*TOKENS, *ADAM, "model.moe.layers=[]", "method.name=standard", "data.validation_fraction=0.2")
    _, before = fit(tiny(*dense, out="dense"))
    still = ("optim.lr=1e-12", "model.moe.init=copy", f"model.init_from={tmp_path / 'dense' / 'last.pt'}")
    _, after = fit(tiny(*TOKENS, *dense[len(TOKENS) :], "model.moe.layers=[blocks.1.mlp]", *still, out="routed"))
    last, first = read_metrics(before.folder, "epoch")[-1], read_metrics(after.folder, "epoch")[0]
    assert (first["val_clean"], first["val_robust"]) == (last["val_clean"], last["val_robust"])


def test_autoattack_does_not_depend_on_the_batch(tiny):
    """All four of its attacks, on a model in float64; capacity would make a token's fate depend on its batch."""
    torch.manual_seed(0)
    model = make_model(tiny(*TOKENS), DATA).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # logits that an attack can change
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10  # wrong from the start
    eps, found = 0.02, []
    for size in (6, 4):
        attacks = [
            APGD(eps, 3),
            APGD(eps, 2, loss="dlr-targeted", n_targets=2),
            FAB(eps, 2, n_targets=2, targeted=True),
        ]
        attack = AutoAttack(eps, version="custom", attacks=[*attacks, Square(eps, 20)], batch_size=size)
        found.append(attack(model, x, y, torch.arange(6)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    images = found[0]
    assert torch.equal(images[0], x[0])
    assert (images - x).abs().max() <= eps + 1e-12 and images.min() >= 0 and images.max() <= 1
    changed = (images != x).flatten(1).any(1)
    assert 0 < changed.sum() < 5
    assert (model(images).argmax(1) != y)[changed].all()  # an image that withstands comes back as it was
    assert not model.training and all(layer.reroute is None for layer in moe_layers(model).values())


def test_every_setting_of_the_experts_reaches_the_layer(tiny):
    """Each differs from its default, so that one that is not passed on shows."""
    settings = {"num_experts": 5, "top_k": 3, "renormalize": False, "straight_through": False, "noise_std": 0.5}
    settings |= {"noise": "vmoe", "capacity": 1.25, "priority": "vanilla", "choice": "expert"}
    given = [f"model.moe.{name}={str(value).lower()}" for name, value in settings.items()]
    (layer,) = moe_layers(make_model(tiny(*TOKENS, *given), DATA)).values()
    assert {name: getattr(layer, name) for name in settings} == settings
