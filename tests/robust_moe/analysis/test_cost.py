"""What a model costs: PyTorch's counter of operations on routed layers, and the counts made from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from robust_moe.analysis import ModelCost, model_cost
from robust_moe.models import (
    MODELS,
    ROUTERS,
    DualConfig,
    MarginSoft,
    MixtureConfig,
    MoEConfig,
    RandomTop,
    build_model,
)
from robust_moe_kernels import FusedConvMoE, FusedMLPMoE
from robust_moe_kernels.ops.expert_mlp import expert_mlp
from robust_moe_kernels.ops.routing import sort_by_expert


def counted(make) -> int:
    with FlopCounterMode(display=False) as counter:
        make()
    return counter.get_total_flops()


def test_a_routed_convolution_counts_as_its_chosen_experts():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 8, 3, padding=1)
    layer = FusedConvMoE.from_conv(conv, num_experts=4, top_k=2)
    x = torch.rand(5, 6, 7, 7)
    gate = counted(lambda: layer.gate(x))
    dense = counted(lambda: conv(x))
    assert counted(lambda: layer(x)) - gate == 2 * dense

    x.requires_grad_()
    both = counted(lambda: conv(x).sum().backward())
    layer.gate.requires_grad_(False)
    assert counted(lambda: layer(x).sum().backward()) - 2 * (both) == counted(lambda: layer.gate(x).sum().backward())


# --- model_cost against counts by hand: a 3x3 convolution makes 9 x inputs x outputs multiply-adds at each pixel ------

SIZE, WIDTH, CLASSES = 16, 4, 10
STAGES = ((4, 16), (8, 8), (16, 4), (32, 2))  # channels and side of each stage's maps


def block(channels: int, out: int, side: int) -> int:
    shortcut = channels * out if channels != out else 0
    return (9 * channels * out + 9 * out * out + shortcut) * side**2


def network() -> int:
    """resnet_small: one block a stage, two in the last."""
    total, channels = 9 * 3 * WIDTH * SIZE**2, WIDTH
    for out, side in STAGES:
        total += block(channels, out, side)
        channels = out
    return total + block(32, 32, 2) + 32 * CLASSES


def cost_of(image_size: int = SIZE, **settings) -> ModelCost:
    model = build_model(MODELS["resnet_small"](width=WIDTH, **settings), CLASSES, 3, image_size)
    return model_cost(model, torch.rand(1, 3, image_size, image_size))


def test_the_cost_of_a_plain_network():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 7)
    ).train()
    model[1].eval()
    found = model_cost(model, torch.rand(1, 3, 9, 9))
    assert found.multiply_adds == 9 * 3 * 4 * 5**2 + 100 * 7
    assert found.parameters == found.active_parameters == 9 * 3 * 4 + 4 + 100 * 7 + 7
    assert [module.training for module in model] == [True, False, True, True]
    with pytest.raises(ValueError, match=r"image: expected one image \[1, C, H, W\], got \[2, 3, 9, 9\]"):
        model_cost(model, torch.rand(2, 3, 9, 9))
    assert cost_of().multiply_adds == network()


@pytest.mark.parametrize("experts", [4, 8])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_cost_of_routed_blocks_and_convolutions_is_that_of_k_experts(experts: int, top_k: int):
    dense, gate = cost_of(), 32 * experts
    for layer, one, own in (
        ("layer4.1", block(32, 32, 2), 18 * 32 * 32 + 4 * 32),  # two convolutions and two norms
        ("layer4.1.conv2", 9 * 32 * 32 * 2**2, 9 * 32 * 32),
    ):
        found = cost_of(moe=MoEConfig(layers=[layer], num_experts=experts, top_k=top_k))
        assert found.multiply_adds == dense.multiply_adds + (top_k - 1) * one + gate
        assert found.parameters == dense.parameters + (experts - 1) * own + gate + experts
        assert found.active_parameters == found.parameters - (experts - top_k) * own


def test_the_cost_of_mixtures_of_networks_and_of_dual_models():
    dense, experts = cost_of(), 3
    router = 3 * SIZE**2 * experts  # one linear layer on the pixels
    costs = {}
    for routing, k in (("hard", 1), ("top_k", 2), ("soft", 3)):
        mixture = MixtureConfig(num_experts=experts, router=ROUTERS["linear"](), routing=routing)
        costs[routing] = cost_of(mixture=mixture)
        assert costs[routing].multiply_adds == k * network() + router, routing
        assert costs[routing].active_parameters == k * dense.parameters + router + experts
        assert costs[routing].parameters == experts * dense.parameters + router + experts
    dual = cost_of(
        mixture=MixtureConfig(num_experts=experts, router=ROUTERS["linear"](), routing="hard"),
        dual=DualConfig(enabled=True),  # beside one dense network
    )
    assert dual.multiply_adds == costs["hard"].multiply_adds + network()
    assert dual.parameters - dual.active_parameters == 2 * dense.parameters


def test_a_fixed_expert_is_the_only_one_that_costs():
    layer = FusedConvMoE.from_conv(nn.Conv2d(3, 5, 3, padding=1), num_experts=4, top_k=2)
    layer.fixed_expert = 1
    found = model_cost(nn.Sequential(layer, nn.Flatten()), torch.rand(1, 3, 6, 6))
    assert found.multiply_adds == 9 * 3 * 5 * 6**2
    assert found.parameters - found.active_parameters == 3 * (9 * 3 * 5 + 5)


@pytest.mark.parametrize(("rule", "running"), [(MarginSoft(top=3), 3), (RandomTop(top=3), 1)])
def test_a_routing_rule_for_evaluation_decides_how_many_experts_cost(rule, running: int):
    layer = FusedConvMoE.from_conv(nn.Conv2d(3, 5, 3, padding=1), num_experts=4, top_k=2)
    layer.inference = rule
    found = model_cost(nn.Sequential(layer, nn.Flatten()), torch.rand(1, 3, 6, 6))
    assert found.multiply_adds == running * 9 * 3 * 5 * 6**2 + 3 * 4  # and the gate
    assert found.parameters - found.active_parameters == (4 - running) * (9 * 3 * 5 + 5)


def routed_tokens(**options) -> nn.Sequential:
    """Eight maps as tokens of 6 channels, an MLP of 10 hidden ones as four experts, k = 2."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))
    layer = FusedMLPMoE.from_mlp(mlp, num_experts=4, top_k=2, init="fresh", **options)
    return nn.Sequential(nn.Flatten(2), nn.Linear(81, 6), layer, nn.Flatten(), nn.Linear(48, 7)).eval()


MAPS = torch.linspace(0, 1, 8 * 81).view(1, 8, 9, 9)
ENDS = 8 * 81 * 6 + 48 * 7
GATE = 8 * 6 * 4
PAIR = 2 * 6 * 10  # multiply-adds of an expert for a token


def test_a_routed_mlp_costs_k_experts_for_every_token():
    model = routed_tokens()
    found = model_cost(model, MAPS)
    assert found.multiply_adds == ENDS + GATE + 8 * 2 * PAIR
    used = len(model[2].routing.indices.unique())
    assert found.parameters - found.active_parameters == (4 - used) * (PAIR + 10 + 6)
    model[2].fixed_expert = 2
    assert model_cost(model, MAPS).multiply_adds == ENDS + 8 * PAIR


@pytest.mark.parametrize("rows", [16, 5])
def test_the_products_of_a_routed_mlp_are_of_the_rows_it_has_room_for(rows: int):
    torch.manual_seed(0)
    operands = {
        "x": torch.rand(8, 6),
        "one": torch.rand(4, 10, 6),
        "two": torch.rand(4, 6, 10),
        "weights": torch.rand(8, 2),
    }
    route = sort_by_expert(torch.randint(4, (8, 2)), 4)
    route = route._replace(offsets=route.offsets.clamp_max(rows))  # pairs behind the last expert are dropped

    def backward(*wanted: str) -> int:
        x, one, two, weights = (tensor.clone().requires_grad_(name in wanted) for name, tensor in operands.items())
        y = expert_mlp(x, one, None, two, None, route, weights, "gelu", rows=rows).sum()
        return counted(y.backward)

    x, one, two, weights = operands.values()
    assert counted(lambda: expert_mlp(x, one, None, two, None, route, weights, "gelu", rows=rows)) == 2 * rows * PAIR
    assert backward("x", "weights") == backward("x") == 2 * rows * PAIR  # through both matrices, as an attack asks
    assert backward("weights") == backward("two") == rows * PAIR
    assert backward("one") == backward("one", "weights") == 2 * rows * PAIR
    assert backward("x", "one", "two", "weights") == 4 * rows * PAIR


def test_an_attacks_backward_through_a_routed_mlp_has_no_weight_gradients():
    model = routed_tokens().requires_grad_(False)
    x = MAPS.clone().requires_grad_()
    found = counted(lambda: model(x).sum().backward())
    assert found == 2 * (2 * model_cost(model, MAPS).multiply_adds - GATE)  # the backward of the gate is not counted


def test_attention_counts_alike_on_a_cpu_and_without_numbers():
    config = MODELS["vit_micro"](width=24, depth=1, heads=2, patch_size=4)
    tokens, width = (8 // 4) ** 2 + 1, 24
    own = 3 * 4**2 * width * (tokens - 1) + 12 * width**2 * tokens + 2 * tokens**2 * width + width * 7
    found = model_cost(build_model(config, 7, 3, 8), torch.rand(1, 3, 8, 8)).multiply_adds
    assert found == own
    with torch.device("meta"):
        assert model_cost(build_model(config, 7, 3, 8), torch.zeros(1, 3, 8, 8)).multiply_adds == own
