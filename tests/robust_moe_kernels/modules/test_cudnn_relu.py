"""A folded convolution with its addition and ReLU as one call of cuDNN, by a stand-in of the same signature."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from folding_models import assert_same, images, network, step
from torch import Tensor

from benchmarks import launches
from robust_moe_kernels.modules import attack_mode, cudnn_relu, folded_conv


@torch.library.custom_op("stand_in::conv_relu", mutates_args=())
def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu_()


@torch.library.custom_op("stand_in::conv_add_relu", mutates_args=())
def conv_add_relu(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    alpha: float | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    out = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return out.add_(z, alpha=1 if alpha is None else alpha).relu_()


@conv_relu.register_fake
def _(x, weight, bias, *call):
    return torch.conv2d(x, weight, bias, *call)


@conv_add_relu.register_fake
def _(x, weight, z, alpha, bias, *call):
    return torch.conv2d(x, weight, bias, *call)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """As on a GPU where cuDNN's calls are chosen; the names of those that were made."""
    made: list[str] = []
    for name, stand_in in (("cudnn_convolution_relu", conv_relu), ("cudnn_convolution_add_relu", conv_add_relu)):

        def called(*args, name=name, stand_in=stand_in):
            made.append(name)
            return stand_in(*args)

        monkeypatch.setattr(torch, name, called)
    monkeypatch.setattr(folded_conv, "fuses", lambda x, dtype: "kernel")
    monkeypatch.setattr(cudnn_relu, "takes", lambda x, filters, groups: filters.shape[1] % 8 == 0)
    return made


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(format, calls):
    model = network(32).to(memory_format=format)
    x = images().contiguous(memory_format=format)
    truth, unfolded = step(copy.deepcopy(model).double(), x.double()), step(model, x)
    with attack_mode(model):
        found = [step(model, x) for _ in range(3)]
    assert calls.count("cudnn_convolution_relu") == 2 * 2  # the forward that is learned from has its ReLUs apart
    assert calls.count("cudnn_convolution_add_relu") == 3 * 2
    assert_same(found[1], found[2])
    for pair in found:
        for actual, other, exact in zip(pair, unfolded, truth, strict=True):
            bound = 2 * (other - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (actual - exact).abs().max() <= bound


def test_second_derivatives(calls):
    model = network(32)

    def curvature() -> Tensor:
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = curvature()
    with attack_mode(model):
        step(model, images())
        calls.clear()
        found = curvature()
    assert calls
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_under_autocast(calls):
    """In bfloat16 the shift is rounded too, to 8 bits, and the filters; the sums are not."""
    model = network(32).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    expected = step(model, x)
    with torch.autocast("cpu", torch.bfloat16), attack_mode(model):
        found = [step(model, x) for _ in range(2)]
    assert calls
    for out, gradient in found:
        assert gradient.dtype == torch.float32
        assert (out - expected[0]).abs().max() <= 0.05 * expected[0].abs().max()


@pytest.mark.parametrize(("autocast", "most"), [(False, 85), (True, 87)], ids=["float32", "bfloat16"])
def test_launches_of_a_pgd_step(autocast, most, calls, monkeypatch):
    """A call counts as one launch. The stem, of three channels, stays a convolution and a kernel."""
    monkeypatch.setattr(launches, "CASES", (launches.whole_step,))
    found = launches.count(autocast)["PGD step"]
    assert found["stand_in::conv_relu"] == found["stand_in::conv_add_relu"] == 7
    assert found.total() <= most, found.most_common()


class _Cuda(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"enabled": False}, False),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float32, "fp32_precision": "ieee"}, False),
        ({"dtype": torch.float64}, False),
        ({"channels": 12}, False),
        ({"groups": 2}, False),
        ({"deterministic": True}, False),
        ({"algorithms": True}, False),
        ({"available": False}, False),
        ({"type": torch.Tensor}, False),  # on the CPU
    ],
    ids=str,
)
def test_what_is_taken(changes, taken, monkeypatch):
    found = {"enabled": True, "dtype": torch.bfloat16, "channels": 16, "groups": 1, "deterministic": False}
    found |= {"algorithms": False, "available": True, "type": _Cuda, "fp32_precision": "tf32"} | changes
    conv = SimpleNamespace(fp32_precision=found["fp32_precision"])
    cudnn = SimpleNamespace(is_available=lambda: found["available"], enabled=True, conv=conv)
    cudnn.deterministic = found["deterministic"]
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(cudnn_relu, "ENABLED", found["enabled"])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: found["algorithms"])
    x = torch.zeros(2, found["channels"], 4, 4, dtype=found["dtype"]).as_subclass(found["type"])
    filters = torch.zeros(8, found["channels"], 3, 3, dtype=found["dtype"])
    assert cudnn_relu.takes(x, filters, found["groups"]) is taken
