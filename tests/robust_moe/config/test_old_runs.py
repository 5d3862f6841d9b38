"""A run folder of checkpoint format 1, as version 0.1.0 left it, is read, evaluated and gone on with.

``old_run`` holds a TRADES run of three epochs on digits (seed 0, CPU): ``best.pt`` after the second epoch, ``ended.pt``
after the third (its ``last.pt``), and ``results.json``, 40 test images under PGD.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from robust_moe.config import ConfigError, config_from_dict
from robust_moe.config.legacy import modernised
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.checkpoint import load_checkpoint
from robust_moe.evaluation import read_results
from robust_moe.models import ROUTERS, MixtureConfig, ModelConfig, ResNet50Config, ResNetSmallConfig
from robust_moe.optim import SGD, AdamW, Cyclic, MultiStep, OneCycle
from robust_moe.report import assess
from robust_moe.settings import plain
from robust_moe.weights import stacked_name

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the run as it was after two epochs."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("best.pt", "config.yaml", "metrics.jsonl"):
        shutil.copy(OLD / name, folder / name)
    return folder


def test_its_settings_mean_what_they_meant():
    config = config_from_dict(load_checkpoint(OLD / "best.pt")["config"])
    assert (config.method.name, config.method.beta, config.method.attack.steps) == ("trades", 5.0, 2)
    assert (float(config.method.attack.eps), config.method.attack.alpha) == (0.1, None)
    assert (config.model.width, config.model.blocks, config.model.moe.layers) == (2, (1, 2), ("layer2.1",))
    assert (config.data.image_size, config.data.train_limit, config.run.ema_decay) == (8, 64, 0.9)
    assert str(config.eval.attack.eps) == "8/255"
    assert config.optim == SGD.Config(lr=0.1, schedule=OneCycle.Config(lr_min=0.01))


def test_an_old_optimiser_had_the_settings_of_all():
    union = {"name": "adamw", "lr": 0.2, "momentum": 0.9, "nesterov": True, "grad_clip": 1.0, "schedule": "cyclic"}
    union |= {"power": 2.0, "milestones": [0.5], "lr_min": 0.1, "cycle_epochs": 3.0, "rise": 0.3, "fall": "linear"}
    adamw = AdamW.Config(lr=0.2, grad_clip=1, schedule=Cyclic.Config(lr_min=0.1, cycle_epochs=3))
    assert config_from_dict(modernised({"optim": union})).optim == adamw
    steps = modernised({"optim": {**union, "name": "sgd", "schedule": "multistep", "momentum": 0.5}})
    sgd = SGD.Config(lr=0.2, momentum=0.5, grad_clip=1, schedule=MultiStep.Config(milestones=[0.5]))
    assert config_from_dict(steps).optim == sgd
    assert config_from_dict(modernised({"optim": {}})).optim == SGD.Config()  # older than every setting
    with pytest.raises(ConfigError, match=r"unknown key 'optim.momentun' of optimiser 'sgd'"):
        config_from_dict(modernised({"optim": {"momentun": 0.5}}))
    with pytest.raises(ConfigError, match=r"optim.name: expected one of .* got 'lion'"):
        config_from_dict(modernised({"optim": {**union, "name": "lion"}}))


@pytest.mark.parametrize(
    ("balance", "weight", "expected"),
    [
        ("kl", 0.25, {"name": "kl", "weight": 0.25}),
        ("none", 0.5, {"name": "none"}),
        ("z", 0.0, {"name": "z", "weight": 0}),
    ],
)
def test_the_balance_loss_of_an_old_model(balance: str, weight: float, expected: dict[str, Any]):
    tree = torch.load(OLD / "best.pt", weights_only=True)["config"]
    tree["model"]["moe"] |= {"balance": balance, "balance_weight": weight}
    assert plain(config_from_dict(modernised(tree)).model.moe.balance) == expected


@pytest.mark.parametrize(
    ("standard", "expected"),
    [
        ({}, ResNetSmallConfig(width=4, blocks=[1, 2])),
        ({"width": 6}, ResNetSmallConfig(width=6, blocks=[1, 2])),
        ({"init_from": "a.pt"}, ResNetSmallConfig(width=4, blocks=[1, 2], init_from="a.pt")),
        ({"name": "resnet50"}, ResNet50Config()),
        ({"name": "resnet_small", "blocks": [3]}, ResNetSmallConfig(blocks=[3])),
        (
            {"experts": True, "width": 6},
            ResNetSmallConfig(width=6, blocks=[1, 2], mixture=MixtureConfig(num_experts=3, router=ROUTERS["linear"]())),
        ),
    ],
)
def test_the_standard_half_of_an_old_dual_model(standard: dict[str, Any], expected: ModelConfig):
    """What it did not say was as in ``model``; with a name of its own width and depth were that network's."""
    fresh = {"name": None, "width": None, "blocks": None, "experts": False, "init_from": None}
    tree = torch.load(OLD / "best.pt", weights_only=True)["config"]
    tree["model"] |= {"width": 4, "init_from": "robust.pt"}
    tree["model"]["moe"] |= {"layers": []}
    tree["model"]["mixture"] |= {"num_experts": 3, "router": "linear"}
    tree["model"]["dual"] |= {"enabled": True, "standard": fresh | standard}
    assert config_from_dict(modernised(tree)).model.standard() == expected


def test_it_goes_on_to_where_it_ended(run: Path):
    config = config_from_dict(load_checkpoint(run / "best.pt")["config"], [f"run.out={run}"])
    assert Trainer(config, Reporter()).fit(resume=True).finished
    now, then = load_checkpoint(run / "last.pt"), load_checkpoint(OLD / "ended.pt")
    assert now["position"] == then["position"] == {"epoch": 3, "batch": 0, "step": 12}
    for name, value in now["model"].items():  # equal but for the order of sums, which is the machine's
        stack, expert = stacked_name(name)  # then the experts of a layer were one tensor
        before = then["model"][stack]
        torch.testing.assert_close(value, before if expert is None else before[expert], rtol=1e-3, atol=1e-5)


def test_its_evaluation_gives_its_results(run: Path):
    results, _ = assess(run, run / "again.json")
    before = json.loads((OLD / "results.json").read_text())
    for name in ("count", "clean", "robust"):
        assert results[name] == pytest.approx(before[name], abs=1 / before["count"])
    assert read_results(OLD / "results.json")["robust"] == before["robust"]


def test_an_old_fgsm_stays_the_step_that_it_was():
    """It had no step size and no random start of its own, whatever the section said."""
    tree = modernised({"eval": {"attack": {"name": "fgsm", "eps": "8/255", "alpha": "2/255", "random_start": True}}})
    attack = config_from_dict(tree).eval.attack.build()
    assert (attack.alpha, attack.random_start) == (8 / 255, False)
