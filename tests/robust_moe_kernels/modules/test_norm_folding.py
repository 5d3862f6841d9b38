"""The batch norms of ordinary convolutions in an attack: what is folded, and what it computes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from folding_models import CONVOLUTIONS, assert_close, assert_same, change, images, learn, network, step
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models import resnet

from robust_moe_kernels.modules import attack_mode, folded_conv
from robust_moe_kernels.modules.norm_knowledge import KNOWN


def with_activation_in_the_norm() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3, groups=8), BatchNormAct2d(8, act_layer=nn.SiLU)]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 1), BatchNormAct2d(8), nn.Flatten(), nn.Linear(128, 5))


ONE_EACH = [1, 1, 1, 1]  # blocks of each stage
MODELS = {
    "own": network,
    "torchvision BasicBlock": lambda: torchvision.models.ResNet(resnet.BasicBlock, ONE_EACH, num_classes=5),
    "torchvision Bottleneck": lambda: torchvision.models.ResNet(resnet.Bottleneck, ONE_EACH, num_classes=5),
    "timm BasicBlock": lambda: timm.create_model("resnet10t", num_classes=5),
    "norm and activation in one": with_activation_in_the_norm,
    "norm before convolution": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
    "ReLU6": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_in_double_precision(name, folded):
    torch.manual_seed(0)
    model = change(MODELS[name]()).double()
    x = images(2, torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        found = [step(model, x)]
        first = len(folded)  # of the forward that is learned from
        found.append(step(model, x))
    assert 2 < len(folded) - first <= first
    for actual in found:
        assert_close(actual, expected)
    assert_same(found[1], found[0])
    assert_same(step(model, x), expected)  # outside, the model as it was


@pytest.mark.parametrize("width", [8, folded_conv.ENGINE_CHANNELS], ids=["oneDNN", "engine"])
def test_single_precision_is_as_accurate_as_unfolded(width, folded):
    """Both against float64; folding rounds each filter once more, which is one more rounding of each product: at most
    twice the error."""
    model = network(width)
    x = images(16)
    twin = copy.deepcopy(model).double()
    truth, unfolded = step(twin, x.double()), step(model, x)
    with attack_mode(model):
        found = [step(model, x) for _ in range(2)]
    assert_same(found[1], found[0])
    assert folded
    for actual, other, exact in zip(found[0], unfolded, truth, strict=True):
        bound = 2 * (other - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (actual - exact).abs().max() <= bound


def test_every_norm_is_folded_and_fused_with_what_follows(folded, raw):
    model = network()
    learn(model)
    assert len(raw) == CONVOLUTIONS <= len(folded)  # the first forward computes both
    folded.clear()
    raw.clear()
    with attack_mode(model):
        step(model, images())
        with torch.no_grad():
            model(images())
    assert not raw
    assert sorted(folded) == [False] * 2 + [True] * 2 * (CONVOLUTIONS - 1)  # the downsampling skip has no ReLU


def test_only_the_first_forward_is_careful(raw):
    """What it computes besides goes with it: the second forward of the same attack is folded without more ado."""
    model = network()
    with attack_mode(model):
        for _ in range(3):
            step(model, images())
            assert len(raw) == CONVOLUTIONS


def test_what_follows_by_one_kernel(monkeypatch, folded):
    """The way of a GPU, by the native kernels of the CPU: as accurate, and the same in every forward."""
    monkeypatch.setattr(folded_conv, "fuses", lambda x, dtype: "kernel")
    for format in (torch.contiguous_format, torch.channels_last):
        model = network(32).to(memory_format=format)
        x = images().contiguous(memory_format=format)
        truth = step(copy.deepcopy(model).double(), x.double())
        unfolded = step(model, x)
        with attack_mode(model):
            found = [step(model, x) for _ in range(3)]
        for actual in found[1:]:
            assert_same(actual, found[0])
        for actual, other, exact in zip(found[0], unfolded, truth, strict=True):
            bound = 2 * (other - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (actual - exact).abs().max() <= bound


def test_a_skip_s_shift_is_added_with_the_block_s(monkeypatch):
    """The downsampling convolution takes no kernel of its own: its shift is in the one that adds the skip. Whoever
    reads the skip besides gets it with its shift."""
    monkeypatch.setattr(folded_conv, "fuses", lambda x, dtype: "kernel")
    kernels: list[Tensor] = []
    scale_shift = folded_conv.scale_shift
    monkeypatch.setattr(folded_conv, "scale_shift", lambda *args: kernels.append(args[0]) or scale_shift(*args))
    model = network(32).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    expected = model(x)
    learn(model, x)
    kernels.clear()
    with attack_mode(model), torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert len(kernels) == 1 + 2  # the stem, and each block's first convolution

    block, kept = model[4], []
    with attack_mode(model), torch.no_grad():
        body = model[:4](x)
        skip = block.downsample(body)
        out = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(body))))) + skip)
        kept.append(skip + 0)
    torch.testing.assert_close(out, block(model[:4](x)))
    torch.testing.assert_close(kept[0], block.downsample(model[:4](x)))


def test_the_same_under_autocast(monkeypatch):
    """In bfloat16 a kernel that adds before it rounds gives other bits than two: the first forward has them too."""
    monkeypatch.setattr(folded_conv, "fuses", lambda x, dtype: "kernel")
    model = network(32).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    expected = step(model, x)
    with torch.autocast("cpu", torch.bfloat16), attack_mode(model):
        found = [step(model, x) for _ in range(3)]
    for actual in found:
        assert_same(actual, found[0])
        assert (actual[0] - expected[0]).abs().max() <= 0.05 * expected[0].abs().max()  # 8 bits, six layers deep


def test_forwards_without_gradients_have_the_same_bits_before_and_after_learning(folded):
    """Otherwise an evaluation that is killed and resumed would end in other numbers."""
    model = network()
    with attack_mode(model), torch.no_grad():
        before = model(images())
    assert folded
    learn(model)
    with attack_mode(model), torch.no_grad():
        assert_same((model(images()),), (before,))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "form",
    [{}, {"stride": 2, "padding": 2}, {"dilation": 2}, {"groups": 4}, {"padding_mode": "circular", "padding": 1}],
)
def test_forms_of_convolutions_and_norms(affine, bias, form, folded):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias, **form), nn.BatchNorm2d(8, affine=affine, eps=0.1)).double()
    nn.init.uniform_(model[1].running_var, 0.5, 1.5)
    nn.init.uniform_(model[1].running_mean, 0.5, 1.5)
    x = torch.rand(3, 4, 9, 7, dtype=torch.float64)
    expected = step(model.eval(), x)
    with attack_mode(model):
        for _ in range(2):
            assert_close(step(model, x), expected)
    assert len(folded) == 2


def test_parametrised_weights_are_left_alone(folded):
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = change(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double())
    parametrize.register_parametrization(model[0], "weight", Half())
    x = images(dtype=torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        for _ in range(2):
            assert_same(step(model, x), expected)
    assert not folded


def test_subclasses_compute_as_they_say():
    class Twice(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = change(nn.Sequential(Twice(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), Shifted(4)).double())
    x = images(dtype=torch.float64)
    expected = step(model, x)
    with attack_mode(model):
        for _ in range(2):
            assert_close(step(model, x), expected)


class Pair(nn.Module):
    """One convolution read by two norms, each in a call of its own; ``first``: it is also the model's first."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.stem = None if first else nn.Conv2d(3, 3, 3, padding=1)
        self.conv, self.norms = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.stem is None else self.stem(x)
        return torch.cat([F.relu(norm(self.conv(x))) for norm in self.norms], 1).mean((2, 3))


@pytest.mark.parametrize("first", [False, True])
def test_a_convolution_of_two_norms(first):
    torch.manual_seed(0)
    model = change(Pair(first).double())
    expected = step(model, images(dtype=torch.float64))
    with attack_mode(model):
        for _ in range(3):
            assert_close(step(model, images(dtype=torch.float64)), expected)


def test_every_convolution_of_a_resnet18_is_folded(folded, raw):
    torch.manual_seed(0)
    model = change(torchvision.models.resnet18(num_classes=5))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    learn(model, x)
    raw.clear()
    folded.clear()
    with attack_mode(model):
        step(model, x)
    assert (len(folded), sum(folded), len(raw)) == (20, 17, 0)  # the skips' three have no ReLU
    assert len(KNOWN[model].chains) == 20
