"""The grouped engine against the loop over segments: every kind of block, every gradient, every statistic.

Truth is the segments' loop in float64. The bound is twice the error that the same loop makes in float32, plus 2e-6 of
the largest value: 32 ulp, for sums of a few hundred products whose order differs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_moe_kernels.dispatch import Op
from robust_moe_kernels.modules import FusedBlockMoE, FusedConvMoE, MoELayer, experts, residual

RESNET18, RESNET50 = torchvision.models.resnet18(), torchvision.models.resnet50()
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "BasicBlock": lambda: RESNET18.layer1[0],
    "BasicBlock, stride 2": lambda: RESNET18.layer2[0],
    "Bottleneck": lambda: RESNET50.layer1[1],
    "Bottleneck, stride 2": lambda: RESNET50.layer2[0],
    "timm, pooled skip": lambda: timm.create_model("resnet26d").layer2[0],
    "convolution with bias": lambda: nn.Conv2d(64, 96, 3, 2, 1),
    "1x1, same padding": lambda: nn.Conv2d(64, 70, 1, padding="same"),
}
# (k, B): one row in all, ragged counts with idle experts, every expert on every sample
SIZES = [(1, 1), (2, 7), (4, 16)]


@contextmanager
def without_engine() -> Iterator[None]:
    found = experts.engine_computes
    experts.engine_computes = residual.engine_computes = lambda *_: False
    try:
        yield
    finally:
        experts.engine_computes = residual.engine_computes = found


def layer(name: str, top_k: int) -> MoELayer:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    if isinstance(block, nn.Conv2d):
        return FusedConvMoE.from_conv(block, 4, top_k, init="fresh")
    return FusedBlockMoE.from_block(block, 4, top_k, init="fresh")


def everything(moe: MoELayer, x: Tensor) -> dict[str, Tensor | None]:
    """Output, all gradients of a fixed weighting of it, all buffers afterwards."""
    moe = copy.deepcopy(moe)
    x = x.clone().requires_grad_()
    y = moe(x)
    weighting = torch.arange(y.numel(), dtype=torch.float64).sin().to(y.dtype)
    (y * weighting.view_as(y)).sum().backward()
    found = {"output": y.detach(), "x": x.grad}
    found |= {name: parameter.grad for name, parameter in moe.named_parameters()}
    return found | {f"buffer {name}": buffer for name, buffer in moe.named_buffers()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("top_k", "batch"), SIZES)
@pytest.mark.parametrize("name", BLOCKS)
def test_engine_equals_segments(name: str, top_k: int, batch: int, training: bool):
    moe = layer(name, top_k).train(training)
    x = torch.randn(batch, moe.experts.in_channels, 6, 5)
    assert experts.engine_computes(x, moe.parameters())
    got = everything(moe, x)
    with without_engine():
        single, truth = everything(moe, x), everything(moe.double(), x.double())
    for key, wanted in truth.items():
        if wanted is None:
            assert got[key] is None, key
            continue
        wanted = wanted.double()
        scale = wanted.abs().max().clamp_min(1e-30)
        error, allowed = ((found[key].double() - wanted).abs().max() / scale for found in (got, single))
        assert error <= 2 * allowed + 2e-6, f"{key}: {error:.1e}, segments {allowed:.1e}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["BasicBlock", "BasicBlock, stride 2", "convolution with bias"])
def test_half_precision_on_the_engine(name: str, training: bool, monkeypatch):
    """Under autocast a layer is as accurate as its modules by themselves, both against float64, and what stands between
    its convolutions is native."""
    chosen = set()
    choose = Op.choose

    def noted(op: Op, *arguments: object) -> ModuleType:
        found = choose(op, *arguments)
        chosen.add(found.__name__)
        return found

    monkeypatch.setattr(Op, "choose", noted)
    moe = layer(name, 2).train(training)
    x = torch.randn(16, moe.experts.in_channels, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.engine_computes(x, moe.parameters())
        got = everything(moe, x)
        with without_engine():
            single = everything(moe, x)
    assert got["output"].dtype == single["output"].dtype == torch.bfloat16
    between = {op for op in chosen if "expert_conv" not in op}
    assert between and all(op.endswith("native_impl") for op in between), between
    with without_engine():
        truth = everything(moe.double(), x.double())
    for key, wanted in truth.items():
        if wanted is None:
            assert got[key] is None, key
            continue
        scale = wanted.double().norm().clamp_min(1e-30)
        error, allowed = ((found[key].double() - wanted.double()).norm() / scale for found in (got, single))
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps, f"{key}: {error:.1e}, modules {allowed:.1e}"


class Calls(TorchDispatchMode):
    """Names of the package's operations that ran, and whether anything read a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(BLOCKS)[:5])
def test_frozen_parameters_cost_no_weight_gradient(name: str):
    moe = layer(name, 2).eval().requires_grad_(False)
    x = torch.randn(5, moe.experts.in_channels, 6, 5, requires_grad=True)
    with Calls() as calls:
        torch.autograd.grad(moe(x).sum(), x)
    ran = {call.removeprefix("robust_moe_kernels::") for call in calls.names if call.startswith("robust_moe_kernels")}
    assert {"expert_conv_forward", "expert_conv_dgrad"} <= ran
    assert not ran & {"expert_conv_wgrad", "column_sums"}
    assert not [call for call in calls.names if "convolution" in call]


def test_the_engine_reads_nothing_on_the_host():
    moe = layer("BasicBlock", 2)
    x = torch.randn(5, 64, 6, 5, requires_grad=True)
    with Calls() as calls:
        moe(x).sum().backward()
    readers = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select"}
    assert not readers & set(calls.names)


def test_in_channels_last_format_the_filters_output_channels_lie_innermost():
    moe = layer("BasicBlock", 2).to(memory_format=torch.channels_last)
    for module in (moe, copy.deepcopy(moe), moe.double().float()):
        assert all(expert.conv1.weight.stride(0) == 1 for expert in module.experts)
        assert module.expert(0).conv1.weight.is_contiguous()


def test_thread_counts_give_the_same_bits():
    moe = layer("Bottleneck, stride 2", 2)
    x = torch.randn(9, 256, 6, 5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything(moe, x))
    finally:
        torch.set_num_threads(before)
    gate = {"x", "gate.fc.weight", "gate.fc.bias"}  # the gate's own products are PyTorch's
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other if key not in gate)


def _of(expert: int, name: str) -> str:
    kind, _, rest = name.rpartition(" ")
    return f"{kind} experts.{expert}.{rest}".strip()


@pytest.mark.parametrize("frozen", ["bn1", "bn2"])
def test_a_norm_held_in_eval_mode_stays_there(frozen: str):
    moe = layer("BasicBlock", 2).train()
    for expert in moe.experts:
        expert.get_submodule(frozen).eval()
    x = torch.randn(6, 64, 4, 4)
    got = everything(moe, x)
    with without_engine():
        wanted = everything(moe.double(), x.double())
    names = ("conv1.weight", "buffer bn1.running_mean", "buffer bn2.running_var")
    for number in range(4):
        assert torch.equal(got[f"buffer experts.{number}.{frozen}.running_mean"], torch.zeros(64))
    for key in ("output", "x", *(_of(number, name) for number in range(4) for name in names)):
        # float32 against float64; a few ReLUs within rounding of zero may open in one and not in the other
        error = (got[key].double() - wanted[key]).norm() / wanted[key].norm().clamp_min(1e-30)
        assert error < 1e-3, key


def test_a_gate_in_double_precision():
    moe = layer("BasicBlock", 2).eval()
    x = torch.randn(5, 64, 4, 4)
    wanted = moe(x)
    moe.gate.double()
    assert moe(x).dtype == torch.float32
    torch.testing.assert_close(moe(x), wanted, rtol=1e-5, atol=1e-5)  # softmax in float32 against float64


def test_buffers_stay_the_same_tensors():
    moe = layer("BasicBlock", 2).train()
    addresses = {name: buffer.data_ptr() for name, buffer in moe.named_buffers()}
    moe(torch.randn(5, 64, 4, 4))
    assert addresses == {name: buffer.data_ptr() for name, buffer in moe.named_buffers()}


def test_threads_that_share_a_model_get_their_own_answers():
    moe = layer("BasicBlock", 2).eval()
    inputs = [torch.randn(3 + i, 64, 4, 4) for i in range(2)]
    wanted = [moe(x) for x in inputs]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as often as can be: the record of one forward must not reach another
    try:
        with torch.no_grad(), ThreadPoolExecutor(2) as pool:
            for _ in range(100):
                for got, right in zip(pool.map(moe, inputs), wanted, strict=True):
                    assert torch.equal(got, right)
    finally:
        sys.setswitchinterval(before)
