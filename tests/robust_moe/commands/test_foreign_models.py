"""``robust-moe eval`` of models from elsewhere: plain state dicts with ``--model``, exported programs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from released_networks import ReleasedResNet, unsettled
from torch import nn
from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.engine import foreign
from robust_moe.engine.nearest import nearest_model

QUICK = ("eval.attack.steps=2", "run.accelerator=cpu")
SMALL = ("model.width=4", "model.blocks=[2,2]")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of two training images and one test image, 8x8 pixels."""
    for part, count in (("train", 2), ("test", 1)):
        for number in range(10):
            place = tmp_path / "images" / part / str(number)
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(10 * number + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return unsettled(ReleasedResNet()).float()


def clean_of(model: nn.Module, folder: Path, mean: float, std: float) -> float:
    """Share of the test images that are right, by hand."""
    right = 0
    for number in range(10):
        pixels = torch.from_numpy(np.array(Image.open(folder / "test" / str(number) / "0.png"))).permute(2, 0, 1)
        right += int(model((pixels[None] / 255 - mean) / std).argmax() == number)
    return right / 10


def evaluated(*arguments: object, out: Path) -> dict:
    done = run("eval", *arguments, *QUICK, "--out", out)
    assert done.exit_code == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(("text", "mean", "std"), [("none", 0.0, 1.0), ("0.5,0.5,0.5/0.25,0.25,0.25", 0.5, 0.25)])
def test_a_state_dict_is_measured_behind_the_normalisation_that_is_said(tmp_path, folder, model, text, mean, std):
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")
    arguments = (tmp_path / "w.pt", "--model", "resnet18", f"data.root={folder}", "--normalize", text, *SMALL)
    results = evaluated(*arguments, out=tmp_path / "r.json")
    assert results["clean"] == clean_of(model, folder, mean, std)
    assert results["model"]["name"] == "resnet18"
    assert results["model"]["normalize"] == text
    assert results["count"] == 10


def test_what_was_found_out_is_said_and_each_normalisation_has_a_result_file(tmp_path, folder, model):
    torch.save({"net": model.state_dict()}, tmp_path / "w.pt")
    arguments = ("eval", tmp_path / "w.pt", "--model", "resnet18", f"data.root={folder}", *SMALL, *QUICK)
    done = run(*arguments)
    assert f"{tmp_path / 'w.pt'}: the state dict under 'net'" in done.stdout
    assert "images are normalised by the statistics of image_folder:images (--normalize)" in done.stdout
    assert run(*arguments, "--normalize", "imagenet").exit_code == 0
    assert len(list(tmp_path.glob("results-w-test-pgd2-*.json"))) == 2


def test_a_normalisation_beside_the_file_s_own_is_refused(tmp_path, folder, model):
    own = {"normalize.mean": torch.zeros(3), "normalize.std": torch.ones(3)}
    torch.save(model.state_dict() | own, tmp_path / "w.pt")
    arguments = (tmp_path / "w.pt", "--model", "resnet18", f"data.root={folder}", *SMALL)
    done = run("eval", *arguments, "--normalize", "imagenet")
    assert done.exit_code == 2
    assert f"normalize: expected none for {tmp_path / 'w.pt'}, which has its own, got 'imagenet'" in done.stderr
    results = evaluated(*arguments, out=tmp_path / "r.json")
    assert (results["clean"], results["model"]["normalize"]) == (clean_of(model, folder, 0, 1), "file")


def test_a_preset_or_a_file_says_the_whole_model(tmp_path, folder, model):
    (tmp_path / "mine.yaml").write_text("model: {name: resnet18, width: 4, blocks: [2, 2]}\n")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    arguments = (tmp_path / "w.pt", "--model", tmp_path / "mine.yaml", f"data.root={folder}", "--normalize", "none")
    assert evaluated(*arguments, out=tmp_path / "r.json")["clean"] == clean_of(model, folder, 0, 1)


def exported(model: nn.Module, path: Path, *, fixed: bool = False) -> Path:
    sizes = None if fixed else ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(model.eval(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=sizes), path)
    return path


def test_an_exported_model_is_measured_as_it_is(tmp_path, folder, model):
    file = exported(model, tmp_path / "m.pt2")
    results = evaluated(file, f"data.root={folder}", out=tmp_path / "r.json")
    assert results["clean"] == clean_of(model, folder, 0, 1)
    assert (results["model"]["name"], results["model"]["normalize"]) == ("m (exported)", "none")
    assert results["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    normal = evaluated(
        file, f"data.root={folder}", "--normalize", "0.5,0.5,0.5/0.25,0.25,0.25", out=tmp_path / "n.json"
    )
    assert normal["clean"] == clean_of(model, folder, 0.5, 0.25)


def test_the_dry_run_names_the_model(tmp_path, folder, model):
    file = exported(model, tmp_path / "m.pt2")
    done = run("eval", file, f"data.root={folder}", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "model: m (exported) for 3x8x8 images" in done.stdout


def test_exported_models_of_other_inputs_are_one_sentence(tmp_path, folder, model):
    done = run("eval", exported(model, tmp_path / "m.pt2", fixed=True), f"data.root={folder}")
    assert (
        "expected a program of images [B, C, H, W] for any B (dynamic_shapes), got one of batches of 2" in done.stderr
    )
    done = run("eval", exported(model, tmp_path / "n.pt2"), f"data.root={folder}", "data.image_size=6")
    assert "expected images [3, 8, 8] (channels, height, width), got [3, 6, 6]" in done.stderr
    (tmp_path / "x.pt2").write_bytes(b"nothing")
    assert "expected a program that torch.export.save wrote" in run("eval", tmp_path / "x.pt2", "data=digits").stderr


def test_an_exported_model_in_training_or_of_other_classes_is_refused(tmp_path, folder):
    """It would give numbers, and wrong ones."""
    batch = ({0: torch.export.Dim("batch")},)
    parts = {"norm": nn.BatchNorm2d(3), "dropout": nn.Dropout()}
    for name, part in parts.items():
        network = nn.Sequential(part, nn.Flatten(), nn.Linear(3 * 64, 10))
        program = torch.export.export(network.train(), (torch.rand(2, 3, 8, 8),), dynamic_shapes=batch)
        torch.export.save(program, tmp_path / f"{name}.pt2")
        done = run("eval", tmp_path / f"{name}.pt2", f"data.root={folder}")
        assert done.exit_code == 2
        assert re.search(rf"exported in evaluation .* got one in training, by its aten\..*{name}", done.stderr)
    wide = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(3 * 64, 12))
    file = exported(wide, tmp_path / "wide.pt2")
    done = run("eval", file, f"data.root={folder}")
    assert "expected logits of 10 classes, as image_folder:images has, got 12" in done.stderr


def refusals(tmp_path: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    root, file = f"data.root={folder}", tmp_path / "w.pt"
    return {
        "data: expected the images beside a model from elsewhere": (file, "--model", "resnet18"),
        "normalize: expected data, none, cifar10, .* or MEAN/STD, got 'half'": (
            *(file, "--model", "resnet18", "--normalize", "half", root),
        ),
        "normalize: expected 3 means and 3 deviations > 0, got '0.5/0.5'": (
            *(file, "--model", "resnet18", "--normalize", "0.5/0.5", root),
        ),
        "normalize: expected --model beside it": (file, "--normalize", "none"),
        "model: expected none for an exported program": (tmp_path / "m.pt2", "--model", "resnet18"),
        "model.name: expected one of .* got 'resnet19'; did you mean 'resnet18'": (file, "--model", "resnet19", root),
    }


def test_options_that_say_nothing_are_one_sentence(tmp_path, folder, model):
    torch.save(model.state_dict(), tmp_path / "w.pt")
    for message, arguments in refusals(tmp_path, folder).items():
        done = run("eval", *arguments)
        assert done.exit_code == 2
        assert re.search(message, done.stderr), done.stderr
        assert done.stderr.count("\n") == 1


def test_a_state_dict_without_a_model_and_of_another_one_names_the_nearest(tmp_path, folder, model, monkeypatch):
    monkeypatch.setattr(foreign, "nearest_model", lambda tensors, *rest: f"; nearest: {len(tensors)} {rest}")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    done = run("eval", tmp_path / "w.pt")
    assert (
        "expected a checkpoint of robust-moe, got a plain state dict; --model NAME says of which model" in done.stderr
    )
    assert done.stderr.endswith("; nearest: 62 ('', 3, 32)\n")
    done = run("eval", tmp_path / "w.pt", "--model", "resnet18", f"data.root={folder}")
    assert "weights of another model: missing " in done.stderr
    assert done.stderr.endswith("; nearest: 62 ('resnet18', 3, 8)\n")


def test_a_checkpoint_of_ours_says_its_model_itself(tmp_path, folder, tiny):
    from robust_moe.engine import Reporter, Trainer

    Trainer(tiny("run.epochs=1", "method.name=standard"), Reporter(enabled=False)).fit()
    done = run("eval", tmp_path / "run", "--model", "resnet18", f"data.root={folder}")
    assert "expected a state dict, got a checkpoint of robust-moe, which says its model" in done.stderr


def test_the_nearest_model_is_found_by_names_and_shapes():
    """Whatever the number of classes; a model of nothing has none."""
    import timm

    state = timm.create_model("resnet26", num_classes=7).state_dict()
    assert nearest_model(state, "timm:resnet26t", 3, 32) == "; nearest: --model timm:resnet26 (176 of 176 tensors)"
    assert nearest_model({"a": torch.zeros(3, 4)}, "resnet18", 3, 32) == ""
