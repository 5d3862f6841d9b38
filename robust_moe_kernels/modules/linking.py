"""Linking the routed layers of a network, so that one gets what another has made of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.chain import Chain, Place
from robust_moe_kernels.modules.momentum import Momentum
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.token_gates import AdaptiveClusteringGate

__all__ = ["link_layers"]


def link_layers(layers: Iterable[MoELayer], momentum: Momentum | None = None) -> None:
    """Link layers in the order in which every forward runs through them, each once.

    With ``momentum`` they get it as their option, and outputs go from each to the next. Where gates are
    :class:`AdaptiveClusteringGate`, first choices go from each layer to the next, whatever the gates of the others;
    the first layer has none before it and routes plainly. :func:`~robust_moe_kernels.modules.replace_mlps` links what
    it makes.

    A forward that leaves out a layer, or runs through one alone, is refused. One that stops between two layers leaves
    what it has to whoever calls the next layer, once: go on with the same images then.

    Args:
        layers: at least two, of tokens; all on the same tokens, so link a Swin's stages apart.
        momentum: of all of them; None: none.

    Raises:
        ValueError: layers that cannot be linked, which are unchanged then; nothing to link them by.
    """
    linked = list(layers)
    expect(len(linked) >= 2, "layers", "at least two, one to hand on to the next", len(linked))
    expect(_differ(linked), "layers", "different ones", "one twice")
    gates = [layer.gate for layer in linked if isinstance(layer.gate, AdaptiveClusteringGate)]
    expect(_differ(gates), "gate", "a gate of its own for each layer", "one of several")
    clustering = len(gates) > 0
    expect(clustering or momentum is not None, "layers", "momentum or gates adaptive_clustering to link by", "neither")
    for layer in linked:
        expect(layer.linkable, "layers", "layers of tokens, as FusedMLPMoE", type(layer).__name__)
    if momentum is not None:
        widths = {layer.experts.in_channels for layer in linked}
        expect(len(widths) == 1, "momentum", "layers of one width", sorted(widths))
        places = Chain(len(linked))
        for index, layer in enumerate(linked):
            layer.output_place = Place(places, index)
            layer.momentum = momentum
    if clustering:
        places = Chain(len(linked))
        for index, layer in enumerate(linked):
            layer.choice_place = Place(places, index)
            if isinstance(layer.gate, AdaptiveClusteringGate):
                layer.gate.follow(None if index == 0 else linked[index - 1].num_experts)


def _differ(modules: list[Any]) -> bool:
    return len({id(module) for module in modules}) == len(modules)
