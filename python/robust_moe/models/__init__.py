"""Residual networks for small images, with experts in the places that a configuration names.

A model is one line in :data:`MODELS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from robust_moe_kernels.modules import replace_blocks

from .normalize import Normalize
from .resnet import BasicBlock, Bottleneck, ResNet

if TYPE_CHECKING:
    from ..config import ModelConfig

__all__ = ["MODELS", "BasicBlock", "Bottleneck", "Normalize", "ResNet", "build_model"]

MODELS: dict[str, Callable[..., ResNet]] = {
    # default depth and width; each takes blocks=, width=, num_classes=, mean=, std=
    "resnet18": partial(ResNet, BasicBlock, blocks=(2, 2, 2, 2), width=64),
    "resnet50": partial(ResNet, Bottleneck, blocks=(3, 4, 6, 3), width=64),
    # 0.60 M parameters; one block a stage but the last, which has the two that "layer4.1" needs
    "resnet_small": partial(ResNet, BasicBlock, blocks=(1, 1, 1, 2), width=16),
}


def build_model(
    config: ModelConfig,
    num_classes: int,
    channels: int,
    image_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network that ``config`` describes: float [B, channels, image_size, image_size] in [0, 1] -> logits.

    Weights come from PyTorch's global generator. ``mean`` and ``std`` (a number a channel) are those of the images
    (:func:`robust_moe.data.channel_statistics`); None: 0 and 1, no normalisation. Layers named in ``config.moe.layers``
    become mixtures of experts. Filters and the maps between layers are in channels-last format. Raises ValueError for
    an unknown name or numbers that do not fit.
    """
    if config.name not in MODELS:
        near = difflib.get_close_matches(config.name, MODELS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model.name: expected one of {', '.join(MODELS)}, got {config.name!r}{hint}")
    for name, count in (("num_classes", num_classes), ("channels", channels)):
        if count < 1:
            raise ValueError(f"{name}: expected a count >= 1, got {count}")
    make = MODELS[config.name]
    blocks = tuple(make.keywords["blocks"] if config.blocks is None else config.blocks)
    if image_size < 2 ** (len(blocks) - 1):
        raise ValueError(
            f"image_size: expected >= {2 ** (len(blocks) - 1)} pixels for {len(blocks)} stages, each but the first "
            f"halving it, got {image_size}"
        )
    mean = (0.0,) * channels if mean is None else mean
    std = (1.0,) * channels if std is None else std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, a channel each, got {len(values)}")
    given = {} if config.width is None else {"width": config.width}
    model = make(**given, blocks=blocks, num_classes=num_classes, mean=mean, std=std)
    moe = config.moe
    if moe.layers:
        replace_blocks(
            model,
            list(moe.layers),
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            gate=moe.gate,
            renormalize=moe.renormalize,
            straight_through=moe.straight_through,
            noise_std=moe.noise_std,
            init=moe.init,
        )
    # On one core of a Zen 5 a pass of an attack on ResNet-18 takes 404 ms so, 504 ms in PyTorch's default format.
    return model.to(memory_format=torch.channels_last)
