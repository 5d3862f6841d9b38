"""Checkpoints from anyone: whatever a field holds, it is refused in one sentence or does no harm."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from robust_moe.config import ConfigError, load_config
from robust_moe.content import ContentError
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint, save_checkpoint
from robust_moe.engine.checkpoint import data_of
from robust_moe.engine.checkpoint_fields import DESCRIPTION
from robust_moe.engine.experiment import make_model

SETTINGS = (
    *("data.train_limit=32", "data.test_limit=20", "data.image_size=8", "data.validation_fraction=0.02"),
    *("model.width=4", "model.blocks=[1,1]", "method=fast_at", "run.epochs=1", "run.batch_size=16", "run.threads=1"),
    *("eval.attack.steps=1", "run.ema_decay=0.5"),
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One that has ended, with its last.pt."""
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(load_config(None, [f"run.out={folder}", *SETTINGS]), Reporter(enabled=False))
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def state(trainer: Trainer) -> dict[str, Any]:
    return load_checkpoint(trainer.folder / "last.pt")


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every field, and of the first three items of long lists and sections."""
    entries = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    for key, value in entries if len(entries) <= 12 or not above else entries[:3]:
        yield (*above, key)
        if isinstance(value, (dict, list, tuple)):
            yield from places(value, (*above, key))


def replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    tree = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    tree[place[0]] = replaced(tree[place[0]], place[1:], value) if len(place) > 1 else value
    return tree


ODD: dict[str, Any] = {
    "None": None,
    "negative": -1,
    "3": 3,
    "2**70": 2**70,
    "true": True,
    "NaN": float("nan"),
    "text": "${oc.env:HOME}",
    "long text": "a" * 10**5,
    "[[1]]": [[1]],
    "[]": [],
    "{}": {},
    "{1: 2}": {1: 2},
    "tensor": torch.zeros(3),
    "whole tensor": torch.zeros(3, dtype=torch.int64),
    "complex tensor": torch.zeros(3, dtype=torch.complex64),
    "sparse tensor": torch.eye(3).to_sparse(),
    "meta tensor": torch.zeros(3, device="meta"),
    "expanded tensor": torch.zeros(1).expand(2**40),
}


@pytest.mark.parametrize("odd", ODD)
def test_any_field_may_hold_anything(trainer: Trainer, state: dict[str, Any], odd: str):
    refused = 0
    for place in places({key: value for key, value in state.items() if key not in ("format", "config")}):
        changed = replaced(state, place, ODD[odd])
        try:
            DESCRIPTION(changed, "")
            make_model(trainer.config, data_of(changed, "x.pt"), warm_start=False) if place[0] == "data" else None
            trainer.state.load_state_dict(changed, "x.pt", 0, torch.device("cpu"))
        except (CheckpointError, ConfigError, ContentError) as error:
            refused += 1
            assert len(str(error)) < 2000, place
    assert refused > 30


def test_what_was_saved_is_taken(trainer: Trainer, state: dict[str, Any]):
    DESCRIPTION(state, "")
    assert trainer.state.load_state_dict(state, "x.pt", 0, torch.device("cpu")) == (state["log_lines"], [])


REFUSED = {  # place, value, what the sentence says
    "weights that are no tensor": ("model.normalize.mean", [0.5], r"model\..*: expected a dense tensor, got \[0\.5\]"),
    "sparse weights": ("ema.model.fc.bias", torch.eye(3).to_sparse(), r"ema\.model\.fc\.bias: expected a dense tensor"),
    "weights without numbers": ("model.fc.bias", torch.zeros(10, device="meta"), r"model\.fc\.bias: .*, got .* meta"),
    "an average without weights": ("ema", {"batches": 3}, r"ema: expected model, batches, got nothing for model"),
    "an average of lists": ("ema.batches", [3], r"ema\.batches: expected a whole number >= 0, got \[3\]"),
    "no list of generators": ("rng", None, r"rng: expected a list of 1 to 4096 items, got None"),
    "a position outside of the words": (
        "rng.0.numpy.2",
        10**6,
        r"rng\[0\]\.numpy\[2\]: expected .* <= 624, got 1000000",
    ),
    "words of Python's": ("rng.0.python.1", [1, 2], r"rng\[0\]\.python\[1\]: expected a list of 625 items"),
    "a best that is a text": ("best.robust", "0.5", r"best\.robust: expected a finite number, got '0\.5'"),
    "a position of one half": ("position.step", 0.5, r"position\.step: expected a whole number >= 0, got 0\.5"),
    "a size beyond memory": ("data.image_size", 10**9, r"data\.image_size: expected a whole number >= 1 and <= 16384"),
    "a class that is a number": ("data.class_names", [1, 2], r"data\.class_names\[0\]: expected text, got 1"),
    "a spread of zero": ("data.std", [0.0], r"data\.std\[0\]: expected a finite number > 0, got 0\.0"),
    "an optimiser of a list": ("optimizer.state", [1], r"optimizer\.state: expected a section of each parameter"),
    "a method's guard": ("method.met", "yes", r"method\.met: expected true or false, got 'yes'"),
    "a configuration of a list": ("config.run", [1], r"run: expected a section with keys of its own, got \[1\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_malformed_field_is_named(trainer: Trainer, state: dict[str, Any], tmp_path: Path, what: str):
    key, value, words = REFUSED[what]
    place: list[Any] = [int(part) if part.isdigit() else part for part in key.split(".")]
    at = next((at for at, part in enumerate(place) if part == "model"), None)
    if at is not None:  # the names of weights have dots of their own
        names = [name for name in state["model"] if name.endswith(".".join(map(str, place[at + 1 :])))]
        place = [*place[: at + 1], names[0] if names else next(iter(state["model"]))]
    save_checkpoint(replaced(state, tuple(place), value), tmp_path / "x.pt")
    with pytest.raises((CheckpointError, ConfigError), match=rf"x\.pt: {words}"):
        trainer.state.load_state_dict(load_checkpoint(tmp_path / "x.pt"), tmp_path / "x.pt", 0, torch.device("cpu"))


def test_an_optimisers_state_has_the_shape_of_its_parameter(trainer: Trainer, state: dict[str, Any]):
    wrong = replaced(state, ("optimizer", "state", 0, "momentum_buffer"), torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match=r"x\.pt: optimizer: expected momentum_buffer of \[4, .* got \[2, 2\]"):
        trainer.state.load_state_dict(wrong, "x.pt", 0, torch.device("cpu"))


@pytest.mark.parametrize("key", ["name", "class_names", "channels", "image_size", "mean", "std"])
def test_a_model_needs_to_know_its_images(state: dict[str, Any], key: str):
    data = {name: value for name, value in state["data"].items() if name != key}
    with pytest.raises(CheckpointError, match=rf"x\.pt: data: expected name, .*, got nothing for {key}"):
        data_of({**state, "data": data}, "x.pt")


def test_entries_that_unpack_to_more_than_the_file_are_refused(trainer: Trainer, tmp_path: Path):
    with (
        zipfile.ZipFile(trainer.folder / "last.pt") as archive,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match=r"x\.pt: expected a whole checkpoint, got .*compressed entries"):
        load_checkpoint(tmp_path / "x.pt")


def test_weights_of_whole_numbers_are_another_architecture(trainer: Trainer, state: dict[str, Any]):
    name = next(name for name, value in state["model"].items() if value.is_floating_point())
    wrong = replaced(state, ("model", name), state["model"][name].long())
    with pytest.raises(CheckpointError, match=rf"{name}: expected torch.float32, got torch.int64"):
        trainer.state.load_state_dict(wrong, "x.pt", 0, torch.device("cpu"))
