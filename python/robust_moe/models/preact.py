"""Pre-activation networks for small images, as the robustness field trains them: PreActResNet and Wide ResNet.

K. He et al., "Identity Mappings in Deep Residual Networks", arXiv:1603.05027; S. Zagoruyko and N. Komodakis, "Wide
Residual Networks", arXiv:1605.07146. Names of layers, and so state_dict keys, are those of the weights that TRADES
(arXiv:1901.08573, ``wrn34_10``) and Rice et al. (arXiv:2002.11569, ``preact_resnet18``) have published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.models.config import MODELS, ModelConfig
from robust_moe.models.images import ImageSpec
from robust_moe.models.normalize import Normalize
from robust_moe.models.resnet import DEEPEST, WIDEST, GlobalAveragePool, ResNetConfig
from robust_moe.settings import ConfigError, setting

__all__ = [
    "PreActBlock",
    "PreActResNet",
    "PreActResNet18Config",
    "WideBlock",
    "WideResNet",
    "WideResNet28Config",
    "WideResNet34Config",
    "WideResNetConfig",
]

DEPTH = "convolutions, 6 n + 4 for n blocks a stage"
STAGES = 3  # of a Wide ResNet; each but the first halves height and width


class PreActBlock(nn.Module):
    """Norm and ReLU before each of two 3x3 convolutions: [B, inplanes, H, W] -> [B, planes, H/stride, W/stride]. The
    first pair is before the shortcut's convolution too, where there is one."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + skip


class PreActResNet(nn.Module):
    """Images float [B, C, H, W] in [0, 1] -> logits [B, num_classes].

    blocks: :class:`PreActBlock` a stage; stage i is ``layer{i}`` (from 1) of ``width * 2**(i-1)`` channels
    mean, std: of the images, one number per channel, [C]
    """

    def __init__(
        self, blocks: Sequence[int], width: int, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(len(mean), width, 3, padding=1, bias=False)
        channels = width
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        for i, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            out = width * 2**i
            first = PreActBlock(channels, out, 1 if i == 0 else 2)
            self.add_module(name, nn.Sequential(first, *(PreActBlock(out, out) for _ in range(count - 1))))
            channels = out
        self.bn = nn.BatchNorm2d(channels)
        self.avgpool = GlobalAveragePool()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(torch.flatten(self.avgpool(F.relu(self.bn(x))), 1))


class WideBlock(nn.Module):
    """Likewise, with dropout between the convolutions: [B, inplanes, H, W] -> [B, planes, H/stride, W/stride]. The
    skip of a block that keeps the channels is the input itself, and passes no norm."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inplanes), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(planes), nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        same = stride == 1 and inplanes == planes
        self.convShortcut = None if same else nn.Conv2d(inplanes, planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        skip = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(out))))) + skip


class WideResNet(nn.Module):
    """Images float [B, C, H, W] in [0, 1] -> logits [B, num_classes].

    depth: convolutions, 6 n + 4: three stages ``block1`` to ``block3`` of n :class:`WideBlock`, in ``block{i}.layer``
    widen: times 16, 32 and 64 channels
    mean, std: of the images, one number per channel, [C]
    """

    def __init__(
        self, depth: int, widen: int, dropout: float, num_classes: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        channels = 16
        self.conv1 = nn.Conv2d(len(mean), channels, 3, padding=1, bias=False)
        for i in range(STAGES):
            out = 16 * widen * 2**i
            blocks = [WideBlock(channels, out, 1 if i == 0 else 2, dropout)]
            blocks += [WideBlock(out, out, dropout=dropout) for _ in range((depth - 4) // 6 - 1)]
            stage = nn.Module()  # only for the name: block{i}.layer.{j}
            stage.add_module("layer", nn.Sequential(*blocks))
            self.add_module(f"block{i + 1}", stage)
            channels = out
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.normalize(x))
        for i in range(STAGES):
            x = self.get_submodule(f"block{i + 1}.layer")(x)
        return self.fc(torch.flatten(self.avgpool(self.relu(self.bn1(x))), 1))


@dataclass(frozen=True, kw_only=True)
class PreActResNet18Config(ResNetConfig):
    """PreActResNet-18: 11.2 M parameters."""


@dataclass(frozen=True, kw_only=True)
class WideResNetConfig(ModelConfig):
    """A Wide ResNet in its CIFAR form, input normalisation inside."""

    normalizes: ClassVar[bool] = True

    depth: int = setting(28, DEPTH, at_least=10, at_most=6 * DEEPEST + 4)
    widen: int = setting(10, "channels of the three stages, in units of 16, 32 and 64", at_least=1, at_most=WIDEST)
    dropout: float = setting(0.0, "share of values dropped between the convolutions of a block", at_least=0, below=1)

    def check(self) -> None:
        super().check()
        if self.depth % 6 != 4:
            raise ConfigError(f"depth: expected 6 n + 4, such as 16, 22, 28 or 34, got {self.depth}")

    def check_images(self, images: ImageSpec, alone: bool) -> None:
        least = 2 ** (STAGES - 1) + alone  # alone: the last maps have more than a pixel
        if images.image_size < least:
            raise ValueError(f"image_size: expected >= {least} pixels for {STAGES} stages, got {images.image_size}")


@dataclass(frozen=True, kw_only=True)
class WideResNet28Config(WideResNetConfig):
    """WRN-28-10: 36.5 M parameters."""


@dataclass(frozen=True, kw_only=True)
class WideResNet34Config(WideResNetConfig):
    """WRN-34-10: 46.2 M parameters."""

    depth: int = setting(34, DEPTH, at_least=10, at_most=6 * DEEPEST + 4)


@MODELS.register("preact_resnet18", PreActResNet18Config)
def preact(images: ImageSpec, width: int, blocks: Sequence[int]) -> PreActResNet:
    """A residual network of :class:`PreActBlock`."""
    return PreActResNet(blocks, width, images.num_classes, images.mean, images.std)


@MODELS.register("wrn28_10", WideResNet28Config)
@MODELS.register("wrn34_10", WideResNet34Config)
def wide(images: ImageSpec, depth: int, widen: int, dropout: float) -> WideResNet:
    """A Wide ResNet."""
    return WideResNet(depth, widen, dropout, images.num_classes, images.mean, images.std)
