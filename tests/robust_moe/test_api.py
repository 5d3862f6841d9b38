"""``import robust_moe``: train, load and evaluate from Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from wrapped_models import Counting

import robust_moe
from robust_moe.attacks import PGD
from robust_moe.config import preset_names
from robust_moe.engine import load_checkpoint
from robust_moe.evaluation import ResumeError, samples_file
from robust_moe.evaluation.stages import identity
from robust_moe.precision import Bfloat16
from robust_moe_kernels.modules import replace_blocks

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "evaluate.md"


class Block(nn.Module):
    """A basic block as torchvision has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.downsample, self.stride = nn.ReLU(inplace=True), None, 1

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def cnn() -> nn.Sequential:
    """A plain CNN of three classes, in train mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


class Returning(nn.Module):
    """The plain CNN, whose logits are returned in something."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = cnn(), how

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        found = {
            "tuple": (logits, logits.mean()),
            "features first": [x, logits],
            "mapping": {"loss": None, "logits": logits},
            "features": {"features": logits},
            "nothing": None,
        }
        return found[self.how]


def images(model: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    """Random images, and what the model says, but of the first."""
    x = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    model.train()
    y[0] = (y[0] + 1) % 3
    return x, y


def plain(results: dict) -> dict:
    """Without times, which differ from call to call."""
    text = json.dumps(results)
    return json.loads(re.sub(r'"(seconds|time)": [^,}]+', '"when": 0', text))


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_a_plain_cnn_in_memory():
    model = cnn()
    x, y = images(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    found = robust_moe.evaluate(model, x, y, eps="4/255", batch_size=5)
    model.eval()
    adversarial = PGD(4 / 255, 20)(model, x, y)
    with torch.no_grad():
        robust = (model(adversarial).argmax(1) == y) & (model(x).argmax(1) == y)
    assert found["clean"] == pytest.approx(11 / 12)
    assert found["robust"] == robust.double().mean().item()
    assert (found["eps"], found["norm"], found["preset"], found["count"]) == ("4/255", "Linf", "quick", 12)
    (attack,) = found["attacks"]
    assert (attack["name"], attack["settings"]["steps"], attack["settings"]["alpha"]) == ("pgd", 20, "1/510")
    assert found["model"] == {
        **found["model"],
        "name": "Sequential",
        "parameters": sum(map(torch.numel, model.parameters())),
    }
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("how", ["tuple", "features first", "mapping"])
def test_logits_may_be_returned_in_something(how):
    """The numbers of the bare network, and the model keeps its name, mode and parameters."""
    model, bare = Returning(how), cnn()
    x, y = images(bare)
    found, expected = (robust_moe.evaluate(each, x, y, eps="4/255") for each in (model, bare))
    assert (found["clean"], found["robust"]) == (expected["clean"], expected["robust"])
    assert found["model"]["name"] == "Returning"
    assert model.training


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: (x.half().numpy(), y.numpy().astype(np.uint8)),
        lambda x, y: (x.double().numpy(), y.numpy()),
        lambda x, y: (x.tolist(), y.tolist()),
        lambda x, y: (x, [("cat", "dog", "emu")[label] for label in y]),
        lambda x, y: (x + 5e-7 * (x == x.max()) - 5e-7 * (x == x.min()), y.int()),
    ],
    ids=["arrays", "half precision and bytes", "double precision", "lists", "names", "a rounding outside"],
)
def test_images_and_labels_may_be_something_else(change):
    model, classes = cnn(), ["cat", "dog", "emu"]
    x, y = images(model)
    x = x.mul(256).floor().div(256)  # whole in half precision
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    given, labels = change(x, y)
    found = robust_moe.evaluate(model, given, labels, eps="1/255", attack="fgsm", class_names=classes)
    expected = robust_moe.evaluate(model, x, y, eps="1/255", attack="fgsm", class_names=classes)
    assert (found["clean"], found["robust"]) == (expected["clean"], expected["robust"])


@pytest.mark.parametrize(("faster", "kind"), [(True, "bfloat16"), (False, "float32")])
def test_fast_attacks_are_in_bfloat16_where_that_is_faster(monkeypatch, capsys, faster, kind):
    half = Bfloat16(faster, "the processor is one")
    monkeypatch.setattr("robust_moe.report.bfloat16_of", lambda device: half)
    model = cnn()
    found = robust_moe.evaluate(model, *images(model), eps="4/255", attack="fgsm", fast=True, progress=True)
    assert found["attack_dtype"] == kind
    assert ("fast: the processor is one; the attacks run in float32" in capsys.readouterr().out) is not faster


def test_a_number_is_the_fraction_that_it_is():
    model = cnn()
    given = images(model)
    found = [robust_moe.evaluate(model, *given, eps=eps) for eps in (8 / 255, "8/255")]
    assert plain(found[0]) == plain(found[1])


def test_the_attack_has_the_ball_of_the_evaluation():
    model = cnn()
    given = images(model)
    attack = PGD.Config(eps="1/255", steps=3, restarts=2)
    (done,) = robust_moe.evaluate(model, *given, eps=0.5, norm="L2", attack=attack)["attacks"]
    assert (done["settings"]["eps"], done["settings"]["norm"], done["settings"]["restarts"]) == ("1/2", "L2", 2)
    (done,) = robust_moe.evaluate(model, *given, eps=0.02, attack="fgsm")["attacks"]
    assert (done["name"], done["settings"]["eps"]) == ("fgsm", "1/50")


def test_files_are_what_is_returned(tmp_path):
    model = cnn()
    x, y = images(model)
    path, report = tmp_path / "new" / "mine.json", tmp_path / "page.html"
    found = robust_moe.evaluate(
        model, (x * 255).to(torch.uint8), y, eps=0.02, class_names=["cat", "dog", "emu"], results=path, report=report
    )
    assert json.loads(path.read_text()) == found
    assert found["data"]["classes"] == ["cat", "dog", "emu"]
    with np.load(samples_file(path)) as samples:
        assert samples["robust"].mean() == found["robust"]
    assert "Sequential: robustness report" in report.read_text()
    assert {item.name for item in tmp_path.rglob("*")} == {"new", path.name, samples_file(path).name, "page.html"}


@pytest.mark.parametrize("written", ["results", "report"])
def test_stopped_in_the_middle_it_goes_on(tmp_path, written):
    counting = Counting(cnn())
    given = images(counting.model)
    settings = {"eps": "8/255", "batch_size": 4, written: tmp_path / "mine.json", "attack": PGD.Config(steps=3)}
    whole = robust_moe.evaluate(counting, *given, **{**settings, written: tmp_path / "whole.json"})
    stopped, rest, idle = (
        Counting(counting.model, counting.calls - 4),
        Counting(counting.model),
        Counting(counting.model),
    )
    with pytest.raises(KeyboardInterrupt):
        robust_moe.evaluate(stopped, *given, **settings)
    assert {item.suffix for item in tmp_path.glob("mine*")} == {".journal"}
    with pytest.raises(ResumeError, match="seed: 1 here, 0 there"):
        robust_moe.evaluate(rest, *given, **settings, seed=1)
    again = robust_moe.evaluate(rest, *given, **settings)
    assert rest.images <= 2 * 4 * (3 + 1)  # the last batch or two of PGD, and their scores
    for one in (whole, again):
        one.pop("samples", None)
    assert plain(again) == plain(whole)
    assert not list(tmp_path.glob("*.journal"))
    if written == "results":
        assert plain(robust_moe.evaluate(idle, *given, **settings))["robust"] == whole["robust"]
        assert idle.images == 0  # it is finished
        robust_moe.evaluate(idle, *given, **settings, resume=False)
        assert idle.images == counting.images


def test_numbers_of_other_settings_do_not_survive_a_new_start(tmp_path):
    counting = Counting(cnn())
    given = images(counting.model)
    files = {"results": tmp_path / "mine.json", "report": tmp_path / "page.html"}
    robust_moe.evaluate(counting, *given, eps=0.02, batch_size=4, **files)
    stopped = Counting(counting.model, counting.calls - 4)
    with pytest.raises(KeyboardInterrupt):
        robust_moe.evaluate(stopped, *given, eps=0.03, batch_size=4, **files, resume=False)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.journal"]


def test_a_missing_report_of_finished_numbers_is_drawn(tmp_path):
    model = Counting(cnn())
    settings = {"eps": 0.02, "results": tmp_path / "a.json"}
    given = images(model.model)
    robust_moe.evaluate(model, *given, **settings)
    before = model.images
    robust_moe.evaluate(model, *given, **settings, report=tmp_path / "a.html")
    assert (model.images, (tmp_path / "a.html").is_file()) == (before, True)


def test_standard_is_autoattack():
    model = cnn()
    found = robust_moe.evaluate(model, *images(model, 4), eps=0.001, preset="standard", attack=PGD.Config(steps=1))
    assert [attack["name"] for attack in found["attacks"]] == ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert found["robust"] <= found["autoattack"] <= found["clean"]


def test_moe_is_the_mixtures_attacks_and_a_curve():
    model = cnn()
    replace_blocks(model, "2", num_experts=2, top_k=1, init="fresh")
    given = images(model, 6)
    found = robust_moe.evaluate(model, *given, eps="2/255", preset="moe", attack=PGD.Config(steps=1))
    names = ["pgd", "ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer"]
    assert [attack["name"] for attack in found["attacks"]] == names
    assert found["moe"]["union"] == found["robust"]
    assert list(found["moe"]["layers"]) == ["2"]
    assert len(found["curve"]["robust"]) == 20


def test_progress_says_so(capsys):
    model = cnn()
    robust_moe.evaluate(model, *images(model), eps=0.02, preset="moe", attack=PGD.Config(steps=1), progress=True)
    assert "the model is dense" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda x: x}, "model: expected a torch.nn.Module, got function"),
        ({"model": Returning("features")}, "model: expected a module that returns logits [B, classes], or a tuple"),
        ({"model": Returning("nothing")}, "model: expected a module that returns logits [B, classes], or a tuple"),
        ({"images": [[1.0]]}, "images: expected shape [n, C, H, W] with n >= 1, got [1, 1]"),
        ({"images": "cat.png"}, "images: expected a tensor, or an array of numbers, got an array of <U7"),
        ({"images": None}, "images: expected a tensor, an array or a list, got NoneType"),
        ({"images": [[1.0], [1.0, 2.0]]}, "images: expected a tensor, an array or a list, got list"),
        (
            {"images": np.zeros((12, 8, 8, 3), np.uint8)},
            "images: expected shape [n, C, H, W], as of images.transpose(0, 3, 1, 2), got [12, 8, 8, 3], with the",
        ),
        (
            {"images": torch.zeros(12, 8, 8, 3)},
            "images: expected shape [n, C, H, W], as of images.permute(0, 3, 1, 2), got [12, 8, 8, 3], with the",
        ),
        (
            {"images": torch.full((12, 3, 8, 8), 1.001)},
            "images: expected finite pixels in [0, 1], got values from 1.001 to 1.001; ",
        ),
        ({"labels": ["cat"] * 12}, "labels: expected numbers 0..classes-1, or class_names beside them, got names such"),
        (
            {"labels": ["cta"] * 12, "class_names": ["cat", "dog", "emu"]},
            "labels: expected names out of class_names, got 'cta'; did you mean 'cat'?",
        ),
        ({"labels": [0.5] * 12}, "labels: expected whole numbers 0..classes-1, or names with class_names beside them"),
        (
            {"images": np.zeros((12, 3, 8, 8), np.int64)},
            "images: expected uint8 in 0..255, or floats in [0, 1], got torch.int64",
        ),
        ({"images": torch.zeros(3, 8, 8)}, "images: expected shape [n, C, H, W] with n >= 1, got [3, 8, 8]"),
        (
            {"images": torch.full((12, 3, 8, 8), 3.0)},
            "images: expected finite pixels in [0, 1], got values from 3 to 3; ",
        ),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            "labels: expected int64 of shape [12], got torch.int64 of shape",
        ),
        ({"labels": torch.full((12,), 3)}, "labels: expected 0..2, as many as logits, got 3..3"),
        ({"labels": None}, "labels: expected a tensor, an array or a list, got NoneType"),
        ({"eps": "8/0"}, "eps: expected"),
        ({"eps": -1}, "eps: expected"),
        ({"eps": float("nan")}, "eps: expected"),
        ({"eps": 8}, "eps: expected a radius of Linf in [0, 1], as pixels are, or 8/255, got '8'"),
        ({"norm": "L1"}, "norm: expected"),
        ({"preset": "fast"}, "preset: expected one of quick, standard, rand, full, moe, vmoe, got 'fast'"),
        (
            {"preset": "moe", "attack": "square"},
            "attack.name: expected 'pgd' with preset 'moe', whose attacks are, got",
        ),
        ({"attack": "pdg"}, "attack: expected one of"),
        ({"attack": PGD(0.1, 3)}, "attack: expected an attack's Config, its name or None, got <"),
        ({"fast": "yes"}, "fast: expected True or False, got 'yes'"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected a count >= 1, got 0"),
        ({"class_names": ["one"]}, "class_names: expected more than"),
        ({"results": "."}, "results: expected a file to write, got the folder ."),
        ({"results": "a.json", "report": "a.json"}, "report: expected another file than results, got a.json"),
    ],
)
def test_bad_input_is_one_sentence(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = cnn()
    x, y = images(model)
    with pytest.raises(ValueError) as error:
        robust_moe.evaluate(**{"model": model, "images": x, "labels": y, "eps": 0.02, "results": "a.json", **change})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.journal"))


# --- train and load ---------------------------------------------------------------------------------------------------


def test_trained_then_loaded_without_its_data(tiny, monkeypatch):
    config = tiny("run.epochs=1", "run.ema_decay=0.5")
    outcome = robust_moe.train(config, ["run.max_steps=3"])
    assert (outcome.finished, outcome.steps, str(outcome.folder)) == (True, 3, config.run.out)

    def refuse(*_: object) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr("robust_moe.engine.experiment.load_splits", refuse)
    last = load_checkpoint(outcome.folder / "last.pt")
    for averaged, weights in ((True, last["ema"]["model"]), (False, last["model"])):
        model = robust_moe.load_model(outcome.folder / "last.pt", device="cpu", averaged=averaged)
        assert not model.training
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    best = robust_moe.load_model(outcome.folder, device="cpu")
    weights = load_checkpoint(outcome.folder / "best.pt")["ema"]["model"]
    assert all(torch.equal(value, weights[name]) for name, value in best.state_dict().items())
    assert best(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_a_preset_by_its_name(tmp_path):
    assert robust_moe.list_presets() == preset_names()
    overrides = ["data.train_limit=64", "data.test_limit=20", "run.max_steps=1", "run.batch_size=16"]
    out = robust_moe.train("digits-dense", [*overrides, f"run.out={tmp_path / 'a'}", "run.accelerator=cpu"])
    assert (out.finished, out.folder) == (True, tmp_path / "a")
    with pytest.raises(ValueError, match="did you mean 'digits-dense'"):
        robust_moe.train("digits-dens")


# --- the package ------------------------------------------------------------------------------------------------------


def test_importing_it_is_light():
    program = "import sys, robust_moe; print('torch' in sys.modules, set(robust_moe.__all__) <= set(dir(robust_moe)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="module 'robust_moe' has no attribute 'evalute'"):
        _ = robust_moe.evalute


def test_no_module_of_the_evaluation_imports_one_that_imports_it():
    """Nor for types."""
    folder = Path(robust_moe.__file__).parent / "evaluation"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    needs = {
        name: set(re.findall(r"from robust_moe\.evaluation\.(\w+)", (folder / f"{name}.py").read_text())) & names
        for name in names
    }
    while free := [name for name in needs if not needs[name] & needs.keys()]:
        for name in free:
            del needs[name]
    assert not needs


def test_a_tensor_of_one_element_has_an_identity():
    one = torch.zeros(3, 1, dtype=torch.int64)[:, 0][:1].expand(1).as_strided((1,), (0,))
    found = identity(nn.Flatten(), torch.zeros(1, 1, 2, 2), one, [], {})
    assert found["data"] == identity(nn.Flatten(), torch.zeros(1, 1, 2, 2), one.clone(), [], {})["data"]


def test_the_tutorials_snippet_runs(tmp_path, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").partition("\n## As a library\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    small = ["data.train_limit=64", "data.test_limit=20", "run.max_steps=1", "run.batch_size=16", "run.accelerator=cpu"]
    real = robust_moe.train
    monkeypatch.setattr(robust_moe, "train", lambda name, more: real(name, [*more, *small]), raising=False)
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.rand(6, 1, 8, 8), "labels": torch.arange(6)}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["numbers"]["count"] == 6
    assert (tmp_path / "numbers.json").is_file()
    assert (tmp_path / "report.html").is_file()
