"""From a configuration to a model: weights from earlier runs, and the data that a configuration is for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from robust_moe.config import (
    ConfigError,
    TrainConfig,
    load_config,
)
from robust_moe.data import DataError, image_set, load_splits
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint, save_checkpoint
from robust_moe.engine.experiment import describe_data, load_experiment, make_model
from robust_moe.models import ROUTERS, DualConfig, MixtureConfig, MoEConfig, ResNetSmallConfig
from robust_moe.report import assess
from robust_moe.settings import plain, replaced

DATA = {"name": "some", "class_names": list("0123456789"), "channels": 1, "image_size": 16, "mean": [0.3], "std": [0.5]}
MIXTURE = MixtureConfig(num_experts=2, routing="hard", router=ROUTERS["linear"]())


def small(**model) -> ResNetSmallConfig:
    return ResNetSmallConfig(**{"width": 2, "blocks": [1, 1], **model})


def config(**model) -> TrainConfig:
    return TrainConfig(model=small(**model))


# --- weights from earlier runs ------------------------------------------------------------------------------------


def saved(path: Path, trained: TrainConfig, data: dict = DATA) -> nn.Module:
    """A model whose every number differs from a fresh one's, in a checkpoint."""
    model = make_model(trained, data)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    save_checkpoint({"config": {}, "data": data, "position": {}, "model": model.state_dict()}, path)
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    mine, other = first.state_dict(), second.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_warm_start_of_a_plain_model(tmp_path: Path):
    plain = config(moe=MoEConfig(layers=["layer2.0"]))
    trained = saved(tmp_path / "run" / "best.pt", plain)
    from_run = dataclasses.replace(plain.model, init_from=str(tmp_path / "run"))
    assert same(make_model(TrainConfig(model=from_run), DATA), trained)
    assert not same(make_model(TrainConfig(model=from_run), DATA, warm_start=False), trained)


def test_warm_start_of_both_halves(tmp_path: Path):
    robust, standard = config(mixture=MIXTURE), config()
    halves = saved(tmp_path / "robust.pt", robust), saved(tmp_path / "standard.pt", standard)
    source = DualConfig(enabled=True, standard=small(init_from=str(tmp_path / "standard.pt")))
    both = config(mixture=MIXTURE, init_from=str(tmp_path / "robust.pt"), dual=source)
    model = make_model(both, DATA)
    assert same(model.robust, halves[0]) and same(model.standard, halves[1])
    only = dataclasses.replace(both.model, init_from=None)
    model = make_model(TrainConfig(model=only), DATA)
    assert same(model.standard, halves[1]) and not same(model.robust, halves[0])


def test_warm_start_from_another_dual_model(tmp_path: Path):
    """Each half takes its own."""
    path = str(tmp_path / "dual.pt")
    both = config(mixture=MIXTURE, dual=DualConfig(enabled=True))
    trained = saved(tmp_path / "dual.pt", both)
    again = config(mixture=MIXTURE, init_from=path, dual=DualConfig(enabled=True, standard=small(init_from=path)))
    assert same(make_model(again, DATA), trained)


def test_warm_start_takes_the_moving_average(tmp_path: Path):
    last, average = make_model(config(), DATA), make_model(config(), DATA)
    weights = {"model": last.state_dict(), "ema": {"model": average.state_dict(), "batches": 3}}
    save_checkpoint({"config": {}, "data": DATA, "position": {}, **weights}, tmp_path / "last.pt")
    assert same(make_model(config(init_from=str(tmp_path / "last.pt")), DATA), average)


@pytest.mark.parametrize("experts", [{}, {"mixture": MIXTURE}], ids=["one network", "mixture"])
def test_a_warm_start_on_other_classes_keeps_the_last_layers_that_are_drawn(tmp_path: Path, experts: dict):
    few = {**DATA, "class_names": ["a", "b"]}
    saved(tmp_path / "ten.pt", config(**experts))
    asked = config(**experts, init_from=str(tmp_path / "ten.pt"), init_head="fresh")
    torch.manual_seed(0)
    drawn = make_model(asked, few, warm_start=False).state_dict()
    torch.manual_seed(0)
    found = make_model(asked, few).state_dict()
    trained = load_checkpoint(tmp_path / "ten.pt")["model"]
    kept = {name for name, value in found.items() if torch.equal(value, drawn[name])}
    heads = {name for name in found if ".fc." in f".{name}"}
    assert kept == heads and len(heads) == (4 if experts else 2)
    assert all(torch.equal(value, trained[name]) for name, value in found.items() if name not in heads)


def test_a_warm_start_that_does_not_fit_is_named(tmp_path: Path):
    path = tmp_path / "other.pt"
    saved(path, config())
    with pytest.raises(CheckpointError, match=r"model\.init_from: .*other\.pt: a checkpoint of another architecture"):
        make_model(config(width=4, init_from=str(path)), DATA)
    source = DualConfig(enabled=True, standard=small(width=4, init_from=str(path)))
    with pytest.raises(CheckpointError, match=r"model\.dual\.standard\.init_from: .* another architecture"):
        make_model(config(dual=source), DATA)
    few = {**DATA, "class_names": ["a", "b"]}
    named = r"model\.init_from: expected a model of 2 classes, got one of 10 in .*other.*; model\.init_head=fresh"
    with pytest.raises(ConfigError, match=named):
        make_model(config(init_from=str(path)), few)
    with pytest.raises(CheckpointError, match="expected a checkpoint file, found nothing"):
        make_model(config(init_from=str(tmp_path / "none.pt")), DATA)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.moe.layers=[layer9]"], r"^model\.moe\.layers: .* submodule, got 'layer9'; did you mean 'layer4'\?"),
        (["model.moe.layers=['']"], r"^model\.moe\.layers: names: expected the name of a submodule, got ''"),
        (
            ["model.moe.layers=[fc]"],
            r"^model\.moe\.layers: block: expected a module that maps .*, got Linear that fails on",
        ),
        (
            ["model.width=16384"],
            r"^model: weights: expected at most this machine's memory of 1,000,000,000 bytes, got \d",
        ),
        (
            ["model.moe.layers=[layer4.1]", "model.moe.num_experts=1024"],
            r"^model: weights: expected at most this machine's memory of 1,000,000,000 bytes, got \d",
        ),
        (["model.mixture.num_experts=1024"], r"^model: weights: expected at most .*, got \d"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_its_weights_are_allocated(
    settings: list[str], words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(image_set, "physical_memory", lambda: 1e9)
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match=words):
        make_model(load_config(None, settings), {**DATA, "image_size": 16})
    assert torch.equal(torch.get_rng_state(), state) or "layers:" in words


# --- data that a configuration is for -----------------------------------------------------------------------------

CIFAR10 = {**DATA, "name": "cifar10", "channels": 3, "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"name": "cifar100", "class_names": list(map(str, range(100)))}, r"cifar100 \(100 classes, 3x32x32\)"),
        ({"name": "digits", "channels": 1, "image_size": 16, "mean": [0.5], "std": [0.2]}, r"digits \(10 .* 1x16x16\)"),
        ({"name": "parquet:mine", "image_size": 64}, r"parquet:mine \(10 classes, 3x64x64\)"),
    ],
)
def test_other_data_than_expected_are_refused(change: dict, got: str):
    wanted = replaced(config(), "data.expects", "cifar10")
    for data in (CIFAR10, {**CIFAR10, "name": "parquet:cifar10"}):
        make_model(wanted, data)
    with pytest.raises(
        ConfigError, match=rf"this configuration is for cifar10 \(10 .* 3x32x32\), got {got}; data\.exp"
    ):
        make_model(wanted, {**CIFAR10, **change})
    make_model(replaced(wanted, "data.expects", None), {**CIFAR10, **change})
    with pytest.raises(ConfigError, match=r"data\.expects: expected one of cifar10, .* did you mean 'cifar10'"):
        load_config(None, ["data.expects=cifar"])


def test_an_evaluation_may_find_the_images_elsewhere(tmp_path: Path):
    images = tmp_path / "here"
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (images / place).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 40 * number).save(images / place / f"{number}.png")
    settings = ["data.name=image_folder", f"data.root={images}", "data.validation_fraction=0.5"]
    trained = load_config(None, [*settings, "model.width=2", "model.blocks=[1,1]"])
    splits = load_splits(trained.data, 0)
    model = make_model(trained, describe_data(splits.train))
    content = {"config": plain(trained), "data": describe_data(splits.train), "position": {}}
    save_checkpoint({**content, "model": model.state_dict(), "ema": None}, tmp_path / "last.pt")
    images.rename(tmp_path / "there")
    with pytest.raises(DataError, match="here: expected a folder of images"):
        load_experiment(tmp_path)
    _, _, again, _ = load_experiment(tmp_path, [f"data.root={tmp_path / 'there'}"])
    assert torch.equal(again.val.images, splits.val.images)
    with pytest.raises(ConfigError, match=r"got data\.name=digits \(the checkpoint has image_folder\)"):
        load_experiment(tmp_path, ["data.name=digits"])
    for image in (tmp_path / "there").rglob("*.png"):  # a size that was found out is the training images' for good
        Image.open(image).resize((10, 10)).save(image)
    _, _, again, _ = load_experiment(tmp_path, [f"data.root={tmp_path / 'there'}"])
    assert again.test.images.shape[2:] == (8, 8)


def test_the_share_of_a_dual_model_is_swept_at_evaluation(tiny, tmp_path: Path):
    """It decides the predictions: results of one share are not taken for those of another."""
    trained = tiny("model.dual.enabled=true", "method.name=standard", "run.max_steps=1")
    Trainer(trained, Reporter(enabled=False)).fit()
    _, model, _, _ = load_experiment(trained.run.out, ["model.dual.alpha=0.9"])
    assert model.alpha == 0.9
    with pytest.raises(ConfigError, match=r"model.dual.mix=logits \(the checkpoint has probabilities\)"):
        load_experiment(trained.run.out, ["model.dual.mix=logits"])
    seen, files = [], []
    for alpha in (0.7, 0.9, 0.7000001):
        share = [f"model.dual.alpha={alpha}"]
        results, named = assess(
            trained.run.out, overrides=share, count=4, resume=True, reporter=Reporter(enabled=False)
        )
        files.append(named)
        one_file = {"out": tmp_path / "one.json", "overrides": share, "count": 4, "resume": True}
        again, _ = assess(trained.run.out, **one_file, reporter=Reporter(enabled=False))
        assert again["model"]["dual"]["alpha"] == results["model"]["dual"]["alpha"] == alpha
        seen.append(results["identity"])
    assert len(set(files)) == 3
    assert all(seen[i] != seen[j] for i in range(3) for j in range(i))
