"""Experts' filters under autocast: an attack casts them once, and again where they changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from pytest import fixture, mark
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE, native
from robust_moe_kernels.modules import attack_mode, casts

pytestmark = mark.skipif(native.why_not_cpu("cpu") is not None, reason="without the extension no engine runs here")


def convolution() -> FusedConvMoE:
    return FusedConvMoE.from_conv(nn.Conv2d(3, 8, 3, padding=1), num_experts=2, noise_std=0.0)


def block() -> FusedBlockMoE:
    return FusedBlockMoE.from_block(BasicBlock(3, 3), num_experts=2, noise_std=0.0)


def filters(layer: nn.Module) -> nn.Conv2d:
    """The second expert's convolution."""
    return next(module for module in layer.experts[1].modules() if isinstance(module, nn.Conv2d))


@torch.no_grad()
def in_place(layer: nn.Module) -> None:
    filters(layer).weight.mul_(1.5)


def step(layer: nn.Module) -> None:
    weight = filters(layer).weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.grad = None


def load(layer: nn.Module) -> None:
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})


def assign(layer: nn.Module) -> None:
    filters(layer).weight.data = filters(layer).weight.data * 0.5


def replace(layer: nn.Module) -> None:
    filters(layer).weight = nn.Parameter(filters(layer).weight.detach() * 0.5, requires_grad=False)


@fixture
def cast_sizes(monkeypatch) -> list[int]:
    """How many tensors each cast was of."""
    counts: list[int] = []
    original = casts._convert

    def counting(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        counts.append(len(tensors))
        return original(tensors, dtype)

    monkeypatch.setattr(casts, "_convert", counting)
    return counts


@mark.parametrize("mode", ["eval", "train"])
@mark.parametrize("together", [True, False], ids=["together", "apart"])
@mark.parametrize("alter", [in_place, step, load, assign, replace])
@mark.parametrize("make", [convolution, block])
def test_an_attack_casts_filters_once_and_again_where_they_changed(
    make: Callable[[], nn.Module], alter: Callable[[nn.Module], None], together: bool, mode: str, cast_sizes: list[int]
):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(6, 3, 4, 4)
    if not together:
        assign(layer)
    with torch.autocast("cpu", torch.bfloat16):
        with attack_mode(layer, mode):
            before = [layer(x) for _ in range(2)]
            assert len(cast_sizes) == 1
            alter(layer)
            other = copy.deepcopy(layer)  # holds nothing
            found = [layer(x) for _ in range(2)]
            assert len(cast_sizes) == 2
            assert layer.experts.held and other.experts.held is None
            assert torch.equal(found[0], other(x))
        assert layer.experts.held is None
        assert not torch.equal(found[0], before[0])
        if mode == "eval":
            assert torch.equal(before[0], before[1])
            assert torch.equal(found[0], found[1])


def test_filters_that_learn_are_cast_in_every_forward(cast_sizes: list[int]):
    layer, x = convolution(), torch.randn(6, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), attack_mode(layer):
        filters(layer).weight.requires_grad_(True)
        for number in (1, 2):
            layer(x).float().sum().backward()
            assert len(cast_sizes) == 2 * number  # the filters, and their gradient
    assert filters(layer).weight.grad is not None
