"""The configurations that come with the package: of things that exist; each small twin is the same method."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import nn

from robust_moe.config import TrainConfig, load_config, preset_names
from robust_moe.data import DATASETS, IMAGE_KINDS
from robust_moe.engine import Reporter, Trainer, passes_of_run
from robust_moe.engine.experiment import make_model
from robust_moe.models import DualModel, ExpertMixture
from robust_moe_kernels.modules import FusedBlockMoE, FusedConvMoE, FusedMLPMoE, MoELayer, moe_layers

SMALL = [name for name in preset_names() if f"{name}-small" in preset_names()]


def model_of(config: TrainConfig) -> nn.Module:
    """Without memory for its weights, for the images that the preset is for."""
    classes, channels, size = IMAGE_KINDS.get(config.data.expects, (10, 1, config.data.image_size))
    name = config.data.expects or config.data.name
    data = {"name": name, "class_names": list(map(str, range(classes))), "channels": channels, "image_size": size}
    with torch.device("meta"):
        return make_model(config, {**data, "mean": [0.5] * channels, "std": [0.25] * channels})


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("name", preset_names())
def test_every_name_in_a_preset_exists(name: str):
    config = load_config(name)
    Trainer(config, Reporter(enabled=False))  # method, optimiser, schedule and attacks
    model = model_of(config)
    assert config.data.name in DATASETS
    for layer in moe_layers(model).values():
        assert layer.straight_through or layer.renormalize is False or layer.top_k > 1  # the gate learns
    images = "digits" if name.startswith("digits") else config.data.expects
    assert images.replace("_", "-") in name
    assert config.run.out == f"runs/{name}"


def one(model: nn.Module) -> MoELayer:
    (layer,) = moe_layers(model).values()
    return layer


def _block_r18(config: TrainConfig, model: nn.Module) -> None:
    layer = one(model)
    assert isinstance(layer, FusedBlockMoE) and (layer.num_experts, layer.top_k) == (4, 2)
    assert millions(model) == pytest.approx(11.2 + 3 * millions(layer.expert(0)), abs=0.05)
    assert (config.run.epochs, config.run.batch_size, config.method.attack.steps) == (200, 640, 7)


def _block_r50(config: TrainConfig, model: nn.Module) -> None:
    layer = one(model)
    assert isinstance(layer, FusedBlockMoE) and (layer.num_experts, layer.top_k) == (4, 2)
    assert millions(model) == pytest.approx(23.7 + 3 * millions(layer.expert(0)), abs=0.05)


def _conv_r18(config: TrainConfig, model: nn.Module) -> None:
    layer = one(model)
    assert isinstance(layer, FusedConvMoE) and (layer.num_experts, layer.top_k) == (4, 2)
    third_and_fourth = [name for name, module in model.named_modules() if name in ("layer4.1.conv1", "layer4.1.conv2")]
    assert third_and_fourth[1] in moe_layers(model)


def _rt_er(config: TrainConfig, model: nn.Module) -> None:
    assert isinstance(model, ExpertMixture) and (model.num_experts, model.top_k) == (4, 4)
    assert millions(model.experts) == pytest.approx(4 * 11.17, abs=0.05)
    assert (config.run.epochs, config.run.batch_size) == (130, 512)
    assert (config.optim.schedule.lr_min, config.optim.lr) == (5e-5, 1e-4)
    assert (config.eval.attack.steps, config.method.attack.steps, config.method.beta) == (50, 10, 6)


def _rt_er_tiny(config: TrainConfig, model: nn.Module) -> None:
    assert isinstance(model, ExpertMixture) and (model.num_experts, model.top_k) == (4, 4)
    assert millions(model.experts) == pytest.approx(4 * 21.47, abs=0.05)  # ViT-S with a head of 200 classes
    assert (config.run.epochs, config.run.batch_size, config.optim.lr) == (10, 512, 1e-4)
    assert {config.eval.attack.eps, config.method.attack.eps} == {Fraction(2, 255)}
    assert (config.eval.attack.steps, config.method.attack.steps, config.method.beta) == (50, 10, 6)


def _vmoe(config: TrainConfig, model: nn.Module) -> None:
    """V-MoE's "Last 3" of twelve blocks: of every second block, the last three."""
    layers = moe_layers(model)
    assert list(layers) == [f"network.blocks.{number}.mlp" for number in list(range(1, 12, 2))[-3:]]
    for layer in layers.values():
        assert isinstance(layer, FusedMLPMoE) and (layer.num_experts, layer.top_k) == (8, 2)
        assert (layer.noise, layer.noise_std, layer.renormalize, layer.straight_through) == ("vmoe", 1.0, False, False)
        assert not layer.route_options.limits
    mlp = millions(layer.expert(0))
    assert millions(model) == pytest.approx(5.36 + 3 * 7 * mlp, abs=0.05)


def _jtdmoe(config: TrainConfig, model: nn.Module) -> None:
    assert isinstance(model, DualModel) and model.alpha == 0.7
    assert list(moe_layers(model)) == ["standard", "robust"]


def _advmoe(config: TrainConfig, model: nn.Module) -> None:
    layers = moe_layers(model)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    # all in blocks are routed
    assert [name for name in convolutions if ".conv" in name and ".experts." not in name and ".gate." not in name] == []
    assert len(layers) == 16 and {layer.num_experts for layer in layers.values()} == {2}


def _speedrun(config: TrainConfig, gflop: float, seconds: float) -> None:
    """The goal, the cost that the file's header estimates, and that nothing is decided by another share of the run."""
    passes = passes_of_run(config, 49_000)
    estimate = passes * gflop * 1e9 / (0.4 * 790e12)
    assert passes == pytest.approx(23.1e6, rel=0.005)
    assert estimate == pytest.approx(seconds, abs=0.6) and estimate < 180
    assert (config.optim.schedule.name, config.optim.warmup_epochs, config.run.max_steps) == ("one_cycle", 0, None)
    assert (config.method.attack.eps, config.method.attack_steps_schedule[-1][1]) == (Fraction(8, 255), 7)
    assert config.run.precision == "bf16-mixed"


def _speedrun_r18(config: TrainConfig, model: nn.Module) -> None:
    _speedrun(config, 1.11, 81)
    assert not moe_layers(model) and millions(model) == pytest.approx(11.2, abs=0.05)


def _speedrun_blockmoe(config: TrainConfig, model: nn.Module) -> None:
    _speedrun(config, 1.17, 85)
    layer = one(model)
    assert isinstance(layer, FusedBlockMoE) and (layer.num_experts, layer.top_k) == (4, 2)
    assert (config.model.moe.balance.name, config.model.moe.balance.weight) == ("entropy", 0.5)
    dense = load_config("speedrun-cifar10-r18")
    for section in ("data", "method", "optim", "eval"):
        assert getattr(config, section) == getattr(dense, section)


PUBLISHED: dict[str, Callable[[TrainConfig, nn.Module], None]] = {
    "blockmoe-cifar10-r18": _block_r18,
    "blockmoe-cifar100-r18": _block_r18,
    "blockmoe-cifar100-r50": _block_r50,
    "convmoe-cifar100-r18": _conv_r18,
    "speedrun-cifar10-r18": _speedrun_r18,
    "speedrun-cifar10-blockmoe": _speedrun_blockmoe,
    "rt-er-cifar10": _rt_er,
    "jtdmoe-cifar10": _jtdmoe,
    "advmoe-cifar10": _advmoe,
    "rt-er-tiny-imagenet": _rt_er_tiny,
    "jtdmoe-tiny-imagenet": _jtdmoe,
    "vmoe-cifar10-vit-tiny": _vmoe,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str):
    config = load_config(name)
    PUBLISHED[name](config, model_of(config))


def test_the_published_presets_have_small_twins():
    assert set(PUBLISHED) == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_the_small_twin_is_the_same_method_on_the_same_data(name: str):
    config, small = load_config(name), load_config(f"{name}-small")
    assert small.method == config.method
    assert small.data.expects == config.data.expects
    for section in ("mixture", "dual"):
        assert getattr(small.model, section) == getattr(config.model, section)
    for item in ("num_experts", "top_k", "gate", "balance"):
        assert getattr(small.model.moe, item) == getattr(config.model.moe, item)
    assert set(small.model.moe.layers) <= set(config.model.moe.layers)
    assert bool(small.model.moe.layers) == bool(config.model.moe.layers)
    assert (small.optim.name, small.run.max_steps is not None) == (config.optim.name, True)
    assert millions(model_of(small)) < millions(model_of(config)) / 8
