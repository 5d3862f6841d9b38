"""Models, gates, routers and balance losses from outside: each a class or function with settings, registered here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torchvision
from torch import Tensor, nn

from robust_moe.config import TrainConfig, config_from_dict, load_config
from robust_moe.data import Batch
from robust_moe.engine.experiment import make_method
from robust_moe.models import (
    BALANCE_LOSSES,
    GATES,
    MODELS,
    ROUTERS,
    BalanceLoss,
    ExpertMixture,
    GateConfig,
    ImageSpec,
    ModelConfig,
    Normalize,
    Router,
    RouterConfig,
    TokenGateConfig,
    build_model,
)
from robust_moe.settings import Config, ConfigError, Table, plain, setting
from robust_moe_kernels.modules import FusedMLPMoE, RoutingRecord, moe_layers


@dataclass(frozen=True, kw_only=True)
class OutsideConfig(ModelConfig):
    channels: int = setting(4, "of the first stage", at_least=1)


def outside(images: ImageSpec, channels: int) -> nn.Module:
    """torchvision's ResNet-18, which knows nothing of the data's mean, narrowed."""
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=images.num_classes)
    net.conv1 = nn.Conv2d(images.channels, 64, 3, 2, 1, bias=False)
    net.extra = nn.Linear(channels, 1)  # somewhere for the setting to show
    return net


class Patches(nn.Module):
    """A network that normalises its images itself."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        normalizes: ClassVar[bool] = True
        side: int = setting(4, "of a patch", unit="pixels", at_least=1)

        def check_images(self, images: ImageSpec, alone: bool) -> None:
            if images.image_size % self.side:
                raise ValueError(f"image_size: expected a multiple of {self.side} pixels, got {images.image_size}")

    def __init__(self, images: ImageSpec, side: int) -> None:
        super().__init__()
        self.normalize = Normalize(images.mean, images.std)
        self.cut = nn.Conv2d(images.channels, 8, side, side)
        self.head = nn.Linear(8, images.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cut(self.normalize(x)).relu().mean((2, 3)))


class MaxGate(nn.Module):
    @dataclass(frozen=True, kw_only=True)
    class Config(GateConfig):
        temperature: float = setting(1.0, "that logits are divided by", above=0)

    def __init__(self, in_channels: int, num_experts: int, temperature: float) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, num_experts)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.amax((2, 3))) / self.temperature


@dataclass(frozen=True, kw_only=True)
class HiddenConfig(RouterConfig):
    hidden: int = setting(8, "units", at_least=1)


def hidden(images: ImageSpec, num_experts: int, hidden: int) -> nn.Module:
    def body(channels: int, size: int, experts: int) -> nn.Module:
        pixels = channels * size * size
        return nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, experts))

    return Router(body, images.channels, images.image_size, num_experts, images.mean, images.std)


class PowerLoss(BalanceLoss):
    @dataclass(frozen=True, kw_only=True)
    class Config(BalanceLoss.Config):
        power: float = setting(2.0, "of the mean scores", above=1)

    def __init__(self, power: float) -> None:
        self.power = power

    def __call__(self, routing: RoutingRecord) -> Tensor:
        return routing.mean_scores.pow(self.power).sum()


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(TokenGateConfig):
    scale: float = setting(1.0, "of the tokens", above=0)


class ScaledGate(nn.Module):
    """Of tokens, [N, C] to [N, E]."""

    def __init__(self, in_channels: int, num_experts: int, scale: float) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(in_channels, num_experts), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.scale * x)


OUTSIDE: list[tuple[Table, str, object, type[Config] | None]] = [
    (MODELS, "outside", outside, OutsideConfig),
    (MODELS, "patches", Patches, None),
    (GATES, "max", MaxGate, None),
    (GATES, "scaled", ScaledGate, ScaledConfig),
    (ROUTERS, "hidden", hidden, HiddenConfig),
    (BALANCE_LOSSES, "power", PowerLoss, None),
]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the tests of this file alone: others run over all that is registered."""
    for table in {id(table): table for table, *_ in OUTSIDE}.values():
        monkeypatch.setattr(table, "_entries", dict(table._entries))
    for table, name, component, config in OUTSIDE:
        table.register(name, config)(component)
    yield


IMAGES = {"num_classes": 10, "channels": 1, "image_size": 16, "mean": [0.25], "std": [0.5]}


def load(*overrides: str) -> TrainConfig:
    """The configuration, which survives being written."""
    config = load_config(None, [*overrides, "run.accelerator=cpu"])
    assert config_from_dict(plain(config)) == config
    return config


def test_a_model_gets_its_settings_normalised_images_and_experts():
    config = load("model.name=outside", "model.channels=7", "model.moe.layers=[layer4.0]", "model.moe.init=copy")
    torch.manual_seed(0)
    model = build_model(config.model, **IMAGES).eval()
    bare, (layer,) = model.network, moe_layers(model).values()
    assert isinstance(bare, torchvision.models.ResNet) and bare.extra.in_features == 7
    assert list(moe_layers(model)) == ["network.layer4.0"] and (layer.num_experts, layer.top_k) == (4, 2)
    x = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(model(x), bare((x - 0.25) / 0.5))
    assert model(x).shape == (3, 10)
    assert layer.routing.indices.shape == (3, 2)


def test_a_model_that_normalises_itself_is_left_alone():
    model = build_model(load("model={name: patches, side: 8}").model, **IMAGES)
    assert isinstance(model, Patches) and model.cut.kernel_size == (8, 8)
    with pytest.raises(ValueError, match="image_size: expected a multiple of 5 pixels, got 16"):
        build_model(load("model={name: patches, side: 5}").model, **IMAGES)
    with pytest.raises(ConfigError, match=r"^model.side: expected a whole number of pixels >= 1, got 0"):
        load("model={name: patches, side: 0}")
    with pytest.raises(ConfigError, match=r"unknown key 'model.width' of model 'patches'"):
        load("model.name=patches", "model.width=3")


def test_a_model_is_the_expert_of_a_mixture_and_half_of_a_dual_model():
    config = load(
        "model.name=outside",
        "model.channels=3",
        "model.mixture.num_experts=2",
        "model.dual.enabled=true",
        "model.dual.standard={name: patches, side: 2}",
    )
    model = build_model(config.model, **IMAGES)
    assert isinstance(model.robust, ExpertMixture)
    assert [network.network.extra.in_features for network in model.robust.experts.networks] == [3, 3]
    assert isinstance(model.standard, Patches) and model.standard.cut.kernel_size == (2, 2)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 10)


def test_an_unnamed_standard_half_is_the_same_model():
    config = load("model.name=outside", "model.channels=3", "model.dual={enabled: true, standard: {init_from: a.pt}}")
    assert config.model.standard() == MODELS["outside"](channels=3, init_from="a.pt")
    config = load("model.name=outside", "model.channels=3", "model.dual.enabled=true")
    assert config.model.standard() == MODELS["outside"](channels=3)


def test_a_gate_has_settings_of_its_own():
    chosen = "model.moe={layers: [layer4.0, layer4.1], gate: {name: max, temperature: 4}}"
    layers = list(moe_layers(build_model(load("model.width=2", chosen).model, **IMAGES)).values())
    assert [type(layer.gate) for layer in layers] == [MaxGate, MaxGate]
    assert [layer.gate.temperature for layer in layers] == [4, 4]
    assert [layer.gate.fc.in_features for layer in layers] == [8, 16]  # one gate per layer, made for its maps
    with pytest.raises(ConfigError, match=r"^model.moe.gate.temperature: expected a number > 0, got 0"):
        load("model.moe.gate={name: max, temperature: 0}")


def test_a_gate_of_tokens_routes_mlps():
    chosen = "model={name: vit_micro, width: 8, depth: 2, heads: 2, moe: {layers: [blocks.1.mlp]}}"
    gate = "model.moe.gate={name: scaled, scale: 3}"
    (layer,) = moe_layers(build_model(load(chosen, gate).model, **IMAGES)).values()
    assert isinstance(layer, FusedMLPMoE) and isinstance(layer.gate, ScaledGate)
    assert (layer.gate.scale, layer.gate.fc.in_features) == (3, 8)
    with pytest.raises(ConfigError, match=r"^model.moe.gate.scale: expected a number > 0, got 0"):
        load(chosen, "model.moe.gate={name: scaled, scale: 0}")


def test_a_router_has_settings_of_its_own():
    model = build_model(
        load("model={width: 2, blocks: [1], mixture: {num_experts: 3, router: {name: hidden, hidden: 5}}}").model,
        **IMAGES,
    )
    assert model.gate.body[1].weight.shape == (5, 256)
    x = torch.rand(4, 1, 16, 16)
    torch.testing.assert_close(model.gate(x), model.gate.body((x - 0.25) / 0.5))
    assert load("model.mixture.router=hidden").model.mixture.router.hidden == 8


def test_a_balance_loss_has_settings_of_its_own():
    chosen = "model.moe={layers: [layer4.1], balance: {name: power, weight: 0.25, power: 3}}"
    config = load("model.width=2", chosen, "method.name=standard")
    torch.manual_seed(0)
    model = build_model(config.model, **IMAGES).train()
    batch = Batch(torch.rand(6, 1, 16, 16), torch.arange(6), torch.arange(6))
    (update,) = make_method(config).updates(model, batch, step_seed=0)
    (layer,) = moe_layers(model).values()
    expected = layer.routing.mean_scores.pow(3).sum()
    assert torch.equal(update.logs["balance_loss"], expected.detach())
    assert torch.equal(update.loss.detach(), update.logs["task_loss"] + 0.25 * expected.detach())
    update.loss.backward()
    assert layer.gate.fc.weight.grad.any()


def test_another_balance_loss_keeps_the_weight():
    kept = load("model.moe.balance={name: kl, weight: 0.1}", "model.moe.balance.name=power").model.moe.balance
    assert kept == BALANCE_LOSSES["power"](weight=0.1)
    with pytest.raises(ConfigError, match=r"unknown key 'model.moe.balance.weight' of balance loss 'none'"):
        load("model.moe.balance={name: none, weight: 0.1}")
