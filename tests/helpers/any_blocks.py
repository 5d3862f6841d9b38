"""Blocks that the grouped engine does not compute, of 8 channels unless the name says otherwise: one of each family of
timm's and torchvision's networks."""

from __future__ import annotations

import timm.models.res2net as timm_res2net
import timm.models.resnest as timm_resnest
import timm.models.resnet as timm_resnet
import timm.models.sknet as timm_sknet
import torch
import torchvision.models.convnext as torchvision_convnext
import torchvision.models.resnet as torchvision_resnet
from timm.layers import BatchNormAct2d, BlurPool2d, DropPath, StdConv2d
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnetv2 import PreActBottleneck
from torch import Tensor, nn

__all__ = ["BLOCKS", "channels_of", "scrambled", "with_conv"]


def with_conv(conv: nn.Module) -> nn.Module:
    """A BasicBlock whose second convolution is this one."""
    block = torchvision_resnet.BasicBlock(8, 8)
    block.conv2 = conv
    return block


class InPlaceBlock(nn.Module):
    """A pre-activation block that writes into its input, and into a half of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout2d(0.0, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.conv(self.act(x))) + x


class TiedBlock(nn.Module):
    """One convolution twice, under two names, and buffers of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.second = self.first
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.first(x)).sigmoid()
        return self.norm2(self.second(y))[:, self.order] + x


def drop_path(rate: float) -> nn.Module:
    return timm_resnet.BasicBlock(8, 8, drop_path=DropPath(rate))


BLOCKS = {
    "squeeze and excitation": lambda: timm_resnet.BasicBlock(8, 8, attn_layer="se"),
    "ECA, stride 2": lambda: timm_resnet.Bottleneck(
        8, 3, 2, timm_resnet.downsample_conv(8, 12, 1, stride=2), attn_layer="eca"
    ),
    "Res2Net": lambda: timm_res2net.Bottle2neck(8, 2, base_width=128, scale=4, norm_layer=nn.BatchNorm2d),
    "ResNeSt": lambda: timm_resnest.ResNestBottleneck(8, 2, radix=2),
    "selective kernel, 32 channels": lambda: timm_sknet.SelectiveKernelBasic(32, 32),
    "GroupNorm": lambda: torchvision_resnet.BasicBlock(8, 8, norm_layer=lambda c: nn.GroupNorm(2, c)),
    "pre-activation": lambda: PreActBottleneck(8, norm_layer=BatchNormAct2d),
    "ConvNeXt": lambda: ConvNeXtBlock(8, ls_init_value=0.5),
    "torchvision's ConvNeXt": lambda: torchvision_convnext.CNBlock(8, 0.5, 0.0),
    "another activation": lambda: timm_resnet.BasicBlock(8, 8, act_layer=nn.SiLU),
    "anti-aliasing": lambda: timm_resnet.BasicBlock(
        8, 8, 2, timm_resnet.downsample_conv(8, 8, 1, 2), aa_layer=BlurPool2d
    ),
    "standardised convolution": lambda: with_conv(StdConv2d(8, 8, 3, padding=1)),
    "in place": InPlaceBlock,
    "tied weights": TiedBlock,
    "drop path": lambda: drop_path(0.0),  # 0.5 where the draw is what a test is about
}


def channels_of(name: str) -> int:
    """C of a block of ``BLOCKS``."""
    return 32 if "32 channels" in name else 8


@torch.no_grad()
def scrambled(module: nn.Module) -> nn.Module:
    """The module with own numbers for every parameter and statistic, as after training."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and "filt" not in name:
            value.add_(torch.randn_like(value), alpha=0.2)
    return module
