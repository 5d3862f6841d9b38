"""What the trainer's tests share: a run small enough for a test, and a trained network to attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small_runs import TINY
from torch import Tensor, nn

from robust_moe.config import TrainConfig, config_from_dict, load_config
from robust_moe.settings import plain


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """``tiny("run.epochs=1", out="name")``: the configuration of a small run in a folder of its own."""

    def make(*overrides: str, out: str = "run") -> TrainConfig:
        small = plain(load_config(None, [*TINY, f"run.out={tmp_path / out}"]))
        return config_from_dict(small, list(overrides))

    return make


@pytest.fixture
def state_of() -> Callable[[nn.Module], dict[str, object]]:
    """``state_of(model)``: all that an attack has to leave as it found it; equal where nothing changed."""
    # not before tests/conftest.py has told Triton how to run
    from robust_moe_kernels.modules import moe_layers

    def state(model: nn.Module) -> dict[str, object]:
        return {
            "training": [module.training for module in model.modules()],
            "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
            "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            "values": {key: value.tolist() for key, value in model.state_dict().items()},
            "routing": [(id(layer.routing), layer.reroute, layer.fixed_expert) for layer in moe_layers(model).values()],
        }

    return state


class Victim(NamedTuple):
    """A network and images that it was not trained on."""

    model: nn.Module  # eval mode, float32, ten classes
    x: Tensor  # float32 [96, 1, 8, 8] in [0, 1]
    y: Tensor  # int64 [96]


@pytest.fixture(scope="session")
def victim() -> Victim:
    """The benchmarks' small CNN on digits: about half of its images survive 0.15 in ℓ∞."""
    # not before tests/conftest.py has told Triton how to run
    from robust_moe.benchmarks.autoattack import digits_cnn

    model, x, y = digits_cnn(torch.device("cpu"))
    return Victim(model.requires_grad_(False), x[:96], y[:96])


@pytest.fixture(scope="session")
def samples_of() -> Callable[..., dict[str, np.ndarray]]:
    """``samples_of(count=3, channels=3, size=8)``: examples that change by 0.03 everywhere; the third is seen as a
    class that a data set of three has no name for."""

    def make(count: int = 3, channels: int = 3, size: int = 8) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        clean = rng.uniform(0.2, 0.8, (count, channels, size, size)).astype(np.float32)
        return {
            "examples/index": np.arange(count) * 10,
            "examples/label": np.arange(count),
            "examples/prediction": np.array([0, 0, 2])[:count],
            "examples/adversarial_prediction": np.arange(count) + 1,
            "examples/clean": clean,
            "examples/adversarial": clean + rng.choice([-0.03, 0.03], clean.shape).astype(np.float32),
        }

    return make


@pytest.fixture
def deterministic() -> Iterator[None]:
    """cuDNN's and PyTorch's own kernels give the same bits each time."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.backends.cudnn.deterministic = cudnn
