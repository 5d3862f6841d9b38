"""From a configuration to a model."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from robust_moe.models.config import ModelConfig, MoEConfig, NetworkConfig
from robust_moe.models.dual import DualModel
from robust_moe.models.images import ImageSpec
from robust_moe.models.mixture import ExpertMixture
from robust_moe.models.normalize import Normalize
from robust_moe_kernels.modules import Momentum, moe_layers, replace_blocks, replace_mlps

__all__ = ["Start", "build_model"]

Start = Callable[[str, nn.Module], None]


def build_model(
    config: ModelConfig,
    num_classes: int,
    channels: int,
    image_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    start: Start | None = None,
) -> nn.Module:
    """The model that ``config`` describes: float [B, channels, image_size, image_size] in [0, 1] -> logits.

    Weights come from PyTorch's global generator. ``mean`` and ``std`` (one number per channel) are those of the images
    (:func:`robust_moe.data.channel_statistics`); None: 0 and 1, no normalisation. Layers named in ``config.moe.layers``
    become mixtures of experts; ``config.mixture`` makes the network the expert of an :class:`ExpertMixture`;
    ``config.dual`` puts a standard model beside the one described, in a :class:`DualModel`. Filters and the maps
    between layers are in channels-last format. Files named by ``init_from`` are not read here
    (:func:`robust_moe.engine.experiment.make_model` does).

    ``start`` is called with each network while it is dense, and may load weights into it: what becomes a copy of a
    block, or of the network, is a copy of those. Its first argument is the place of the network's settings below
    ``model``: "", or "dual.standard.".

    Raises ValueError for numbers or layers that do not fit.
    """
    mean = (0.0,) * channels if mean is None else tuple(mean)
    std = (1.0,) * channels if std is None else tuple(std)
    images = ImageSpec(num_classes, channels, image_size, mean, std)
    parts = {key: _single(half, images, start and partial(start, key)) for key, half in config.halves()}
    model = parts[""]
    if config.dual.enabled:
        model = DualModel(parts["dual.standard."], model, config.dual.alpha, config.dual.mix)
    # On one core of a Zen 5 a pass of an attack on ResNet-18 takes 404 ms so, 504 ms in PyTorch's default format.
    return model.to(memory_format=torch.channels_last)


def _single(config: NetworkConfig, images: ImageSpec, start: Callable[[nn.Module], None] | None) -> nn.Module:
    """A network, or a mixture of some."""
    mixture = config.mixture
    if mixture.num_experts == 0:
        return _network(config, images, False, start)
    first = _network(config, images, True, start)
    rest = range(mixture.num_experts - 1)
    if mixture.init == "copy":
        networks = [first, *(copy.deepcopy(first) for _ in rest)]
    else:
        networks = [first, *(_network(config, images, True, start) for _ in rest)]
    model = ExpertMixture(
        mixture.router.build(images, mixture.num_experts),
        networks,
        in_channels=images.channels,
        routing=mixture.routing,
        top_k=mixture.top_k,
        renormalize=mixture.renormalize,
        straight_through=mixture.straight_through,
        mix=mixture.mix,
        noise_std=mixture.noise_std,
    )
    model.inference = mixture.inference.build()
    return model


def _network(
    config: NetworkConfig, images: ImageSpec, alone: bool, start: Callable[[nn.Module], None] | None
) -> nn.Module:
    """One network, with its routed layers and its normalisation; alone: see :meth:`NetworkConfig.check_images`."""
    config.check_images(images, alone)
    network = config.build(images)
    whole = network
    if not config.normalizes:
        whole = nn.Sequential(OrderedDict(normalize=Normalize(images.mean, images.std), network=network))
    if start is not None:
        start(whole)
    if config.moe.layers:
        _route(network, config.moe)
    return whole


def _route(network: nn.Module, moe: MoEConfig) -> None:
    """Replace the layers that are named by mixtures of experts, in place."""
    replace: Callable[..., nn.Module] = replace_blocks
    if moe.gate.tokens:
        momentum = None if moe.momentum is None else Momentum(moe.momentum, moe.momentum_gamma)
        replace = partial(replace_mlps, momentum=momentum)
    try:
        replace(
            network,
            moe.layers,
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            gate=moe.gate.build,
            renormalize=moe.renormalize,
            straight_through=moe.straight_through,
            noise_std=moe.noise_std,
            init=moe.init,
        )
    except ValueError as error:
        raise ValueError(f"model.moe.layers: {error}{_other_gate(network, moe)}") from error
    for layer in moe_layers(network).values():
        layer.route_options = dataclasses.replace(
            layer.route_options,
            noise=moe.noise,
            inference=moe.inference.build(),
            capacity=moe.capacity,
            priority=moe.priority,
            choice=moe.choice,
        )


def _other_gate(network: nn.Module, moe: MoEConfig) -> str:
    """What to say of the gate where the layers are for one of the other kind: convolutions have maps, MLPs tokens."""
    known = dict(network.named_modules())
    named = [known[name] for name in moe.layers if name in known]
    maps = any(isinstance(part, nn.Conv2d) for module in named for part in module.modules())
    if not named or maps != moe.gate.tokens:
        return ""
    kinds = ("tokens, and replaces MLPs", "gap_fc") if maps else ("maps, and replaces blocks or convolutions", "linear")
    return f"; model.moe.gate={moe.gate.name} routes {kinds[0]}: another one, such as {kinds[1]}, replaces these"
