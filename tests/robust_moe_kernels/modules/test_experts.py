"""Experts: how they start, what they share with the block they replace, batch norm with few rows, no wasted work."""

from __future__ import annotations

import copy
import math
from itertools import combinations

import timm.models.resnet as timm_resnet
import torch
import torchvision.models.resnet as torchvision_resnet
from pytest import mark, raises
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_moe.models import resnet as own_resnet
from robust_moe_kernels import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules.residual import ResidualExperts

# Double precision, chains of a few thousand additions of numbers of magnitude 1 (counted in test_modules_oracle.py).
BOUND = 1e4 * torch.finfo(torch.float64).eps


pytestmark = mark.usefixtures("one_thread")


def strided(block: type[nn.Module], inplanes: int, planes: int) -> nn.Module:
    out = planes * block.expansion
    return block(inplanes, planes, 2, nn.Sequential(nn.Conv2d(inplanes, out, 1, 2, bias=False), nn.BatchNorm2d(out)))


def timm_avg_pool_down(inplanes: int, planes: int) -> nn.Module:
    skip = timm_resnet.downsample_avg(inplanes, 4 * planes, 1, stride=2)
    return timm_resnet.Bottleneck(inplanes, planes, stride=2, downsample=skip)


BLOCKS = {
    "torchvision basic": lambda: torchvision_resnet.BasicBlock(8, 8),
    "torchvision bottleneck, stride 2": lambda: strided(torchvision_resnet.Bottleneck, 8, 3),
    "timm bottleneck, avg-pool downsample": lambda: timm_avg_pool_down(8, 3),
    "own basic, stride 2": lambda: strided(own_resnet.BasicBlock, 8, 6),
}


@torch.no_grad()
def scramble(module: nn.Module) -> nn.Module:
    """Own numbers for every parameter and statistic, as after training."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.add_(torch.randn_like(value), alpha=0.2)
    return module


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def of_experts(experts: nn.ModuleList, what: str = "state_dict") -> dict[str, Tensor]:
    """Each of the experts' tensors, or with "grad" their gradients, as one of [E, ...]."""
    if what == "grad":
        tables = [{name: p.grad for name, p in expert.named_parameters()} for expert in experts]
    else:
        tables = [dict(getattr(expert, what)()) for expert in experts]
    return {name: torch.stack([table[name] for table in tables]) for name in tables[0]}


class ChosenRoutes(nn.Module):
    """A gate with a parameter instead of a network: sample b goes to expert ``experts[b]``."""

    def __init__(self, experts: list[int], num_experts: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.eye(num_experts, dtype=torch.float64)[experts].view(-1, num_experts))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


# --- how experts start ------------------------------------------------------------------------------------------------


@mark.parametrize("options", [{"top_k": 1}, {"top_k": 2}, {"top_k": 3, "gate": "conv_gap"}], ids=str)
@mark.parametrize("name", BLOCKS)
def test_copies_compute_what_the_block_did(name: str, options: dict):
    torch.manual_seed(0)
    block = scramble(BLOCKS[name]().double()).eval()
    moe = FusedBlockMoE.from_block(block, 3, **options)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(moe(x), block(x), rtol=BOUND, atol=BOUND)


def test_copies_of_a_convolution_compute_what_it_did():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, stride=2).double()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(FusedConvMoE.from_conv(conv, 3)(x), conv(x), rtol=BOUND, atol=BOUND)


def test_fresh_experts_are_he_initialised_and_all_different():
    torch.manual_seed(0)
    block = scramble(strided(torchvision_resnet.Bottleneck, 32, 24))
    moe = FusedBlockMoE.from_block(block, 4, init="fresh")
    weights = {name: p for name, p in of_experts(moe.experts, "named_parameters").items() if p.dim() == 5}
    assert set(weights) == {"conv1.weight", "conv2.weight", "conv3.weight", "downsample.0.weight"}
    for name, weight in weights.items():
        _, out, _, height, width = weight.shape
        std = math.sqrt(2.0 / (out * height * width))  # He normal by fan-out
        for values in weight:
            n = values.numel()  # of n normal numbers: mean +- std/sqrt(n), deviation +- std/sqrt(2n); five of these
            assert values.mean().abs() < 5 * std / math.sqrt(n), name
            assert abs(values.std() - std) < 5 * std / math.sqrt(2 * n), name
        for a, b in combinations([*weight, block.get_parameter(name)], 2):
            # Independent weights differ by sqrt(2) std in the mean square; half of that would be a shared part.
            assert (a - b).square().mean() > std**2, name
    for name, value in of_experts(moe.experts).items():
        if name not in weights:  # normalisations stay the block's
            assert all(torch.equal(v, block.state_dict()[name]) for v in value), name


def test_fresh_convolutions_have_zero_bias_and_fan_out_of_their_group():
    torch.manual_seed(0)
    moe = FusedConvMoE.from_conv(nn.Conv2d(32, 64, 3, groups=2), 3, init="fresh")
    assert not any(conv.bias.any() for conv in moe.experts)
    std = math.sqrt(2.0 / (64 * 9))  # torch counts the fan-out of a grouped convolution over all its filters
    for values in (conv.weight for conv in moe.experts):
        assert abs(values.std() - std) < 5 * std / math.sqrt(2 * values.numel())


@mark.parametrize("init", ["copy", "fresh"])
@mark.parametrize("name", BLOCKS)
def test_the_block_is_not_changed(name: str, init: str):
    block = scramble(BLOCKS[name]()).train()
    block.bn1.eval()  # a frozen normalisation in a training block
    state, modes = snapshot(block), [module.training for module in block.modules()]
    moe = FusedBlockMoE.from_block(block, 3, init=init)
    assert_same_state(block.state_dict(), state)
    assert [module.training for module in block.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in block.parameters())
    before = snapshot(moe)
    with torch.no_grad():
        for value in block.state_dict().values():
            value.zero_()
    assert_same_state(moe.state_dict(), before)  # nothing is shared
    moe.eval()
    assert [module.training for module in block.modules()] == modes


@mark.parametrize("name", BLOCKS)
def test_the_probe_draws_no_random_numbers(name: str):
    block = BLOCKS[name]()
    state = torch.get_rng_state()
    ResidualExperts.of(block, 3)
    assert torch.equal(torch.get_rng_state(), state)


@mark.parametrize("training", [True, False])
@mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_mode_are_the_blocks(dtype: torch.dtype, training: bool):
    for layer in (
        FusedBlockMoE.from_block(torchvision_resnet.BasicBlock(4, 4).to(dtype).train(training), 2),
        FusedConvMoE.from_conv(nn.Conv2d(4, 4, 3).to(dtype).train(training), 2),
    ):
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert all(module.training == training for module in layer.modules())


# --- one expert -------------------------------------------------------------------------------------------------------


@mark.parametrize("name", BLOCKS)
def test_an_expert_is_an_ordinary_block_with_its_own_parameters(name: str):
    torch.manual_seed(0)
    block = BLOCKS[name]().double()
    moe = scramble(FusedBlockMoE.from_block(block, 3, init="fresh"))
    for i in range(3):
        expert = moe.expert(i)
        assert type(expert) is type(block)
        assert_same_state(expert.state_dict(), moe.experts[i].state_dict())
        assert all(p.is_leaf and p.requires_grad for p in expert.parameters())
        assert expert.training == moe.training
        before = snapshot(moe)
        with torch.no_grad():
            for value in expert.state_dict().values():
                value.zero_()
        assert_same_state(moe.state_dict(), before)
    assert not any(module.training for module in moe.eval().expert(0).modules())


@mark.parametrize("training", [True, False], ids=["train", "eval"])
@mark.parametrize("name", BLOCKS)
def test_a_fixed_expert_takes_every_sample(name: str, training: bool):
    torch.manual_seed(0)
    moe = scramble(FusedBlockMoE.from_block(BLOCKS[name]().double(), 3, 2, init="fresh")).train(training)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    for i in range(3):
        others = of_experts(moe.experts)
        expert = moe.expert(i)
        moe.fixed_expert = i
        out = moe(x)
        torch.testing.assert_close(out, expert(x), rtol=BOUND, atol=BOUND)
        for name_, value in of_experts(moe.experts).items():  # statistics: this expert's moved, no other's
            torch.testing.assert_close(value[i], expert.state_dict()[name_], rtol=BOUND, atol=BOUND)
            rest = [j for j in range(3) if j != i]
            assert torch.equal(value[rest], others[name_][rest]), name_

        assert moe.fixed_expert == i
        one_hot = torch.eye(3, dtype=torch.float64)[i]
        routing = moe.routing
        assert torch.equal(routing.scores, one_hot.expand(4, 3))
        assert torch.equal(routing.indices, torch.full((4, 1), i))
        assert torch.equal(routing.weights, torch.ones(4, 1, dtype=torch.float64))
        assert torch.equal(routing.mean_scores, one_hot)
        assert torch.equal(routing.argmax_fraction, one_hot)
        assert routing.noise_scale is None
        assert routing.nonfinite.item() == 0
        moe.zero_grad()
        out.sum().backward()
        assert all(p.grad is None for p in moe.gate.parameters())


def test_without_a_fixed_expert_the_gate_decides_again():
    torch.manual_seed(0)
    moe = scramble(FusedBlockMoE.from_block(torchvision_resnet.BasicBlock(8, 8).double(), 3, init="fresh")).eval()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    assert moe.fixed_expert is None
    wanted, indices = moe(x), moe.routing.indices
    moe.fixed_expert = 1
    assert (moe(x) - wanted).abs().max() > 1e-3
    moe.fixed_expert = None
    assert torch.equal(moe(x), wanted)
    assert torch.equal(moe.routing.indices, indices)


@mark.parametrize("bad", [-1, 3, 1.0, "1", True, torch.tensor(1)], ids=repr)
def test_an_expert_that_is_none_is_refused(bad):
    moe = FusedConvMoE.from_conv(nn.Conv2d(4, 4, 1), 3)
    moe.fixed_expert = 2
    with raises(ValueError, match=r"fixed_expert: expected an expert in 0\.\.2, got"):
        moe.fixed_expert = bad
    assert moe.fixed_expert == 2
    with raises(ValueError, match=r"index: expected an expert in 0\.\.2, got"):
        moe.expert(bad)


# --- batch norm with few rows -----------------------------------------------------------------------------------------


def test_an_expert_without_rows_keeps_its_statistics_and_gets_zero_gradients():
    torch.manual_seed(0)
    gate = ChosenRoutes([0, 2, 0, 2, 2], 4)
    moe = FusedBlockMoE.from_block(strided(own_resnet.BasicBlock, 8, 6).double(), 4, 1, gate=gate, init="fresh")
    scramble(moe.experts).train()
    before = of_experts(moe.experts)
    moe(torch.randn(5, 8, 6, 6, dtype=torch.float64)).square().sum().backward()
    for name, value in of_experts(moe.experts, "named_buffers").items():
        for i in (1, 3):
            assert torch.equal(value[i], before[name][i]), name
        for i in (0, 2):
            assert not torch.equal(value[i], before[name][i]), name
    assert [expert.bn1.num_batches_tracked.item() for expert in moe.experts] == [1, 0, 1, 0]
    for name, grad in of_experts(moe.experts, "grad").items():
        assert not grad[[1, 3]].any(), name  # exactly zero; NaN would count as true
        assert grad[[0, 2]].flatten(1).any(1).all(), name


def test_a_single_value_a_channel_normalises_to_the_bias():
    """n*H*W = 1, where torch's BatchNorm2d refuses: variance 0, so a normalised value of 0."""
    torch.manual_seed(0)
    gate = ChosenRoutes([1, 0, 1, 2, 1], 4)  # 1x1 maps: expert 1 has three values a channel, experts 0 and 2 one
    moe = FusedBlockMoE.from_block(own_resnet.BasicBlock(8, 8).double(), 4, 1, gate=gate, init="fresh")
    scramble(moe.experts).train()
    before = of_experts(moe.experts)
    expert = moe.expert(1)
    x = torch.randn(5, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    out = moe(x)

    rows = [0, 2, 4]
    x_ordinary = x.detach()[rows].requires_grad_()
    ordinary = expert(x_ordinary)
    torch.testing.assert_close(out[rows], ordinary, rtol=BOUND, atol=BOUND)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (ordinary * weight[rows]).sum().backward()
    torch.testing.assert_close(x.grad[rows], x_ordinary.grad, rtol=BOUND, atol=BOUND)
    for name, parameter in moe.experts[1].named_parameters():
        torch.testing.assert_close(parameter.grad, expert.get_parameter(name).grad, rtol=BOUND, atol=BOUND)

    for row, i in ((1, 0), (3, 2)):
        bias = before["bn2.bias"][i].view(8, 1, 1)
        assert torch.equal(out[row], torch.relu(bias + x[row]))
        alive = (out[row] > 0) * weight[row]
        assert torch.equal(x.grad[row], alive)  # through the skip alone
        torch.testing.assert_close(moe.experts[i].bn2.bias.grad, alive.flatten(), rtol=BOUND, atol=BOUND)
        for name in ("conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias", "bn2.weight"):
            assert not moe.experts[i].get_parameter(name).grad.any(), name
        # Statistics: the mean moves by the momentum, 0.1, towards the one value there is; the variance stays.
        value = torch.conv2d(x[row : row + 1].detach(), before["conv1.weight"][i], padding=1).flatten()
        moved = 0.9 * before["bn1.running_mean"][i] + 0.1 * value
        torch.testing.assert_close(moe.experts[i].bn1.running_mean, moved, rtol=BOUND, atol=BOUND)
        assert torch.equal(moe.experts[i].bn1.running_var, before["bn1.running_var"][i])
    assert [expert.bn1.num_batches_tracked.item() for expert in moe.experts] == [1, 1, 1, 0]


def test_a_single_value_a_channel_is_an_ordinary_case_in_eval_mode():
    torch.manual_seed(0)
    moe = FusedBlockMoE.from_block(own_resnet.BasicBlock(8, 8).double(), 2, 1, gate=ChosenRoutes([1], 2), init="fresh")
    scramble(moe.experts)
    moe.eval()
    x = torch.randn(1, 8, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(moe(x), moe.expert(1)(x), rtol=BOUND, atol=BOUND)


@mark.parametrize("fixed", [None, 1])
@mark.parametrize("training", [True, False], ids=["train", "eval"])
@mark.parametrize("name", BLOCKS)
def test_an_empty_batch_has_an_output_and_a_backward(name: str, training: bool, fixed: int | None):
    block = BLOCKS[name]()
    moe = FusedBlockMoE.from_block(block, 3).train(training)
    moe.fixed_expert = fixed
    before = snapshot(moe)
    x = torch.randn(0, 8, 6, 6, requires_grad=True)
    out = moe(x)
    assert out.shape == (0, *block.eval()(torch.randn(1, 8, 6, 6)).shape[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert_same_state(moe.state_dict(), before)
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())


# --- no wasted work ---------------------------------------------------------------------------------------------------


@mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_convolutions_see_each_sample_once_an_expert(monkeypatch, training: bool):
    """Dispatch by sorting: k*B rows in all; an expert without rows runs on none, and without gradients not at all. In
    float64, which runs by segments."""
    torch.manual_seed(0)
    moe = FusedBlockMoE.from_block(strided(own_resnet.BasicBlock, 8, 6).double(), 7, 2, init="fresh").train(training)
    calls: dict[tuple[int, ...], list[int]] = {}  # by the shape of a filter bank: conv1, conv2 and the skip differ
    conv2d = torch.nn.functional.conv2d

    def counting(x: Tensor, weight: Tensor, *rest) -> Tensor:
        calls.setdefault(tuple(weight.shape), []).append(x.shape[0])
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", counting)
    moe(torch.randn(5, 8, 6, 6, dtype=torch.float64))
    counts = moe.routing.indices.flatten().bincount(minlength=7).tolist()
    assert 0 in counts, "the case needs an expert without rows"
    assert sum(counts) == 5 * 2
    shapes = [(6, 8, 3, 3), (6, 6, 3, 3), (6, 8, 1, 1)]
    assert calls == dict.fromkeys(shapes, counts)
    calls.clear()
    with torch.no_grad():
        moe(torch.randn(5, 8, 6, 6, dtype=torch.float64))
    counts = moe.routing.indices.flatten().bincount(minlength=7).tolist()
    assert 0 in counts, "the case needs an expert without rows"
    assert calls == {shape: [count for count in counts if count] for shape in shapes}


@mark.parametrize("top_k", [1, 2])
@mark.parametrize("num_experts", [2, 16])
def test_work_is_that_of_k_blocks_for_any_number_of_experts(num_experts: int, top_k: int):
    """In float64, which runs by segments: PyTorch counts its own convolutions only."""
    torch.manual_seed(0)
    block = own_resnet.BasicBlock(8, 8).double()
    moe = FusedBlockMoE.from_block(block, num_experts, top_k, init="fresh")
    x = torch.randn(6, 8, 5, 5, dtype=torch.float64, requires_grad=True)

    def convolution_flops(module: nn.Module) -> dict:
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        flops = counter.get_flop_counts()["Global"]
        return {op: n for op, n in flops.items() if "convolution" in str(op)}

    dense, routed = convolution_flops(copy.deepcopy(block)), convolution_flops(moe)
    assert len(dense) == 2  # forward and backward
    assert routed == {op: top_k * n for op, n in dense.items()}
