"""Mixture layers against a plain loop over experts, in double precision: outputs, every gradient, every statistic."""

from __future__ import annotations

import any_blocks
import timm.models.resnet as timm_resnet
import torch
import torch.nn.functional as F
import torchvision.models.resnet as torchvision_resnet
from pytest import mark
from torch import Tensor, nn

from robust_moe.models import resnet as own_resnet
from robust_moe_kernels import FusedBlockMoE, FusedConvMoE, balance_loss

BATCH, CHANNELS, SIDE = 6, 8, 5

# Rounding: a gradient is reached through at most 3 convolutions (sums of at most 9*8 terms) and 3 normalisations (sums
# over at most 6*25 values, twice), forward and back: some 2*3*(72 + 2*150) = 2,200 additions, each off by at most eps
# of the largest magnitude, and as many again for the factors 1/sigma of a few. A row sent to the wrong expert, a wrong
# weight or a statistic over the wrong rows changes results by percents.
BOUND = 1e4 * torch.finfo(torch.float64).eps


pytestmark = mark.usefixtures("one_thread")


def assert_near(got: Tensor | None, wanted: Tensor | None, what: str) -> None:
    """``None`` stands for a gradient of zero."""
    if got is None or wanted is None:
        present = got if wanted is None else wanted
        assert present is None or not present.any(), f"{what}: one side has no gradient, the other is not zero"
        return
    assert got.shape == wanted.shape, what
    error = (got - wanted).abs().max().item()  # NaN fails the comparison below
    assert error <= BOUND * max(1.0, wanted.abs().max().item()), f"{what}: off by {error}"


def downsample(inplanes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def strided(block: type[nn.Module], planes: int) -> nn.Module:
    return block(CHANNELS, planes, 2, downsample(CHANNELS, planes * block.expansion, 2))


def timm_avg_pool_down(block: type[nn.Module], planes: int) -> nn.Module:
    """The first block of a stage of resnet26d and its like: average pool, then a convolution of stride 1."""
    skip = timm_resnet.downsample_avg(CHANNELS, planes * block.expansion, 1, stride=2)
    return block(CHANNELS, planes, stride=2, downsample=skip)


BLOCKS = {
    "torchvision basic": lambda: torchvision_resnet.BasicBlock(CHANNELS, CHANNELS),
    "torchvision basic, stride 2": lambda: strided(torchvision_resnet.BasicBlock, 6),
    "torchvision bottleneck": lambda: torchvision_resnet.Bottleneck(CHANNELS, 2),
    "torchvision bottleneck, stride 2": lambda: strided(torchvision_resnet.Bottleneck, 3),
    "torchvision bottleneck, groups and dilation": lambda: torchvision_resnet.Bottleneck(
        CHANNELS, 2, groups=2, dilation=2
    ),
    "timm basic": lambda: timm_resnet.BasicBlock(CHANNELS, CHANNELS),
    "timm bottleneck": lambda: timm_resnet.Bottleneck(CHANNELS, 2),
    "timm bottleneck, avg-pool downsample": lambda: timm_avg_pool_down(timm_resnet.Bottleneck, 3),
    "timm basic, avg-pool downsample": lambda: timm_avg_pool_down(timm_resnet.BasicBlock, 6),
    "own basic": lambda: own_resnet.BasicBlock(CHANNELS, CHANNELS),
    "own basic, stride 2": lambda: strided(own_resnet.BasicBlock, 6),
    "own bottleneck": lambda: own_resnet.Bottleneck(CHANNELS, 2),
    "own bottleneck, stride 2": lambda: strided(own_resnet.Bottleneck, 3),
    **{name: make for name, make in any_blocks.BLOCKS.items() if any_blocks.channels_of(name) == CHANNELS},
}
CONVS = {
    "plain": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=1, bias=False),
    "bias": lambda: nn.Conv2d(CHANNELS, 6, 3, bias=True),
    "stride": lambda: nn.Conv2d(CHANNELS, 6, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(CHANNELS, 12, 3, padding=1, groups=4),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "dilation": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=2, dilation=2),
    "oblong, padding by name": lambda: nn.Conv2d(CHANNELS, 6, (1, 3), padding="same"),
    "1x1": lambda: nn.Conv2d(CHANNELS, 6, 1),
}


@torch.no_grad()
def scramble(module: nn.Module) -> None:
    """Make every expert's parameters and statistics its own, those of normalisations too."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var") or (".bn" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.add_(torch.randn_like(value), alpha=0.2)


def plain_logits(x: Tensor, gate: dict[str, Tensor]) -> Tensor:
    if "fc.weight" in gate:
        return x.mean((2, 3)) @ gate["fc.weight"].T + gate["fc.bias"]
    return F.conv2d(x, gate["conv.weight"]).mean((2, 3))


def plain_weights(kept: Tensor, top_k: int, renormalize: bool, straight_through: bool) -> Tensor:
    if top_k == 1 and straight_through:
        return 1.0 + kept - kept.detach()
    return kept / kept.sum(1, keepdim=True) if renormalize else kept


def loop_over_experts(moe, x: Tensor, experts: list[nn.Module], gate: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and scores, written as the definition: each expert on the samples that chose it, one after the other."""
    exponentials = plain_logits(x, gate).exp()
    scores = exponentials / exponentials.sum(1, keepdim=True)
    kept, indices = scores.topk(moe.top_k, dim=1)
    assert torch.equal(moe.routing.indices, indices)
    weights = plain_weights(kept, moe.top_k, moe.renormalize, moe.straight_through)
    out = None
    for i, expert in enumerate(experts):
        samples, slots = (indices == i).nonzero(as_tuple=True)
        if len(samples):
            y = weights[samples, slots].view(-1, 1, 1, 1) * expert(x[samples])
            out = y.new_zeros(len(x), *y.shape[1:]) if out is None else out
            out = out.index_add(0, samples, y)
    return out, scores


def assert_equals_loop(moe, training: bool) -> None:
    """One forward and backward of the layer and of the loop from the same state."""
    scramble(moe)
    moe.train(training)
    experts = [moe.expert(i) for i in range(moe.num_experts)]
    gate = {name: p.detach().clone().requires_grad_() for name, p in moe.gate.named_parameters()}
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    x_loop = x.detach().clone().requires_grad_()

    out = moe(x)
    wanted, scores = loop_over_experts(moe, x_loop, experts, gate)
    assert_near(out, wanted, "output")

    weight = torch.randn_like(wanted)
    ((out * weight).sum() + 3.0 * balance_loss(moe, "entropy")).backward()
    mean_scores = scores.mean(0)
    ((wanted * weight).sum() + 3.0 * (mean_scores * mean_scores.log()).sum()).backward()

    assert_near(x.grad, x_loop.grad, "input gradient")
    for name, parameter in moe.gate.named_parameters():
        assert_near(parameter.grad, gate[name].grad, f"gradient of gate.{name}")
    for i, (routed, alone) in enumerate(zip(moe.experts, experts, strict=True)):
        for name, parameter in routed.named_parameters():
            assert_near(parameter.grad, alone.get_parameter(name).grad, f"gradient of {name}, expert {i}")
        for name, buffer in routed.named_buffers():
            assert_near(buffer, alone.get_buffer(name), f"{name}, expert {i}")


@mark.parametrize("training", [True, False], ids=["train", "eval"])
@mark.parametrize("name", BLOCKS)
def test_blocks_equal_the_loop(name: str, training: bool):
    torch.manual_seed(1)
    assert_equals_loop(FusedBlockMoE.from_block(BLOCKS[name]().double(), 4, 2, init="fresh"), training)


@mark.parametrize("training", [True, False], ids=["train", "eval"])
@mark.parametrize("name", CONVS)
def test_convolutions_equal_the_loop(name: str, training: bool):
    torch.manual_seed(2)
    assert_equals_loop(FusedConvMoE.from_conv(CONVS[name]().double(), 4, 2, init="fresh"), training)


SELECTIONS = {
    "k=1, straight-through": (4, {"top_k": 1}),
    "k=1, the score itself": (4, {"top_k": 1, "straight_through": False, "renormalize": False}),
    "k=2": (4, {"top_k": 2}),
    "k=2, not renormalised": (4, {"top_k": 2, "renormalize": False}),
    "k=E": (4, {"top_k": 4}),
    "k=E, not renormalised": (4, {"top_k": 4, "renormalize": False}),
    "E=1": (1, {"top_k": 1}),
    "E=1, the score itself": (1, {"top_k": 1, "straight_through": False, "renormalize": False}),
    "E prime": (7, {"top_k": 3}),
    "E prime, more experts than rows": (31, {"top_k": 2}),
}


@mark.parametrize("training", [True, False], ids=["train", "eval"])
@mark.parametrize("gate", ["gap_fc", "conv_gap"])
@mark.parametrize("name", SELECTIONS)
def test_selections_equal_the_loop(name: str, gate: str, training: bool):
    torch.manual_seed(3)
    num_experts, options = SELECTIONS[name]
    block = strided(own_resnet.BasicBlock, 6).double()
    assert_equals_loop(FusedBlockMoE.from_block(block, num_experts, gate=gate, init="fresh", **options), training)


@mark.parametrize("name", ["k=1, straight-through", "k=2, not renormalised", "k=E", "E=1", "E prime"])
def test_selections_of_convolutions_equal_the_loop(name: str):
    torch.manual_seed(4)
    num_experts, options = SELECTIONS[name]
    conv = nn.Conv2d(CHANNELS, 6, 3, padding=1).double()
    assert_equals_loop(FusedConvMoE.from_conv(conv, num_experts, init="fresh", **options), True)
