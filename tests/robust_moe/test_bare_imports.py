"""With PyTorch, Triton and NumPy alone: attacks, models, methods and the benchmarks import and run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest

from robust_moe import provenance
from robust_moe_kernels import env

ABSENT = (
    "jinja2",
    "lightning",
    "lightning_fabric",
    "matplotlib",
    "PIL",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
    "typer",
    "yaml",
)

SLOW = (
    "lightning_fabric",
    "matplotlib",
    "scipy.stats",
    "timm",
    "torch._dynamo",
    "torchvision",
)  # a second each, and more

BARE = """
import json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # importing it raises ImportError
"""

ATTACK_AND_TRAIN = """
import torch
from robust_moe.attacks import PGD
from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.methods import PGDAdversarialTraining
from robust_moe.models import MoEConfig, ResNet18Config, build_model

attack = PGD.Config(alpha="2/255", steps=2)
config = TrainConfig(
    model=ResNet18Config(width=4, moe=MoEConfig(layers=["layer4.1"], num_experts=3)),
    method=PGDAdversarialTraining.Config(attack=attack),
)
torch.manual_seed(0)
model = build_model(config.model, num_classes=10, channels=3, image_size=8)
images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
moved = (PGD(eps=8 / 255, steps=2)(model, images, labels) - images).abs().max()
(update,) = config.method.build(config.model).updates(model, Batch(images, labels, torch.arange(4)), step_seed=1)
update.loss.backward()
print(0 < moved.item() <= 8 / 255 + 1e-6, model.conv1.weight.grad.abs().sum().item() > 0)
"""

BENCHMARKS = """
import importlib
from {command} import main
from robust_moe.benchmarks.command import BENCHMARKS
assert "torch" not in sys.modules  # nor is it in each worker process of a program, before the program asks for it
assert all(callable(importlib.import_module(f"robust_moe.benchmarks.{{name}}").run) for name in BENCHMARKS)
sys.argv = ["benchmarks", "--help"]
main()
"""

PROVENANCE = """
from robust_moe.provenance import provenance
print(json.dumps(provenance("cpu")["versions"]))
"""


def bare(program: str) -> str:
    """Output of a fresh process in which nothing of ``ABSENT`` can be imported."""
    command = [sys.executable, "-c", BARE + program, json.dumps(ABSENT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attacks_models_and_methods_run():
    assert bare(ATTACK_AND_TRAIN).split() == ["True", "True"]


@pytest.mark.parametrize(
    ("command", "called", "programs"),
    [
        ("robust_moe.benchmarks.__main__", "python -m robust_moe.benchmarks", False),  # as installed
        ("benchmarks.__main__", "python -m benchmarks", True),  # of a clone
    ],
)
def test_the_benchmarks_start(command, called, programs):
    said = bare(BENCHMARKS.format(command=command))
    assert said.startswith(f"usage: {called} ")
    assert "train_step" in said
    assert ("gpu_campaign" in said) == programs


def test_what_numbers_came_from_can_be_said():
    assert json.loads(bare(PROVENANCE))["torch"]


def test_a_distribution_that_is_missing_is_said_and_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    real = metadata.version

    def version(name: str) -> str:
        if name in ("lightning-fabric", "torchvision", "robust-moe-kernels"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(env.metadata, "version", version)
    found = provenance.versions()
    assert found["lightning-fabric"] == found["torchvision"] == found["robust-moe-kernels"] == "not installed"
    assert found["torch"] != "not installed"


def test_a_command_starts_without_what_it_may_not_need():
    code = (
        "import json, sys, robust_moe.commands.train, robust_moe.commands.evaluate; print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(SLOW) & set(json.loads(done.stdout))
