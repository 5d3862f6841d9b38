"""What a function that reroutes may return, and what layers and blocks make of routes that are none."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules import MoELayer, check_finite, rerouted
from robust_moe_kernels.modules.route_options import kept_in_range
from robust_moe_kernels.ops.routing import sort_by_expert

B, E, C = 3, 4, 8
INDICES = torch.tensor([[0, 1], [3, 2], [1, 3]])
SHAPE = "expected shape [3, 2] (that of indices)"
WEIGHTS = torch.tensor([[0.7, 0.3], [0.2, 0.9], [1.0, -0.5]])


def conv(dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(0)
    return FusedConvMoE.from_conv(nn.Conv2d(C, 5, 3, padding=1), E, 2, init="fresh").to(dtype).eval()


def block(dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(0)
    return FusedBlockMoE.from_block(BasicBlock(C, C), E, 2, init="fresh").to(dtype).eval()


@pytest.fixture(params=[conv, block], ids=lambda make: make.__name__)
def make(request) -> Any:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["engine", "segments"])
def layer(request, make) -> MoELayer:
    return make(request.param)


def output(layer: MoELayer, indices: Any, weights: Any) -> Tensor:
    dtype = next(layer.experts.parameters()).dtype
    x = torch.rand(B, C, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    with rerouted(layer, lambda options, record: (indices, weights)), torch.no_grad():
        return layer(x)


def test_views_of_any_strides_are_as_good_as_copies(layer):
    wide = torch.stack([WEIGHTS, WEIGHTS + 1], 2)
    expected = output(layer, INDICES, WEIGHTS)
    assert torch.equal(output(layer, INDICES.t().contiguous().t(), wide[..., 0]), expected)
    assert torch.equal(output(layer, INDICES.int(), WEIGHTS), expected)
    one = torch.tensor([[0.5]]).expand(B, 2)
    assert torch.equal(
        output(layer, INDICES[:1].expand(B, 2), one), output(layer, INDICES[:1].repeat(B, 1), one.clone())
    )


@pytest.mark.parametrize(
    ("indices", "weights", "error", "message"),
    [
        (INDICES, torch.ones(B, 1), ValueError, "reroute: weights: " + SHAPE + ", got [3, 1]"),
        (INDICES, torch.ones(B, 3), ValueError, "reroute: weights: " + SHAPE + ", got [3, 3]"),
        (INDICES, torch.ones(6), ValueError, "reroute: weights: " + SHAPE + ", got [6]"),
        (INDICES, WEIGHTS.long(), TypeError,
         "reroute: weights: expected dtype float32 or float64 or float16 or bfloat16, got int64"),
        (INDICES, WEIGHTS.to("meta"), ValueError,
         "reroute: weights: expected a tensor on cpu (the device of the gate's scores), got meta"),
        (INDICES, [0.5, 0.5], TypeError, "reroute: weights: expected a tensor, got list"),
        (INDICES.float(), WEIGHTS, TypeError, "reroute: indices: expected dtype int64 or int32, got float32"),
        (INDICES > 1, WEIGHTS, TypeError, "reroute: indices: expected dtype int64 or int32, got bool"),
        (INDICES[:2], WEIGHTS[:2], ValueError, "reroute: indices: expected shape [3, n] with n >= 1, got [2, 2]"),
        (INDICES[:, 0], WEIGHTS[:, 0], ValueError, "reroute: indices: expected shape [3, n] with n >= 1, got [3]"),
        (INDICES[:, :0], WEIGHTS[:, :0], ValueError, "reroute: indices: expected shape [3, n] with n >= 1, got [3, 0]"),
        (INDICES.to("meta"), WEIGHTS, ValueError,
         "reroute: indices: expected a tensor on cpu (the device of the gate's scores), got meta"),
        (INDICES + 1, WEIGHTS, ValueError, "indices: expected experts in [0, 4), got values from 1 to 4"),
        (INDICES - 1, WEIGHTS, ValueError, "indices: expected experts in [0, 4), got values from -1 to 2"),
    ],
)  # fmt: skip
def test_anything_else_is_refused(layer, indices, weights, error, message):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        output(layer, indices, weights)


def test_a_rule_returns_a_pair(layer):
    x = torch.rand(B, C, 5, 5, dtype=next(layer.experts.parameters()).dtype)
    with (
        rerouted(layer, lambda options, record: INDICES),
        pytest.raises(
            ValueError, match=r"^reroute: expected a function that returns \(indices, weights\), got Tensor$"
        ),
    ):
        layer(x)


def test_on_a_gpu_an_expert_out_of_range_shows_in_the_output():
    """By arithmetic alone, with no number read on the host: the same function on a CPU."""
    indices = torch.tensor([[0, 4], [3, 2], [-1, 2**40]])
    kept, weights, count = kept_in_range(indices, WEIGHTS, E)
    assert kept.tolist() == [[0, 3], [3, 2], [0, 3]]
    assert weights.isnan().tolist() == [[False, True], [False, False], [True, True]]
    assert torch.equal(weights[1], WEIGHTS[1]) and (count.item(), count.dtype) == (3, torch.int32)


def test_check_finite_names_the_layers_with_experts_out_of_range():
    model = nn.Sequential(block(torch.float32), block(torch.float32))
    model(torch.rand(2, C, 5, 5))
    check_finite(model)
    for layer, count in zip(model, (0, 3), strict=True):
        layer.routing = replace(layer.last_routing(), invalid=torch.tensor(count, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^reroute: expected experts of the layer, got others in 1 \(3\)$"):
        check_finite(model)


@pytest.mark.parametrize("name", ["order", "inverse", "sample", "offsets"])
def test_a_route_made_by_hand_is_refused_by_the_experts(make, name):
    layer = make(torch.float32)
    route = sort_by_expert(INDICES, E)
    x = torch.rand(B, C, 5, 5)
    with torch.no_grad():
        layer.experts.mix(x, route, WEIGHTS)
        for wrong in (getattr(route, name) + 10**6, getattr(route, name) - 1, getattr(route, name).float()):
            broken = route._replace(**{name: wrong})
            if make is conv and name == "sample":
                continue  # a convolution's rows are dispatched by order
            with pytest.raises((ValueError, TypeError), match=f"^(route.)?{name}: expected"):
                layer.experts.mix(x, broken, WEIGHTS)
        with pytest.raises(ValueError, match=r"^(weights|y): expected shape"):
            layer.experts.mix(x, route, WEIGHTS[:, :1])
