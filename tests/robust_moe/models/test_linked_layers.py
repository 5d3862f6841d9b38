"""Settings of momentum and of the adaptive clustering gate, and what is built from them."""

from __future__ import annotations

import pytest
import torch

from robust_moe.analysis import extract_path
from robust_moe.config import load_config
from robust_moe.models import build_model
from robust_moe.settings import ConfigError
from robust_moe_kernels.modules import AdaptiveClusteringGate, LinearGate, Momentum, moe_layers

LAYERS = "model.moe.layers=[blocks.0.mlp,blocks.2.mlp]"
SMALL = ["model=vit_micro", "model.width=8", "model.heads=2", "model.depth=3", LAYERS]


def built(*settings: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(load_config(None, [*SMALL, *settings]).model, 10, 1, 8)


def test_off_by_default():
    model = built()
    assert all(layer.momentum is None and layer.output_place is None for layer in moe_layers(model).values())
    assert all(type(layer.gate) is LinearGate for layer in moe_layers(model).values())


def test_momentum_and_its_step():
    model = built("model.moe.momentum=0.5", "model.moe.momentum_gamma=1.5")
    assert [layer.momentum for layer in moe_layers(model).values()] == [Momentum(0.5, 1.5)] * 2
    x = torch.rand(2, 1, 8, 8)
    assert not torch.equal(model(x), built()(x))
    assert torch.equal(built("model.moe.momentum=0")(x), built()(x))


def test_momentum_keeps_the_other_options():
    """They are set on the layer after it was linked."""
    model = built("model.moe.momentum=0.5", "model.moe.capacity=1.05", "model.moe.inference=random_top")
    for layer in moe_layers(model).values():
        assert layer.momentum == Momentum(0.5) and layer.capacity == 1.05 and layer.inference is not None


def test_the_gate_and_its_settings():
    model = built("model.moe.gate={name: adaptive_clustering, floor: 0.2, rate: 0.5}", "model.moe.num_experts=3")
    gates = [layer.gate for layer in moe_layers(model).values()]
    assert [type(gate) for gate in gates] == [AdaptiveClusteringGate] * 2
    assert [(gate.floor, gate.rate) for gate in gates] == [(0.2, 0.5)] * 2
    assert [gate.clusters for gate in gates] == [None, 3]
    model(torch.rand(4, 1, 8, 8)).sum().backward()
    assert gates[1].seen.any() and gates[1].fc.weight.grad.any()


def test_halves_of_a_dual_model_are_linked_apart():
    model = built("model.moe.momentum=0.5", "model.dual.enabled=true", "model.dual.experts=true")
    layers = moe_layers(model)
    assert len(layers) == 4
    assert len({id(layer.output_place.chain) for layer in layers.values()}) == 2
    model(torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.moe.momentum=1"], r"model\.moe\.momentum: expected a number in \[0, 1\), got 1"),
        (["model.moe.momentum=-0.1"], r"model\.moe\.momentum: expected a number in \[0, 1\), got -0\.1"),
        (["model.moe.momentum=high"], r"model\.moe\.momentum: expected a decimal number, got"),
        (
            ["model.moe.momentum=0.5", "model.moe.momentum_gamma=0"],
            r"model\.moe\.momentum_gamma: expected a number > 0, got 0",
        ),
        (["model.moe.momentum_gamma=2"], r"model\.moe\.momentum_gamma: expected 1 without momentum, got 2"),
        (
            ["model.moe.momentum=0.5", "model.moe.layers=[blocks.0.mlp]"],
            r"model\.moe\.layers: expected at least two for momentum=0\.5, one to hand on to the next, got \['blo",
        ),
        (
            ["model.moe.gate=adaptive_clustering", "model.moe.layers=[blocks.0.mlp]"],
            r"model\.moe\.layers: expected at least two for gate=adaptive_clustering, one to hand on to the next, got",
        ),
        (
            ["model.moe.gate={name: adaptive_clustering, floor: 0}"],
            r"model\.moe\.gate\.floor: expected a number in \(0, 1\], got 0",
        ),
    ],
)
def test_bad_settings_are_named(settings: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [*SMALL, *settings])


def test_maps_have_no_momentum():
    words = r"model\.moe\.momentum: expected null for gate=gap_fc, which routes maps: .*, got 0\.5"
    with pytest.raises(ConfigError, match=words):
        load_config(None, ["model=resnet_small", "model.moe.layers=[layer1.0,layer2.0]", "model.moe.momentum=0.5"])


def test_a_path_has_no_momentum():
    path = {"network.blocks.0.mlp": 1, "network.blocks.2.mlp": 2}
    with pytest.raises(ValueError, match=r"model layer 'network\.blocks\.0\.mlp': expected no momentum, got Momentum"):
        extract_path(built("model.moe.momentum=0.5"), path)
    model = built("model.moe.gate=adaptive_clustering").eval()
    for name, layer in moe_layers(model).items():
        layer.fixed_expert = path[name]
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(extract_path(model, path)(x), model(x), rtol=1e-5, atol=1e-6)
