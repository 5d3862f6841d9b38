"""Vision transformers: timm's as oracle, published sizes, patches by the size of the images, and bad settings."""

from __future__ import annotations

import importlib

import pytest
import timm
import torch
import torchvision
from torch import nn

from robust_moe.config import load_config
from robust_moe.models import MODELS, LinearGateConfig, ViTMicroConfig, ViTTinyConfig, build_model
from robust_moe.settings import ConfigError, replaced
from robust_moe_kernels.modules import FusedMLPMoE, moe_layers

SMALL = {"width": 8, "depth": 2, "heads": 2}


def parameters(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "theirs", "size", "patch"),
    [
        ("vit_tiny", "vit_tiny_patch16_224", 32, 4),
        ("vit_tiny", "vit_tiny_patch16_224", 224, 16),
        ("vit_small", "vit_small_patch16_224", 64, 8),
    ],
)
def test_networks_equal_timms_on_normalised_images(name: str, theirs: str, size: int, patch: int):
    torch.manual_seed(0)
    mean, std = (0.5, 0.375, 0.25), (0.25, 0.5, 0.125)  # exact in float32, in which the buffers are made
    ours = build_model(MODELS[name](), 7, 3, size, mean, std).double().eval()
    wanted = timm.create_model(theirs, num_classes=7, img_size=size, patch_size=patch).double().eval()
    state = {key.removeprefix("network."): value for key, value in ours.state_dict().items()}
    assert state.pop("normalize.mean").flatten().tolist() == list(mean)
    assert state.pop("normalize.std").flatten().tolist() == list(std)
    wanted.load_state_dict(state)  # strict: the same keys and shapes
    images = torch.rand(1, 3, size, size, dtype=torch.float64)
    scaled = torchvision.transforms.functional.normalize(images, mean, std)
    torch.testing.assert_close(ours(images), wanted(scaled), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "images", "millions"),
    [
        ("vit_tiny", (1000, 3, 224), 5.7),  # as Touvron et al., arXiv:2012.12877, table 1
        ("vit_small", (1000, 3, 224), 22.1),
        ("vit_micro", (10, 3, 32), 0.68),
    ],
)
def test_parameter_counts(name: str, images: tuple[int, int, int], millions: float):
    with torch.device("meta"):
        count = parameters(build_model(MODELS[name](), *images))
    assert count == pytest.approx(millions, abs=0.05 if millions > 1 else 0.005)


@pytest.mark.parametrize(
    ("size", "patch", "tokens"),
    [(8, 4, 4), (28, 4, 49), (32, 4, 64), (40, 8, 25), (64, 8, 64), (96, 16, 36), (224, 16, 196)],
)
def test_patches_follow_the_size_of_the_images(size: int, patch: int, tokens: int):
    model = build_model(ViTMicroConfig(**SMALL), 10, 1, size)
    assert model.network.patch_embed.proj.kernel_size == (patch, patch)
    assert model.network.pos_embed.shape[1] == tokens + 1
    model(torch.rand(2, 1, size, size)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_chosen_patch_and_every_other_setting_reach_the_network():
    """Each differs from its default, so that one that is not passed on shows."""
    network = build_model(ViTTinyConfig(width=12, depth=3, heads=4, mlp_ratio=2.5, patch_size=2), 5, 2, 16).network
    assert (len(network.blocks), network.embed_dim, network.blocks[0].attn.num_heads) == (3, 12, 4)
    assert network.blocks[2].mlp.fc1.out_features == 30
    assert network.patch_embed.proj.weight.shape == (12, 2, 2, 2)
    assert network.head.out_features == 5


def test_weights_come_from_the_global_generator():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model(ViTMicroConfig(**SMALL), 10, 1, 8))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model=vit_tiny", "model.heads=5"], r"model\.heads: expected a divisor of the width 192, got 5"),
        (["model=vit_tiny", "model.mlp_ratio=0.001"], r"model\.mlp_ratio: expected at least one hidden channel of 192"),
        (["model=vit_tiny", "model.depth=0"], r"model\.depth: expected a whole number in \[1, 256\], got 0"),
        (["model=vit_tiny", "model.blocks=[1]"], r"unknown key 'model\.blocks' of model 'vit_tiny'"),
        (["model=vit_tinny"], r"model\.name: expected one of .*did you mean 'vit_tiny'"),
    ],
)
def test_bad_settings_are_named(settings: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(None, settings)


@pytest.mark.parametrize(
    ("settings", "size", "patch"), [({}, 30, 4), ({}, 100, 16), ({"patch_size": 5}, 32, 5), ({}, 0, 4)]
)
def test_images_that_patches_do_not_fill_are_refused(settings: dict, size: int, patch: int):
    words = rf"image_size: expected a multiple of {patch} pixels, the side of a patch \(model\.patch_size\), got {size}"
    with pytest.raises(ValueError, match=words):
        build_model(ViTMicroConfig(**SMALL, **settings), 10, 3, size)


def test_its_experts_are_routed_token_by_token_unless_another_gate_is_chosen():
    chosen = load_config(None, ["model=vit_micro", "model.moe.layers=[blocks.1.mlp]", "model.moe.num_experts=3"]).model
    assert chosen.moe.gate == LinearGateConfig()
    model = build_model(replaced(chosen, "width", 12), 10, 1, 8).eval()
    (layer,) = moe_layers(model).values()
    model(torch.rand(2, 1, 8, 8))
    assert isinstance(layer, FusedMLPMoE) and layer.routing.shape == (2, 5)  # four patches and the class token
    assert not torch.equal(layer.expert(0).fc1.weight, layer.expert(1).fc1.weight)  # init: fresh
    assert load_config(None, ["model=resnet_small"]).model.moe.gate.name == "gap_fc"


@pytest.mark.parametrize(
    ("model", "layer", "gate", "words"),
    [
        (
            "vit_micro",
            "blocks.1.mlp",
            "gap_fc",
            r"^model\.moe\.layers: block: expected .*, got Mlp .*; model\.moe\.gate=gap_fc routes maps, and replaces "
            r"blocks or convolutions: another one, such as linear, replaces these$",
        ),
        (
            "resnet_small",
            "layer1.0",
            "linear",
            r"^model\.moe\.layers: mlp: expected .*, got BasicBlock .*; model\.moe\.gate=linear routes tokens, and "
            r"replaces MLPs: another one, such as gap_fc, replaces these$",
        ),
        (
            "vit_micro",
            "blocks.1.attn",
            "linear",
            r"^model\.moe\.layers: mlp: expected .* random input Attention .* else$",
        ),
        ("vit_micro", "blocks.9.mlp", "linear", r"submodule, got 'blocks\.9\.mlp'; did you mean 'blocks\.\d\.mlp'\?$"),
    ],
)
def test_layers_that_the_gate_is_not_for_are_named(model: str, layer: str, gate: str, words: str):
    settings = [f"model={model}", f"model.moe.layers=[{layer}]", f"model.moe.gate={gate}"]
    with pytest.raises(ValueError, match=words):
        build_model(load_config(None, settings).model, 10, 1, 8)


@pytest.mark.parametrize("error", [ImportError, RuntimeError])  # timm beside a foreign torchvision raises the second
def test_without_timm_the_way_to_get_it_is_said(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> object:
        raise error(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", absent)
    words = (
        r"model\.name: expected timm to import \(pip install 'robust-moe-kernels\[train\]'\) for a vision .* no timm"
    )
    with pytest.raises(ValueError, match=words):
        build_model(ViTMicroConfig(**SMALL), 10, 3, 8)
