"""Residual networks for small images.

K. He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, with the stem of CIFAR work: a 3x3
convolution of stride 1 and no pooling. Attributes, layer names and state_dict keys are torchvision's, so blocks and
weights pass between the two; torchvision itself is not needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust_moe.models.config import MODELS, ModelConfig
from robust_moe.models.images import ImageSpec
from robust_moe.models.normalize import Normalize
from robust_moe.settings import ConfigError, setting

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "GlobalAveragePool",
    "ResNet",
    "ResNet18Config",
    "ResNet50Config",
    "ResNetConfig",
    "ResNetSmallConfig",
]

WIDTH = "channels of the first stage; each further stage doubles them"
BLOCKS = "residual blocks of each stage"
WIDEST, DEEPEST = 2**14, 256  # channels of the first stage, blocks of a stage


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a skip: [B, inplanes, H, W] -> [B, planes, H/stride, W/stride]."""

    expansion = 1  # output channels / planes

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a skip: [B, inplanes, H, W] -> [B, 4*planes, H/stride, W/stride].

    The stride is the 3x3 convolution's, as in torchvision (the paper has it in the first 1x1).
    """

    expansion = 4  # output channels / planes

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class GlobalAveragePool(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d(1)``, bit for bit: [B, C, H, W] -> [B, C, 1, 1].

    The gradient is one launch on a GPU. PyTorch's own, of channels-last maps, is three, and is contiguous: the layer
    before it has to turn it.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous(memory_format=torch.channels_last):
            means = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)  # the gradient then is channels-last too
        else:
            means = x.mean((2, 3))
        return means[:, :, None, None]


class ResNet(nn.Module):
    """Images float [B, C, H, W] in [0, 1] -> logits [B, num_classes].

    block: :class:`BasicBlock` or :class:`Bottleneck`
    blocks: residual blocks a stage; stage i is ``layer{i}`` (from 1), its planes are ``width * 2**(i-1)``, and every
        stage but the first halves height and width
    width: planes of the first stage
    mean, std: of the images, one number per channel, [C]
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        width: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(len(mean), width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        channels = width
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            stage, channels = _stage(block, channels, width * 2**i, count, stride=1 if i == 0 else 2)
            self.add_module(name, stage)
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(self.normalize(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution of the stride, as ``0``, and its batch norm, as ``1``.

    Below 16 channels the pixels are picked first: there oneDNN 3.12 (PyTorch 2.14 and 2.15, x86-64) writes beyond its
    buffers in the filter gradient of a strided 1x1 convolution in channels-last format, whenever the images do not
    divide evenly over two threads or more. The result is the same.
    """
    if stride == 1 or channels >= 16:
        return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    pick = nn.AvgPool2d(1, stride)
    return nn.Sequential(
        OrderedDict({"pick": pick, "0": nn.Conv2d(channels, out, 1, bias=False), "1": nn.BatchNorm2d(out)})
    )


def _stage(
    block: type[BasicBlock | Bottleneck], channels: int, planes: int, count: int, stride: int
) -> tuple[nn.Sequential, int]:
    """``count`` blocks and their output channels; only the first may have a stride or change the channels."""
    out = planes * block.expansion
    downsample = None
    if stride != 1 or channels != out:
        downsample = _shortcut(channels, out, stride)
    first = block(channels, planes, stride, downsample)
    return nn.Sequential(first, *(block(out, planes) for _ in range(count - 1))), out


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """A CIFAR-style residual network (3x3 stem, no max-pool), input normalisation inside."""

    normalizes: ClassVar[bool] = True

    width: int = setting(64, WIDTH, at_least=1, at_most=WIDEST)
    blocks: tuple[int, ...] = setting((2, 2, 2, 2), BLOCKS, at_least=1, at_most=DEEPEST)

    def check(self) -> None:
        super().check()
        if not self.blocks:
            raise ConfigError("blocks: expected a list of counts >= 1, got []")

    def check_images(self, images: ImageSpec, alone: bool) -> None:
        least = 2 ** (len(self.blocks) - 1) + alone  # alone: the last maps have more than a pixel
        if images.image_size < least:
            why = ", the last one's not to a single pixel in a mixture of networks" if alone else ""
            raise ValueError(
                f"image_size: expected >= {least} pixels for {len(self.blocks)} stages, each but the first halving "
                f"it{why}, got {images.image_size}"
            )


@dataclass(frozen=True, kw_only=True)
class ResNet18Config(ResNetConfig):
    """ResNet-18: 11.2 M parameters."""


@dataclass(frozen=True, kw_only=True)
class ResNet50Config(ResNetConfig):
    """ResNet-50: 23.5 M parameters."""

    blocks: tuple[int, ...] = setting((3, 4, 6, 3), BLOCKS, at_least=1, at_most=DEEPEST)


@dataclass(frozen=True, kw_only=True)
class ResNetSmallConfig(ResNetConfig):
    """0.60 M parameters; one block a stage but the last, which has the two that ``layer4.1`` needs."""

    width: int = setting(16, WIDTH, at_least=1, at_most=WIDEST)
    blocks: tuple[int, ...] = setting((1, 1, 1, 2), BLOCKS, at_least=1, at_most=DEEPEST)


@MODELS.register("resnet_small", ResNetSmallConfig)
@MODELS.register("resnet18", ResNet18Config)
def basic(images: ImageSpec, width: int, blocks: Sequence[int]) -> ResNet:
    """A residual network of :class:`BasicBlock`."""
    return ResNet(BasicBlock, blocks, width, images.num_classes, images.mean, images.std)


@MODELS.register("resnet50", ResNet50Config)
def bottleneck(images: ImageSpec, width: int, blocks: Sequence[int]) -> ResNet:
    """A residual network of :class:`Bottleneck`."""
    return ResNet(Bottleneck, blocks, width, images.num_classes, images.mean, images.std)
