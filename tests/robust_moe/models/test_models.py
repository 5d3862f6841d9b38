"""Models: torchvision's networks as oracle, published parameter counts, experts in the places named."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from robust_moe.config import load_config
from robust_moe.models import (
    GATES,
    MODELS,
    ModelConfig,
    MoEConfig,
    Normalize,
    ResNetSmallConfig,
    build_model,
)
from robust_moe.settings import ConfigError, Layer, resolve
from robust_moe_kernels.modules import ConvGapGate, FusedBlockMoE, TwoConvGate, moe_layers

CIFAR100 = {"num_classes": 100, "channels": 3, "image_size": 32}
TINY = {"num_classes": 10, "channels": 1, "image_size": 16}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def cifar_stem(model: nn.Module) -> nn.Module:
    """torchvision's network with the stem of CIFAR work."""
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_networks_equal_torchvisions(name: str):
    torch.manual_seed(0)
    mean, std = (0.5, 0.375, 0.25), (0.25, 0.5, 0.125)  # exact in float32, in which the buffers are made
    ours = build_model(MODELS[name](), 10, 3, 16, mean, std).double()
    theirs = cifar_stem(getattr(torchvision.models, name)(num_classes=10)).double()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("normalize.")}
    theirs.load_state_dict(state)  # strict: the same keys and shapes
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    scaled = torchvision.transforms.functional.normalize(images, mean, std)
    for mode in (True, False):  # train, and eval with the statistics that training left
        ours.train(mode)
        theirs.train(mode)
        torch.testing.assert_close(ours(images), theirs(scaled), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.bn1.running_mean, theirs.bn1.running_mean)


@pytest.mark.parametrize(
    ("name", "moe", "millions"),
    [
        ("resnet18", MoEConfig(), 11.22),
        ("resnet50", MoEConfig(), 23.7),
        ("resnet18", MoEConfig(layers=["layer4.1"], num_experts=4), 25.4),
    ],
    ids=["resnet18", "resnet50", "resnet18 with 4 experts"],
)
def test_parameter_counts_are_the_published_ones(name: str, moe: MoEConfig, millions: float):
    """Of "Robust Experts", arXiv:2509.05086, and its code, for CIFAR-100; they round to one or two decimals."""
    with torch.device("meta"):
        count = parameters(build_model(MODELS[name](moe=moe), **CIFAR100)) / 1e6
    assert count == pytest.approx(millions, abs=0.005 if millions == 11.22 else 0.05)


def test_the_small_network_has_the_default_place_for_experts():
    model = build_model(ResNetSmallConfig(moe=MoEConfig(layers=["layer4.1"])), **TINY)
    assert parameters(build_model(ResNetSmallConfig(), **TINY)) == pytest.approx(0.60e6, abs=0.005e6)
    assert list(moe_layers(model)) == ["layer4.1"]


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("resnet")])
def test_width_and_depth_come_from_the_configuration(name: str):
    model = build_model(MODELS[name](width=4, blocks=[1, 2]), **TINY)
    assert [len(model.layer1), len(model.layer2)] == [1, 2]
    assert not hasattr(model, "layer3")
    assert model.conv1.weight.shape == (4, 1, 3, 3)
    expansion = model.layer1[0].expansion
    assert model.fc.in_features == 8 * expansion
    sizes = []
    for stage in (model.layer1, model.layer2):
        stage.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1:]))
    model(torch.rand(3, 1, 16, 16)).sum().backward()
    assert sizes == [(4 * expansion, 16, 16), (8 * expansion, 8, 8)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_normalisation_lives_inside_and_travels_in_the_state_dict():
    plain = build_model(ResNetSmallConfig(width=4), **TINY).eval()
    scaled = build_model(ResNetSmallConfig(width=4), **TINY, mean=[0.25], std=[0.5]).eval()
    images = torch.rand(2, 1, 16, 16)
    state = copy.deepcopy(scaled.state_dict())
    scaled.load_state_dict(plain.state_dict())  # mean 0, std 1
    assert torch.equal(scaled(images), plain(images))
    scaled.load_state_dict({**plain.state_dict(), "normalize.mean": state["normalize.mean"]})
    assert torch.equal(scaled(images), plain(images - 0.25))


def test_weights_come_from_the_global_generator():
    torch.manual_seed(3)
    one = build_model(ResNetSmallConfig(width=4), **TINY)
    torch.manual_seed(3)
    other = build_model(ResNetSmallConfig(width=4), **TINY)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_experts_that_copy_their_block_change_nothing():
    torch.manual_seed(0)
    moe = MoEConfig(layers=["layer4.1"], num_experts=3, top_k=3, init="copy")
    model = build_model(ResNetSmallConfig(width=4, moe=moe), **TINY).eval()
    layer = model.layer4[1]
    assert isinstance(layer, FusedBlockMoE)
    assert (layer.num_experts, layer.top_k) == (3, 3)
    images = torch.rand(5, 1, 16, 16)
    mixed = model(images)  # all weights sum to one and all experts agree
    assert layer.routing.indices.shape == (5, 3)
    model.layer4[1] = layer.expert(0)
    torch.testing.assert_close(model(images), mixed, rtol=1e-4, atol=1e-4)


def test_every_setting_of_the_mixture_reaches_it():
    """Each differs from its default, so that one that is not passed on shows."""
    settings = {"num_experts": 5, "top_k": 3, "renormalize": False, "straight_through": False, "noise_std": 0.3}
    settings["noise"] = "released"
    moe = MoEConfig(layers=["layer3.0", "layer4.1"], gate=GATES["conv_gap"](), init="fresh", **settings)
    model = build_model(ResNetSmallConfig(width=4, moe=moe), **TINY)
    assert set(moe_layers(model)) == {"layer3.0", "layer4.1"}
    for layer in moe_layers(model).values():
        assert {name: getattr(layer, name) for name in settings} == settings
        assert isinstance(layer.gate, ConvGapGate)
        first, second = layer.expert(0), layer.expert(1)
        assert not torch.equal(first.conv1.weight, second.conv1.weight)  # not copies


def test_the_gate_of_two_convolutions_has_a_width():
    moe = MoEConfig(layers=["layer4.1"], gate=GATES["two_conv"](hidden=3))
    gate = build_model(ResNetSmallConfig(width=4, moe=moe), **TINY).layer4[1].gate
    assert isinstance(gate, TwoConvGate)
    assert gate.conv1.out_channels == gate.conv2.in_channels == 3
    found = load_config(None, ["model.moe.layers=[layer4.1]", "model.moe.gate={name: two_conv, hidden: 5}"])
    assert found.model.moe.gate == GATES["two_conv"](hidden=5)


BAD = {
    "classes": ({"num_classes": 0}, "num_classes: expected a count >= 1, got 0"),
    "pixels": ({"image_size": 4}, "image_size: expected >= 8 pixels for 4 stages"),
    "mean": ({"mean": [0.5, 0.5]}, "mean: expected 1 numbers, a channel each, got 2"),
    "std": ({"std": [0.0]}, "std: expected numbers > 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_named(kind: str):
    change, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        build_model(**{"config": ResNetSmallConfig(), **TINY, **change})


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"model.name: expected one of .*did you mean 'resnet18'"):
        resolve(ModelConfig, [Layer({"name": "resnet-18"}, "test")], ResNetSmallConfig(), "model")


def test_normalize_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="std: expected 2 channels, as mean, got 1"):
        Normalize([0.0, 0.0], [1.0])


@pytest.mark.parametrize("size", [16, 15])
def test_a_narrow_network_is_the_same_function(size: int):
    """Its shortcuts pick pixels before they convolve; the weights and their names are a strided convolution's."""
    torch.manual_seed(0)
    ours = build_model(ResNetSmallConfig(width=8), 10, 3, size).double()
    plain = copy.deepcopy(ours)
    seen = 0
    for module in plain.modules():
        if getattr(module, "downsample", None) is not None:
            conv, norm = module.downsample.get_submodule("0"), module.downsample.get_submodule("1")
            strided = nn.Conv2d(conv.in_channels, conv.out_channels, 1, module.stride, bias=False).double()
            strided.load_state_dict(conv.state_dict())
            seen += len(module.downsample) == 3
            module.downsample = nn.Sequential(strided, norm)
    assert seen == 1  # the one from 8 channels; the next reads 16
    assert plain.state_dict().keys() == ours.state_dict().keys()
    images = torch.rand(3, 3, size, size, dtype=torch.float64)
    got, wanted = ours(images), plain(images)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    names = [name for name, _ in ours.named_parameters()]
    grads = [torch.autograd.grad(out.square().sum(), list(m.parameters())) for out, m in ((got, ours), (wanted, plain))]
    for name, one, other in zip(names, *grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


NARROW = """
import torch
from robust_moe.models import ResNetSmallConfig, build_model
torch.set_num_threads(2)
model = build_model(ResNetSmallConfig(width=8), 10, 3, 32)
for count in (3, 5, 7) * 4:
    images = torch.rand(count, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model(images).sum().backward()
    others = [torch.rand(7 + 13 * i) for i in range(20)]  # memory that stray writes would meet
print("done")
"""


@pytest.mark.slow  # a process of its own, as what it guards against ends the process
def test_a_narrow_network_trains_on_several_threads():
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, timeout=800)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-500:]


def test_models_and_data_import_without_optional_packages():
    """In a fresh process in which they cannot be imported, as beside a PyTorch build that torchvision does not fit."""
    code = (
        "import sys\n"
        "for name in ('timm', 'torchvision', 'sklearn', 'pyarrow', 'PIL'): sys.modules[name] = None\n"
        "import torch, robust_moe.data\n"
        "from robust_moe.models import ResNetSmallConfig, build_model\n"
        "model = build_model(ResNetSmallConfig(width=2), 10, 1, 16).eval()\n"
        "print(model(torch.rand(3, 1, 16, 16)).isfinite().sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "30", done.stderr
