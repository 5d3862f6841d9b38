"""What the engine keeps of experts between forwards is given up when anything that it depends on changes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules import MoELayer, attack_mode, prune_experts


def block(**options) -> MoELayer:
    skip = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12))
    layer = FusedBlockMoE.from_block(Bottleneck(8, 3, 2, skip), 3, init="fresh", **options)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return layer.eval()


def conv(**options) -> MoELayer:
    return FusedConvMoE.from_conv(nn.Conv2d(8, 8, 3, padding=1), 3, init="fresh", **options).eval()


def images() -> Tensor:
    return torch.randn(6, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def each(layer: MoELayer, change: Callable[[nn.Module], object]) -> None:
    for expert in layer.experts:
        change(expert)


def own_bias(value: float) -> Callable[[nn.Module], None]:
    def change(expert: nn.Module) -> None:
        if "bias" in expert.bn1._parameters:
            del expert.bn1.bias
        expert.bn1.bias = torch.full((3,), value)

    return change


def another_weight(expert: nn.Module) -> None:
    expert.conv2.weight = nn.Parameter(expert.conv2.weight.detach() * 2)


def transposed(expert: nn.Module) -> None:
    expert.conv2.weight.data = expert.conv2.weight.data.transpose(2, 3)


def other_table(expert: nn.Module) -> None:
    expert.conv2._parameters = dict(expert.conv2._parameters)
    expert.conv2.weight = nn.Parameter(expert.conv2.weight.detach() * 2)


def circular(expert: nn.Module) -> None:
    expert.conv2._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1,) * 4, mode="circular"), w, b, 2)


def buffer(expert: nn.Module) -> None:
    weight = expert.conv2.weight.detach() * 2
    del expert.conv2.weight
    expert.conv2.register_buffer("weight", weight)


def without_statistics(expert: nn.Module) -> None:
    expert.bn1.running_mean = expert.bn1.running_var = None


CHANGES: dict[str, Callable[[MoELayer], object]] = {
    "a parameter": lambda layer: each(layer, another_weight),
    "its strides": lambda layer: each(layer, transposed),
    "its table": lambda layer: each(layer, other_table),
    "a buffer in its place": lambda layer: each(layer, buffer),
    "in place": lambda layer: each(layer, lambda e: e.conv2.weight.data.mul_(2)),
    "of one expert": lambda layer: another_weight(layer.experts[1]),
    "a norm's eps": lambda layer: each(layer, lambda e: setattr(e.bn1, "eps", 1.0)),
    "one norm's eps": lambda layer: setattr(layer.experts[1].bn1, "eps", 1.0),
    "a bias that is no parameter": lambda layer: each(layer, own_bias(0.5)),
    "a convolution's own way": lambda layer: each(layer, circular),
    "a stride": lambda layer: each(layer, lambda e: setattr(e.conv2, "dilation", (1, 1))),
    "one expert's pool": lambda layer: setattr(layer.experts[1].downsample[0], "kernel_size", 1),
    "a hook": lambda layer: layer.experts[0].conv2.register_forward_hook(lambda m, x, y: y * 2),
    "a layer": lambda layer: setattr(layer.experts[0], "conv2", nn.Conv2d(3, 3, 3, 2, 1, bias=False)),
    "no statistics": lambda layer: each(layer, without_statistics),
}


@pytest.mark.parametrize("inside", [False, True], ids=["between forwards", "inside an attack"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:.*run one by one")
def test_a_change_is_seen(name: str, inside: bool):
    torch.manual_seed(0)
    layer, x = block(), images()
    before = layer(x)

    def compare() -> None:
        CHANGES[name](layer)
        plain = copy.deepcopy(layer)
        plain.impl = "reference"
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)

    if inside:
        with attack_mode(layer):
            layer(x)
            compare()
    else:
        compare()
    if name != "a stride":
        assert not torch.allclose(layer(x), before, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*run one by one")
def test_plain_tensors_that_change_again_are_seen():
    layer, x = block(), images()
    each(layer, own_bias(0.5))
    first = layer(x)
    each(layer, own_bias(1.5))
    assert not torch.equal(layer(x), first)


def test_statistics_do_not_move_without_being_tracked():
    layer = block().train()
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer(images())
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_experts_that_are_added_dropped_or_sliced():
    layer, x = conv(top_k=1), images()
    layer(x)
    layer.experts.append(copy.deepcopy(layer.experts[0]))
    layer.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert layer(x).shape == x.shape
    places = [expert.weight.data_ptr() for expert in layer.experts]
    assert len(layer.experts[::2]) == 2 and len(layer.experts[4:]) == 0
    assert places == [expert.weight.data_ptr() for expert in layer.experts]
    layer.experts.keep([0, 1])
    layer.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert layer(x).shape == x.shape


def test_experts_of_other_sizes_run_one_by_one():
    layer = FusedConvMoE.from_conv(nn.Conv2d(8, 8, 3, padding="same"), 3, top_k=3).eval()
    layer.experts[1] = nn.Conv2d(8, 8, 5, padding="same")
    plain = copy.deepcopy(layer)
    plain.impl = "reference"
    torch.testing.assert_close(layer(images()), plain(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [[0], [1], [0, 1]], ids=str)
def test_what_is_pruned_takes_no_memory(keep: list[int]):
    def size(module: nn.Module) -> int:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return file.getbuffer().nbytes

    layer = FusedBlockMoE.from_block(BasicBlock(32, 32), 6)
    one = size(layer.expert(0))
    assert size(prune_experts(layer, keep)) < (len(keep) + 0.5) * one


def test_shared_memory_stays_shared():
    layer = conv()
    layer.experts[1].weight = nn.Parameter(layer.experts[1].weight.detach().clone())
    layer.share_memory()
    layer(images())
    assert all(parameter.is_shared() for parameter in layer.parameters())
