"""A model without some of its experts: the same function where nobody chose them, and an ordinary model otherwise."""

from __future__ import annotations

import copy
import io

import any_blocks
import torch
import torchvision.models.resnet as torchvision_resnet
from pytest import mark, raises
from torch import Tensor, nn
from whole_networks import Networks, linear

from robust_moe.models import ImageSpec, NetworkExperts
from robust_moe.models.resnet import ResNetSmallConfig
from robust_moe.models.routers import ROUTERS
from robust_moe_kernels import FusedBlockMoE, FusedConvMoE, moe_layers, replace_blocks
from robust_moe_kernels.modules import MoELayer, prune_experts

EXPERTS = 4
KEPT = [0, 2, 3]
IMAGES = ImageSpec(5, 3, 8, (0.5,) * 3, (0.25,) * 3)
# Single precision: the softmax has other terms, and the kernels see other groups of rows; sums of at most 72 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


pytestmark = mark.usefixtures("one_thread")


def block(experts: int = EXPERTS, **options) -> FusedBlockMoE:
    return FusedBlockMoE.from_block(torchvision_resnet.BasicBlock(8, 8), experts, init="fresh", **options)


def bottleneck(experts: int = EXPERTS, **options) -> FusedBlockMoE:
    down = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    made = torchvision_resnet.Bottleneck(8, 3, 2, down)
    return FusedBlockMoE.from_block(made, experts, init="fresh", **options)


def conv(experts: int = EXPERTS, **options) -> FusedConvMoE:
    return FusedConvMoE.from_conv(nn.Conv2d(8, 6, 3), experts, init="fresh", **options)


def excited(experts: int = EXPERTS, **options) -> FusedBlockMoE:
    """Off the engine."""
    return FusedBlockMoE.from_block(any_blocks.BLOCKS["squeeze and excitation"](), experts, init="fresh", **options)


def mixture(experts: int = EXPERTS, gate: str = "gap_fc", **options) -> MoELayer:
    """Whole networks on images, behind a router."""
    spec = ImageSpec(5, 8, 6, (0.5,) * 8, (0.25,) * 8)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5)) for _ in range(experts)]
    return MoELayer(ROUTERS[gate]().build(spec, experts), NetworkExperts(networks, 8), **options)


LAYERS = {"block": block, "excited": excited, "bottleneck": bottleneck, "conv": conv, "mixture": mixture}
GATES = [(name, gate) for name in ("block", "conv") for gate in ("gap_fc", "conv_gap", "two_conv")]
GATES += [
    ("bottleneck", "gap_fc"),
    ("excited", "gap_fc"),
    *(("mixture", router) for router in ("linear", "cnn", "gap_fc")),
]


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def last_of(gate: nn.Module) -> nn.Module:
    """The gate's last layer, found in another way than the code under test finds it."""
    return [module for module in gate.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


@torch.no_grad()
def trained(name: str, gate: str, **options) -> MoELayer:
    """A layer with statistics of its own, whose images go to all experts but the second, most of them at least."""
    torch.manual_seed(0)
    layer = LAYERS[name](gate=gate, **options)
    layer(images())  # batch statistics
    last = last_of(layer.gate)
    last.weight.mul_(20)  # fresh gates hardly tell images apart
    layer.eval()(images())
    logits = layer.last_routing().logits
    if last.bias is not None:
        last.bias.sub_(logits.mean(0))
        last.bias[1] -= 2 * logits.abs().max()
    else:
        last.weight[1] = -0.1  # of means of normal pixels: mostly last
    return layer


@mark.parametrize("top_k", [1, 2])
@mark.parametrize(("name", "gate"), GATES, ids=lambda value: value)
def test_without_an_expert_that_nobody_chooses_the_outputs_stay(name: str, gate: str, top_k: int):
    layer = trained(name, gate, top_k=top_k)
    x = images()
    layer(x)
    record = layer.last_routing()
    x = x[(record.indices != 1).all(1)]
    assert len(x) >= 6
    expected, indices = layer(x), layer.last_routing().indices
    assert len(indices[:, 0].unique()) > 1
    pruned = prune_experts(layer, KEPT)
    got, record = pruned(x), pruned.last_routing()
    assert torch.equal(torch.tensor(KEPT)[record.indices], indices)
    if top_k == 1:  # the weight is 1, and each expert sees the same rows
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected, **CLOSE)


@mark.parametrize("training", [False, True], ids=["eval", "train"])
@mark.parametrize(("name", "gate"), GATES, ids=lambda value: value)
def test_the_state_is_that_of_a_layer_with_so_many_experts(name: str, gate: str, training: bool):
    layer = trained(name, gate).train(training)
    pruned = prune_experts(layer, KEPT)
    assert (pruned.num_experts, pruned.top_k, pruned.training) == (3, 2, training)
    fresh = LAYERS[name](3, gate=gate).train(training)
    buffer = io.BytesIO()
    torch.save(pruned.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer))
    x = images()
    assert torch.equal(fresh(x), pruned(x))
    for one, other in zip(fresh.parameters(), pruned.parameters(), strict=True):
        assert (one.shape, one.stride(), one.requires_grad) == (other.shape, other.stride(), other.requires_grad)
    for number, expert in enumerate(KEPT):
        for one, other in zip(layer.expert(expert).parameters(), pruned.expert(number).parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_model_that_was_given_is_as_before():
    layer = trained("block", "gap_fc")
    before = copy.deepcopy(layer.state_dict())
    x = images()
    expected, record = layer(x), layer.routing
    pruned = prune_experts(layer, [1])
    pruned(x).sum().backward()
    assert layer.routing is record
    assert (layer.num_experts, layer.top_k) == (4, 2)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), expected)
    assert all(parameter.grad is None for parameter in layer.parameters())


@mark.parametrize("name", ["block", "bottleneck", "conv"])
def test_one_expert_is_that_expert(name: str):
    """top_k falls to 1, the gate decides nothing; the grouped kernels run with a single group."""
    layer = trained(name, "gap_fc")
    pruned = prune_experts(layer, [2])
    assert (pruned.num_experts, pruned.top_k) == (1, 1)
    torch.testing.assert_close(pruned(images()), layer.expert(2)(images()), **CLOSE)


def test_scores_as_weights_grow_by_the_share_of_the_dropped():
    layer = trained("conv", "gap_fc", top_k=1, renormalize=False, straight_through=False)
    x = images()
    expected, score = layer(x), layer.last_routing().scores
    pruned = prune_experts(layer, KEPT)
    grown = 1 / (1 - score[:, 1, None, None, None])
    torch.testing.assert_close(pruned(x), expected * grown, **CLOSE)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = ResNetSmallConfig(width=4, blocks=(1, 2)).build(IMAGES)
    return replace_blocks(model, ["layer2.0", "layer2.1.conv2"], num_experts=EXPERTS, top_k=2, init="fresh").eval()


def test_layers_of_a_network_by_name():
    model = network()
    pruned = prune_experts(model, {"layer2.1.conv2": [3]})
    assert type(pruned) is type(model)
    counts = {name: (layer.num_experts, layer.top_k) for name, layer in moe_layers(pruned).items()}
    assert counts == {"layer2.0": (4, 2), "layer2.1.conv2": (1, 1)}
    everywhere = prune_experts(model, [0, 3])
    assert [layer.num_experts for layer in moe_layers(everywhere).values()] == [2, 2]
    x = torch.rand(6, 3, 8, 8)
    for number, expert in enumerate([0, 3]):  # and both are the same experts as before
        for layer in moe_layers(model).values():
            layer.fixed_expert = expert
        for layer in moe_layers(everywhere).values():
            layer.fixed_expert = number
        assert torch.equal(everywhere(x), model(x))


def test_a_pruned_layer_learns():
    pruned = prune_experts(trained("block", "gap_fc"), [0, 2]).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    before = copy.deepcopy(pruned.state_dict())
    pruned(images()).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in pruned.state_dict().items() if not torch.equal(value, before[name])}
    assert moved >= {
        "gate.fc.weight",
        *(f"experts.1.{name}" for name in ("conv1.weight", "bn2.weight", "bn2.running_mean")),
    }


def test_frozen_experts_stay_frozen():
    layer = block()
    layer.experts.requires_grad_(False)
    pruned = prune_experts(layer, [0, 1])
    assert not any(parameter.requires_grad for parameter in pruned.experts.parameters())
    assert all(parameter.requires_grad for parameter in pruned.gate.parameters())


class Cosine(nn.Module):
    """A gate whose last layer nobody names."""

    def __init__(self) -> None:
        super().__init__()
        self.directions = nn.Linear(8, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.directions(x.mean((2, 3)))


class Named(Cosine):
    last_layer = "directions"


def test_a_gate_from_outside_names_its_last_layer():
    layer = block(gate=Named()).eval()
    assert prune_experts(layer, [1, 3])(images()).shape == (24, 8, 6, 6)
    assert torch.equal(prune_experts(layer, [1, 3]).gate.directions.weight, layer.gate.directions.weight[[1, 3]])
    with raises(ValueError, match=r"gate of layer '': expected nn.Linear or nn.Conv2d as its last .*, got Cosine"):
        prune_experts(block(gate=Cosine()), [1, 3])
    wide = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, EXPERTS + 1))
    with raises(ValueError, match="gate of layer '': expected a last layer of 4 outputs, one per expert, got 5"):
        prune_experts(block(gate=wide), [1, 3])


@mark.parametrize(
    ("keep", "message"),
    [
        ([], r"keep of layer '': expected ascending experts in 0..3, at least one, got \[\]"),
        ([2, 1], r"got \[2, 1\]"),
        ([1, 1], r"got \[1, 1\]"),
        ([1, 4], r"got \[1, 4\]"),
        ([-1, 1], r"got \[-1, 1\]"),
        ([True], r"keep of layer '': expected ascending experts in 0..3, at least one, got \[True\]"),
        ([False, True], r"got \[False, True\]"),
        ([1.0], r"got \[1.0\]"),
        ([[0], [1]], r"got \[\[0\], \[1\]\]"),
        ("01", "got 01"),
        (2, r"keep of layer '': expected ascending experts in 0..3, at least one, got 2"),
        (None, r"keep of layer '': expected ascending experts in 0..3, at least one, got None"),
        ({"": {0: 1}}, r"got \{0: 1\}"),
        ({"layer2": [0]}, r"keep: expected names of layers \(''\), got 'layer2'"),
    ],
)
def test_experts_that_are_not_the_layers_are_refused(keep, message: str):
    with raises(ValueError, match=message):
        prune_experts(block(), keep)


def test_what_cannot_be_pruned_is_refused():
    with raises(ValueError, match="model: expected at least one mixture-of-experts layer, got none"):
        prune_experts(nn.Linear(2, 2), [0])
    layer = block()
    layer.fixed_expert = 1
    with raises(ValueError, match="model layer '': expected its gate to decide, got the fixed expert 1"):
        prune_experts(layer, [0])
    foreign = MoELayer(linear([1, 0, 0], [0, 1, 0]), Networks([linear([1, 0, 0]), linear([0, 1, 0])], 1), 1)
    with raises(ValueError, match=r"experts of layer '': expected a method keep\(experts\), got Networks"):
        prune_experts(foreign, [0])
