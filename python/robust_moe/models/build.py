"""From a configuration to a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from robust_moe_kernels.modules import replace_blocks

from ..settings import choose
from .config import MixtureConfig, ModelConfig
from .dual import DualModel
from .mixture import ExpertMixture
from .resnet import BasicBlock, Bottleneck, ResNet
from .routers import ROUTERS

__all__ = ["MODELS", "build_model"]

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
    """The model that ``config`` describes: float [B, channels, image_size, image_size] in [0, 1] -> logits.

    Weights come from PyTorch's global generator. ``mean`` and ``std`` (a number a channel) are those of the images
    (:func:`robust_moe.data.channel_statistics`); None: 0 and 1, no normalisation. Layers named in ``config.moe.layers``
    become mixtures of experts; ``config.mixture`` makes the network the expert of an :class:`ExpertMixture`;
    ``config.dual`` puts a standard model beside the one described, in a :class:`DualModel`. Filters and the maps
    between layers are in channels-last format. Files named by ``init_from`` are not read here
    (:func:`robust_moe.engine.experiment.make_model` does). Raises ValueError for an unknown name or numbers that do
    not fit.
    """
    for name, count in (("num_classes", num_classes), ("channels", channels)):
        if count < 1:
            raise ValueError(f"{name}: expected a count >= 1, got {count}")
    mean = (0.0,) * channels if mean is None else mean
    std = (1.0,) * channels if std is None else std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, a channel each, got {len(values)}")
    images = {"num_classes": num_classes, "image_size": image_size, "mean": mean, "std": std}
    model = _single(config, "model", **images)
    if config.dual.enabled:
        standard = _single(_standard(config), "model.dual.standard", **images)
        model = DualModel(standard, model, config.dual.alpha, config.dual.mix)
    # On one core of a Zen 5 a pass of an attack on ResNet-18 takes 404 ms so, 504 ms in PyTorch's default format.
    return model.to(memory_format=torch.channels_last)


def _standard(config: ModelConfig) -> ModelConfig:
    """F_S of a dual model, described as a model of its own."""
    own = config.dual.standard
    moe, mixture = (config.moe, config.mixture) if own.experts else (replace(config.moe, layers=[]), MixtureConfig())
    width, blocks = (config.width, config.blocks) if own.name is None else (None, None)
    return replace(
        config,
        name=own.name or config.name,
        width=own.width or width,
        blocks=own.blocks or blocks,
        moe=moe,
        mixture=mixture,
    )


def _single(
    config: ModelConfig, key: str, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> nn.Module:
    """A network, or a mixture of some."""
    mixture = config.mixture
    if mixture.num_experts == 0:
        return _network(config, key, num_classes, image_size, mean, std)
    router = choose(ROUTERS, mixture.router, "model.mixture.router")
    if config.moe.layers:
        raise ValueError(
            f"model.moe.layers: expected none, as model.mixture.num_experts > 0, got {list(config.moe.layers)}"
        )
    networks = [
        _network(config, key, num_classes, image_size, mean, std, expert=True) for _ in range(mixture.num_experts)
    ]
    return ExpertMixture(
        router(len(mean), image_size, mixture.num_experts, mean, std),
        networks,
        in_channels=len(mean),
        routing=mixture.routing,
        top_k=mixture.top_k,
        renormalize=mixture.renormalize,
        straight_through=mixture.straight_through,
        mix=mixture.mix,
        noise_std=mixture.noise_std,
    )


def _network(
    config: ModelConfig,
    key: str,
    num_classes: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    expert: bool = False,
) -> nn.Module:
    """One ResNet, with its routed layers. An expert's last maps have more than a pixel: it may be sent one image, and
    a batch norm cannot train on a single value."""
    make = choose(MODELS, config.name, f"{key}.name")
    blocks = tuple(make.keywords["blocks"] if config.blocks is None else config.blocks)
    least = 2 ** (len(blocks) - 1) + expert
    if image_size < least:
        why = ", the last one's not to a single pixel in a mixture of networks" if expert else ""
        raise ValueError(
            f"image_size: expected >= {least} pixels for {len(blocks)} stages, each but the first halving it{why}, "
            f"got {image_size}"
        )
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
    return model
