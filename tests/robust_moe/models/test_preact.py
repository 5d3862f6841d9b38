"""Pre-activation networks: published sizes, names of published weights, and the function against plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.models import MODELS, PreActResNet18Config, WideResNetConfig, build_model
from robust_moe.settings import ConfigError

CIFAR = {"num_classes": 10, "channels": 3, "image_size": 32}
TINY = {"num_classes": 5, "channels": 3, "image_size": 8, "mean": (0.5, 0.25, 0.375), "std": (0.5, 0.25, 0.125)}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("wrn28_10", 36.48), ("wrn34_10", 46.16), ("preact_resnet18", 11.17)],
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float):
    """Wide Residual Networks, table 4, and the tables of RobustBench and of Rice et al., to two decimals."""
    with torch.device("meta"):
        model = build_model(MODELS[name](), **CIFAR)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


class Formulas:
    """Layers by their names in a state_dict."""

    def __init__(self, model: nn.Module, training: bool) -> None:
        self.state = {name: value.clone() for name, value in model.state_dict().items()}
        self.training = training

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def active(self, name: str, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        if self.training:
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        return ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp_min(0)

    def block(self, name: str, x: Tensor, stride: int, shortcut: str) -> Tensor:
        out = self.active(f"{name}.bn1", x)
        skip = self.conv(f"{name}.{shortcut}", out, stride) if f"{name}.{shortcut}.weight" in self.state else x
        out = self.conv(f"{name}.conv1", out, stride)
        return self.conv(f"{name}.conv2", self.active(f"{name}.bn2", out)) + skip

    def logits(self, x: Tensor, stages: list[list[str]], shortcut: str, norm: str, linear: str) -> Tensor:
        x = self.conv("conv1", (x - self.state["normalize.mean"]) / self.state["normalize.std"])
        for place, stage in enumerate(stages):
            for number, name in enumerate(stage):
                x = self.block(name, x, 2 if place > 0 and number == 0 else 1, shortcut)
        features = self.active(norm, x).mean((2, 3))
        return features @ self.state[f"{linear}.weight"].T + self.state[f"{linear}.bias"]


def shaken(model: nn.Module) -> nn.Module:
    """Norms that are not the identity."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("config", "stages", "names"),
    [
        (
            PreActResNet18Config(width=4, blocks=(2, 1, 1)),
            [["layer1.0", "layer1.1"], ["layer2.0"], ["layer3.0"]],
            ("shortcut.0", "bn", "linear"),
        ),
        (
            MODELS["wrn28_10"](depth=16, widen=1),
            [[f"block{stage}.layer.{number}" for number in range(2)] for stage in (1, 2, 3)],
            ("convShortcut", "bn1", "fc"),
        ),
    ],
    ids=["preact", "wide"],
)
def test_the_function_is_that_of_the_formulas(config, stages, names, training: bool):
    torch.manual_seed(0)
    model = shaken(build_model(config, **TINY)).double().train(training)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    expected = Formulas(model, training).logits(x, stages, *names)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_dropout_is_between_the_convolutions():
    model = build_model(MODELS["wrn28_10"](depth=10, widen=1, dropout=0.5), **TINY)
    x = torch.rand(4, 3, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("depth", [9, 27, 29])
def test_depths_that_are_no_wide_resnet_are_refused(depth: int):
    with pytest.raises(ConfigError, match="depth: expected"):
        WideResNetConfig(depth=depth)


@pytest.mark.parametrize("name", ["wrn28_10", "preact_resnet18"])
def test_images_that_are_too_small_are_refused(name: str):
    with pytest.raises(ValueError, match="image_size: expected >= "):
        build_model(MODELS[name](), 10, 3, 2)
