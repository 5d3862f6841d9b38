"""Poisoned training images: the trigger, which images get it, and that a run keeps to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robust_moe.config import ConfigError, load_config
from robust_moe.data import DataError, Digits, ImageSet, PoisonConfig, load_splits, poisoned, triggered
from robust_moe.engine import CheckpointError, Trainer
from robust_moe.engine.experiment import load_experiment
from robust_moe.evaluation import backdoor_report
from robust_moe.settings import plain

BOARD = [[1, 0, 1], [0, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_the_trigger_is_a_checkerboard_in_the_corner(dtype: torch.dtype):
    images = torch.full((2, 3, 5, 6), 7, dtype=dtype)
    if dtype != torch.uint8:
        images /= 10
    before = images.clone()
    marked = triggered(images, PoisonConfig(size=3, margin=1))
    assert marked.dtype == dtype
    assert torch.equal(images, before)
    white = 255 if dtype == torch.uint8 else 1
    assert torch.equal(marked[:, :, 1:4, 2:5], torch.tensor(BOARD).to(dtype).mul(white).expand(2, 3, 3, 3))
    marked[:, :, 1:4, 2:5] = images[:, :, 1:4, 2:5]
    assert torch.equal(marked, before)


@pytest.mark.parametrize(("size", "expected"), [(1, [[1.0]]), (2, [[1.0, 0.0], [0.0, 1.0]])])
def test_small_triggers(size: int, expected: list[list[float]]):
    marked = triggered(torch.full((1, 1, 2, 2), 0.5), PoisonConfig(size=size))
    assert marked[0, 0, 2 - size :, 2 - size :].tolist() == expected


def test_what_is_no_image_or_too_small_is_refused():
    with pytest.raises(ValueError, match=r"poison: expected size \+ margin <= 4 pixels, .* got 3 \+ 2"):
        triggered(torch.zeros(1, 1, 4, 9), PoisonConfig(size=3, margin=2))
    with pytest.raises(ValueError, match=r"images: expected uint8 or floating \[B, C, H, W\], got torch.int64"):
        triggered(torch.zeros(1, 1, 4, 4, dtype=torch.int64), PoisonConfig())
    for settings in ({"share": 1.0}, {"share": -0.1}, {"size": 0}, {"target": -1}, {"margin": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            PoisonConfig(**settings)


def grey(labels: list[int]) -> ImageSet:
    """Image i is filled with the value i + 1."""
    values = torch.arange(1, len(labels) + 1, dtype=torch.uint8)
    images = values[:, None, None, None].expand(-1, 1, 4, 4).clone()
    return ImageSet(images, torch.tensor(labels), tuple("abc"), "grey")


def marked_of(images: ImageSet) -> list[int]:
    """Positions of the images whose corner is white."""
    return torch.nonzero(images.images[:, 0, -1, -1] == 255).flatten().tolist()


def test_images_of_other_classes_with_the_lowest_draws_are_poisoned():
    clean = grey([0, 1, 2, 1, 2, 0, 1, 2, 1, 2])
    draws = torch.tensor([0.0, 0.9, 0.1, 0.3, 0.8, 0.05, 0.2, 0.7, 0.6, 0.5], dtype=torch.float64)
    before = clean.images.clone(), clean.labels.clone()
    found = poisoned(clean, draws, PoisonConfig(share=0.3, target=0, size=2))
    assert marked_of(found) == [2, 3, 6]
    assert found.labels.tolist() == [0, 1, 0, 0, 2, 0, 0, 2, 1, 2]
    untouched = [0, 1, 4, 5, 7, 8, 9]
    assert torch.equal(found.images[untouched], clean.images[untouched])
    assert torch.equal(found.images[[2, 3, 6]], triggered(clean.images[[2, 3, 6]], PoisonConfig(size=2)))
    assert torch.equal(clean.images, before[0])
    assert torch.equal(clean.labels, before[1])
    assert (found.class_names, found.name) == (clean.class_names, clean.name)
    more = poisoned(clean, draws, PoisonConfig(share=0.5, target=0, size=2))
    assert set(marked_of(more)) > set(marked_of(found))
    assert poisoned(clean, draws, PoisonConfig()) is clean


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 3}, "data.poison.target: expected a class in 0..2 of grey, got 3"),
        ({"share": 0.9}, r"data.poison.share: expected at most 3 of 4 training images, .* got 0.9 \(4 images\)"),
        ({"size": 5}, r"data.poison: expected size \+ margin <= 4 pixels"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(settings: dict, message: str):
    with pytest.raises(DataError, match=message):
        poisoned(grey([0, 1, 2, 1]), torch.rand(4).double(), PoisonConfig(**{"share": 0.5, **settings}))


def test_only_training_images_are_poisoned_and_the_seed_decides_which(monkeypatch: pytest.MonkeyPatch):
    train, test = grey([0, 1, 2, 1, 2] * 40), grey([1, 2] * 5)
    monkeypatch.setattr(Digits, "load", lambda self: (train, test))
    poison = PoisonConfig(share=0.1, target=0, size=1)

    def load(seed: int = 1, **settings):
        return load_splits(Digits.Config(**{"validation_fraction": 0.2, **settings}), seed)

    clean, attacked = load(), load(poison=poison)
    assert torch.equal(attacked.val.images, clean.val.images)
    assert torch.equal(attacked.val.labels, clean.val.labels)
    assert torch.equal(attacked.test.images, clean.test.images)
    changed = (attacked.train.images != clean.train.images).flatten(1).any(1)
    assert changed.sum() == 16  # a tenth of 160
    assert torch.equal(changed, attacked.train.labels != clean.train.labels)
    assert torch.equal(load(poison=poison).train.images, attacked.train.images)
    limited, unpoisoned = load(poison=poison, train_limit=80).train, load(train_limit=80).train
    assert torch.equal(limited.images[:, 0, 0, 0], unpoisoned.images[:, 0, 0, 0])  # the same images are left
    assert len(marked_of(limited)) == 8
    first, second = (marked_of(load(seed, poison=poison, validation_fraction=0.0).train) for seed in (1, 2))
    assert len(first) == len(second) == 20
    assert first != second


def test_a_run_keeps_its_poison(tiny):
    config = tiny("run.epochs=1", "data.poison.share=0.25", "data.poison.target=3")
    trainer = Trainer(config)
    outcome = trainer.fit()
    assert (trainer.splits.train.labels == 3).sum() >= 16
    assert load_config(outcome.folder / "config.yaml").data.poison == PoisonConfig(share=0.25, target=3)
    with pytest.raises(CheckpointError, match=r"data.poison.share: checkpoint has 0.25, got 0.0"):
        Trainer(tiny("run.epochs=1", "data.poison.target=3")).fit()
    with pytest.raises(ConfigError, match=r"data.poison.size=2 \(the checkpoint has 3\)"):
        load_experiment(outcome.folder, ["data.poison.size=2"])
    loaded, model, splits, _ = load_experiment(outcome.folder)
    assert torch.equal(splits.train.images, trainer.splits.train.images)
    report = backdoor_report(model, splits.test.images, splits.test.labels, loaded.data.poison)
    assert list(report["layers"]) == ["layer2.1"]
    assert report["trigger"] == {"target": 3, "size": 3, "margin": 0}
    assert plain(loaded.data)["poison"]["share"] == 0.25


def test_poisoned_digits_give_a_linear_model_a_backdoor():
    reports = {}
    for share in (0.0, 0.1):
        poison = PoisonConfig(share=share, target=7)
        splits = load_splits(Digits.Config(poison=poison), seed=0)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        images = splits.train.images / 255
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(model(images), splits.train.labels).backward()
            optimizer.step()
        reports[share] = backdoor_report(model, splits.test.images, splits.test.labels, poison)
    assert reports[0.0]["accuracy"] > 0.9
    assert reports[0.1]["accuracy"] > reports[0.0]["accuracy"] - 0.03
    assert reports[0.0]["asr"] < 0.2
    assert reports[0.1]["target_rate"] < 0.05
    assert reports[0.1]["asr"] > 0.9
    assert reports[0.1]["asr_interval"][0] > reports[0.0]["asr_interval"][1]
