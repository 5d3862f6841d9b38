"""Models for others: the same function from a folder, from ONNX and from torch.export, without what made them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import robust_moe
from robust_moe import pretrained
from robust_moe.commands import app
from robust_moe.config import load_config
from robust_moe.engine import CheckpointError, Reporter, Trainer
from robust_moe.engine.experiment import make_model
from robust_moe.engine.plain_state import SAVED_WEIGHTS
from robust_moe.outputs import export_outputs, is_free

SIZE = 8
DATA = {
    "name": "some",
    "class_names": list("abcde"),
    "channels": 3,
    "image_size": SIZE,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
}
SMALL = ("model.name=resnet_small", "model.width=4", "model.blocks=[1,2]")
MODELS = {
    "dense": SMALL,
    "blocks": (*SMALL, "model.moe.layers=layer2.1"),
    "convolutions by their best": (*SMALL, "model.moe.layers=layer2.0.conv2", "model.moe.top_k=1"),
    "networks by their best": (*SMALL, "model.mixture.num_experts=3", "model.mixture.routing=hard"),
    "dual": (*SMALL, "model.mixture.num_experts=2", "model.dual.enabled=true", "model.dual.standard.width=6"),
    "tokens": (
        *("model.name=vit_micro", "model.width=8", "model.depth=2", "model.heads=2", "model.patch_size=4"),
        "model.moe.layers=blocks.1.mlp",
    ),
    "a library's": ("model.name=timm:resnet10t",),
}


def made(kind: str) -> nn.Module:
    """A model with weights and statistics that no start has."""
    torch.manual_seed(0)
    model = make_model(load_config(None, MODELS[kind]), DATA)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    return model.eval()


def images(count: int = 6, size: int = SIZE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- a folder


@pytest.mark.parametrize("weights", SAVED_WEIGHTS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_gives_the_same_model_bit_for_bit(tmp_path: Path, monkeypatch, kind: str, weights: str):
    if weights == "model.pt":
        monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    model = made(kind)
    written = robust_moe.save_pretrained(model, tmp_path / "mine")
    assert written == [tmp_path / "mine" / weights, tmp_path / "mine" / "config.json"]
    (tmp_path / "mine").rename(tmp_path / "yours")
    again = robust_moe.from_pretrained(tmp_path / "yours", device="cpu")
    assert not again.training
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_a_saved_model_may_be_saved_over_and_over(tmp_path: Path, monkeypatch):
    robust_moe.save_pretrained(made("blocks"), tmp_path)
    again = robust_moe.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        next(again.parameters()).add_(1)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    robust_moe.save_pretrained(again, tmp_path)  # in the other form
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.pt"]
    third = robust_moe.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(next(third.parameters()), next(again.parameters()))


def test_the_description_names_classes_and_no_files(tmp_path: Path):
    first = made("dense")
    torch.save(first.state_dict(), tmp_path / "w.pt")
    model = make_model(load_config(None, [*SMALL, f"model.init_from={tmp_path / 'w.pt'}"]), DATA)
    robust_moe.save_pretrained(model, tmp_path / "mine")
    described = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert described["data"] == DATA
    assert (described["model"]["name"], described["imports"]) == ("resnet_small", [])
    assert str(tmp_path) not in json.dumps(described)


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def changed(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))


DAMAGE = {
    "no description": (
        lambda folder: without(folder, "config.json"),
        "config.json: expected the description of a model, got",
    ),
    "no weights": (
        lambda folder: without(folder, "model.safetensors"),
        "expected model.safetensors or model.pt, got neither",
    ),
    "no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: expected the description of a model",
    ),
    "another format": (lambda folder: changed(folder, "format", 9), "format: expected .* got 9"),
    "no classes": (lambda folder: changed(folder, "data", DATA | {"class_names": []}), "data.class_names: expected"),
    "another model": (
        lambda folder: changed(folder, "model", {"name": "resnet_small", "width": 4, "blocks": [1, 1]}),
        "a checkpoint of another architecture",
    ),
    "half the weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500]),
        "expected a file of safetensors, got",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_sentence(tmp_path: Path, damage: str):
    robust_moe.save_pretrained(made("dense"), tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        robust_moe.from_pretrained(tmp_path, device="cpu")


def test_models_that_were_not_made_here_and_other_names_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model: expected one that robust_moe has made \(load_model\), got Linear"):
        robust_moe.save_pretrained(nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"path: expected a name in \.onnx or \.pt2, got .*x\.pth"):
        robust_moe.export_model(made("dense"), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="image_size: expected pixels of a side, for a model that was not made here"):
        robust_moe.export_model(nn.Conv2d(3, 1, 1), tmp_path / "x.pt2")


def test_files_of_another_origin_are_never_written_over(tmp_path: Path):
    model = made("dense")
    (tmp_path / "config.json").write_text('{"architectures": ["ResNet"]}')
    with pytest.raises(
        ValueError, match=r"folder: expected a new name or the description of a model of robust-moe, got"
    ):
        robust_moe.save_pretrained(model, tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"folder: expected a new name or the weights beside such a description, got"):
        robust_moe.save_pretrained(model, tmp_path)
    for name, kind in (("m.onnx", "an ONNX file"), ("m.pt2", "a program")):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(ValueError, match=rf"path: expected a new name or {kind} of robust-moe export, got"):
            robust_moe.export_model(model, tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"mine"


# --- other programs


@pytest.mark.parametrize("kind", ["blocks", "tokens"])
def test_onnxruntime_computes_the_same_for_any_batch(tmp_path: Path, kind: str):
    runtime = pytest.importorskip("onnxruntime")
    model = made(kind)
    file = robust_moe.export_model(model, tmp_path / "m.onnx")
    assert is_free(*export_outputs(file)[0])  # and is written over the next time
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {node.domain for node in pytest.importorskip("onnx").load(str(file)).graph.node} == {
        ""
    }  # standard operators
    for count in (1, 6):
        (logits,) = session.run(["logits"], {"images": images(count).numpy()})
        np.testing.assert_allclose(logits, model(images(count)).detach().numpy(), rtol=1e-4, atol=1e-5)


ALONE = """
import sys, torch
loaded = torch.export.load(sys.argv[1]).module()
torch.save(loaded(torch.load(sys.argv[2])), sys.argv[3])
assert not any(name.startswith("robust_moe") for name in sys.modules)
"""


def test_a_program_of_torch_export_needs_no_import_of_this_package(tmp_path: Path):
    model = made("dual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = robust_moe.export_model(model, tmp_path / "m.pt2")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert is_free(*export_outputs(file)[0])
    torch.save(images(), tmp_path / "x.pt")
    arguments = [sys.executable, "-c", ALONE, str(file), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run(arguments, check=True, cwd=tmp_path, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(images()), rtol=1e-5, atol=1e-5)


def test_a_run_is_exported_and_the_file_is_measured_alike(tiny, tmp_path: Path):
    Trainer(tiny("run.epochs=1", "method.name=standard"), Reporter(enabled=False)).fit()

    def run(*arguments: object):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.stderr
        return done.stdout

    assert f"written: {tmp_path / 'm.pt2'}" in run("export", tmp_path / "run", tmp_path / "m.pt2")
    said = run("export", tmp_path / "run", tmp_path / "folder")
    assert f"written: {tmp_path / 'folder' / 'config.json'}" in said
    ours = robust_moe.load_model(tmp_path / "run", device="cpu")
    theirs = robust_moe.from_pretrained(tmp_path / "folder", device="cpu")
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(ours(x), theirs(x))
    steps = ("--attack-steps", 1, "--n", 20)
    run("eval", tmp_path / "run", *steps, "--out", tmp_path / "a.json")
    settings = ("data=digits", "data.image_size=8", "eval.attack.eps=1/10")
    run("eval", tmp_path / "m.pt2", *settings, *steps, "--out", tmp_path / "b.json")
    clean = [json.loads((tmp_path / name).read_text())["clean"] for name in ("a.json", "b.json")]
    assert clean[0] == clean[1]
    # the folder is the run's model with what it knows of its images: only these are named
    run("eval", tmp_path / "folder", *settings, *steps, "--out", tmp_path / "c.json")
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "c.json"))
    assert (first["clean"], first["model"]["name"]) == (again["clean"], again["model"]["name"])


def test_a_folder_is_evaluated_as_the_model_that_it_is(tmp_path: Path):
    robust_moe.save_pretrained(made("blocks"), tmp_path / "folder")

    def refused(*settings: str) -> str:
        done = CliRunner().invoke(app, ["eval", str(tmp_path / "folder"), *settings], env={"COLUMNS": "400"})
        assert done.exit_code == 2
        return done.stderr

    assert "data: expected the images beside a model from elsewhere" in refused()
    assert "model.width=8" in refused("data=digits", "model.width=8")
    assert "expected class names ['a', 'b', 'c', 'd', 'e']" in refused("data=digits")
