"""AutoAttack against the authors' code (pyautoattack), image by image. Both draw their own random numbers."""

from __future__ import annotations

import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyautoattack import AutoAttack as Standard
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robust_moe.attacks import APGD, FAB, AutoAttack, Square


@pytest.fixture(autouse=True)
def quiet():
    """Their warning about points without a gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Warning)
        yield


def robust(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def ours(eps: float, norm: str, steps: int, targets: int, queries: int) -> AutoAttack:
    attacks = [
        APGD(eps, steps, norm),
        APGD(eps, steps, norm, "dlr-targeted", n_targets=targets),
        FAB(eps, steps, norm, targeted=True, n_targets=targets),
        Square(eps, queries, norm),
    ]
    return AutoAttack(eps, norm, "custom", attacks)


def theirs(model: nn.Module, eps: float, norm: str, steps: int, targets: int, queries: int) -> Standard:
    standard = Standard(model, eps=eps, norm=norm, seed=0, version="standard")
    for attack in (standard.apgd, standard.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
        attack.n_iter_2, attack.n_iter_min = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        attack.size_decr = max(int(0.03 * steps), 1)
    standard.fab.n_iter = steps
    standard.apgd_targeted.n_target_classes = standard.fab.n_target_classes = targets
    standard.square.n_queries = queries
    return standard


def masks(model: nn.Module, x: Tensor, y: Tensor, *settings) -> tuple[Tensor, Tensor]:
    mine = robust(model, ours(*settings)(model, x, y), y)
    other, _ = theirs(model, *settings).run_standard_evaluation(x, y)
    return mine, robust(model, other, y)


@pytest.mark.parametrize(
    ("norm", "eps", "settings"),
    [("Linf", 0.15, (100, 9, 500)), ("L2", 0.7, (30, 3, 200))],  # steps, targets, queries: 5000 would add nothing here
)
def test_digits_cnn(victim, norm, eps, settings):
    digits = load_digits()
    x = torch.tensor(digits.images[1400:1720], dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target[1400:1720])
    mine, other = masks(victim.model, x, y, eps, norm, *settings)
    assert len(y) >= 300
    assert 0.25 < other.float().mean() < 0.75
    assert abs(mine.float().mean() - other.float().mean()) <= 0.005
    assert (mine == other).float().mean() >= 0.98


@pytest.fixture(scope="module")
def cifar10() -> tuple[nn.Module, Tensor, Tensor]:
    """The ResNet-18 that comes with pyautoattack and the CIFAR-10 images that come with foolbox."""
    from pyautoattack.examples.resnet import ResNet18

    model = ResNet18()
    weights = resources.files("pyautoattack") / "examples" / "model_test.pt"
    model.load_state_dict(torch.load(str(weights), map_location="cpu", weights_only=True))
    files = sorted(Path(str(resources.files("foolbox") / "data")).glob("cifar10_*.png"))
    x = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    y = torch.tensor([int(file.stem.rsplit("_", 1)[1]) for file in files])
    return model.eval(), x.permute(0, 3, 1, 2).contiguous().float() / 255, y


def test_cifar10_resnet18(cifar10):
    """Few and short attacks, on both sides alike: a whole evaluation of this network is a benchmark's work."""
    model, x, y = cifar10
    assert (len(y), int(robust(model, x, y).sum())) == (20, 20)
    mine, other = masks(model, x, y, 1 / 255, "Linf", 5, 2, 20)
    assert 5 <= other.sum() <= 15
    assert torch.equal(mine, other)
