"""Fewer experts after training: a model without some of them, for compression or to be rid of a backdoor."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

from torch import nn

from robust_moe_kernels.checks import expect
from robust_moe_kernels.layout import dense_format
from robust_moe_kernels.modules.model import moe_layers
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.token_gates import AdaptiveClusteringGate

__all__ = ["prune_experts"]

M = TypeVar("M", bound=nn.Module)


def prune_experts(model: M, keep: Mapping[str, Sequence[int]] | Sequence[int]) -> M:
    """A copy of the model whose mixture-of-experts layers have the experts ``keep`` alone.

    Expert ``keep[i]`` becomes expert i. The last layer of the gate loses the outputs of the others, and a ``top_k``
    larger than the number of experts left is lowered to it. An image whose experts all stay keeps its route; with
    ``renormalize``, or ``straight_through`` and k = 1, its weights are the same up to rounding. With neither they grow:
    they are scores of a softmax over the experts left. The state dict has the names of the model's, with the smaller
    dimensions: where all layers keep the same number, that of a model built with so many experts. A linked gate forgets
    the clusters of experts that the layer before has lost.

    A gate's last layer is found as follows: of an ``nn.Sequential`` it is in the last module, of a module with an
    attribute ``last_layer`` in the submodule of that name, and so on to an ``nn.Linear``, or an ``nn.Conv2d`` without
    groups, whose outputs must be the logits of the experts in order, pooled or not.

    Args:
        model: any module with mixture-of-experts layers; not changed. Imposed routes are not copied.
        keep: experts that stay, at least one, different, in ascending order (ties of a gate go to the lowest index);
            for every layer, or by the names of those layers that are pruned.

    Raises:
        ValueError: a model without such layers; a name that is none of theirs; experts that are not those of the layer;
            a layer with a ``fixed_expert``; a gate or experts that cannot be pruned.
    """
    layers = moe_layers(model)
    expect(len(layers) > 0, "model", "at least one mixture-of-experts layer", "none")
    chosen = keep if isinstance(keep, Mapping) else dict.fromkeys(layers, keep)
    for name, experts in chosen.items():
        expect(name in layers, "keep", f"names of layers ({', '.join(map(repr, layers))})", repr(name))
        count = layers[name].num_experts
        expected = f"ascending experts in 0..{count - 1}, at least one"
        expect(_are_experts(experts, count), f"keep of layer {name!r}", expected, experts)
        fixed = layers[name].fixed_expert
        expect(fixed is None, f"model layer {name!r}", "its gate to decide", f"the fixed expert {fixed}")
    pruned = copy.deepcopy(model)
    for name, layer in moe_layers(pruned).items():
        if name in chosen:
            _prune(name, layer, chosen[name])
            if (follower := _follower(pruned, layer)) is not None:
                follower.keep_clusters(list(chosen[name]))
    return pruned


def _follower(model: nn.Module, layer: MoELayer) -> AdaptiveClusteringGate | None:
    """The gate, if there is one, whose clusters are the first choices of ``layer``."""
    place = layer.choice_place
    for other in moe_layers(model).values():
        after = other.choice_place
        if place is None or after is None or after.chain is not place.chain:
            continue
        if after.index == place.index + 1 and isinstance(other.gate, AdaptiveClusteringGate):
            return other.gate
    return None


def _are_experts(experts: Any, count: int) -> bool:
    """Whether this is a sequence of different integers in 0..count-1, ascending. PyTorch takes a list of booleans for a
    mask, and refuses numbers such as 1.0."""
    if isinstance(experts, Mapping) or not (hasattr(experts, "__len__") and hasattr(experts, "__iter__")):
        return False
    found = list(experts)
    whole = all(isinstance(each, Integral) and not isinstance(each, bool) for each in found)
    return len(found) > 0 and whole and found == sorted(set(found)) and set(found) <= set(range(count))


def _prune(name: str, layer: MoELayer, experts: Sequence[int]) -> None:
    known = hasattr(layer.experts, "keep")
    expect(known, f"experts of layer {name!r}", "a method keep(experts)", type(layer.experts).__name__)
    gate, last = f"gate of layer {name!r}", _last_layer(layer.gate)
    if last is None:
        found = type(layer.gate).__name__
        raise ValueError(f"{gate}: expected nn.Linear or nn.Conv2d as its last layer (see last_layer), got {found}")
    outputs = last.out_features if isinstance(last, nn.Linear) else last.out_channels
    expect(outputs == layer.num_experts, gate, f"a last layer of {layer.num_experts} outputs, one per expert", outputs)
    _keep_rows(last, experts)
    if isinstance(last, nn.Linear):
        last.out_features = len(experts)
    else:
        last.out_channels = len(experts)
    layer.top_k = min(layer.top_k, len(experts))  # while the layer still has more experts
    layer.experts.keep(experts)


def _keep_rows(module: nn.Module, rows: Sequence[int]) -> None:
    """Replace each parameter of the module by its entries ``rows`` along the first dimension, in the same memory
    format."""
    for name, value in module.named_parameters(recurse=False):
        kept = value.detach()[list(rows)].contiguous(memory_format=dense_format(value))
        setattr(module, name, nn.Parameter(kept, value.requires_grad))


def _last_layer(module: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """The linear layer or convolution whose outputs are the module's; None: not known, or its weight is computed."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        plain = type(module) in (nn.Linear, nn.Conv2d) and "weight" in module._parameters
        return module if plain and getattr(module, "groups", 1) == 1 else None
    if type(module) is nn.Sequential and len(module) > 0:
        return _last_layer(module[-1])
    name = getattr(module, "last_layer", None)
    return _last_layer(module.get_submodule(name)) if isinstance(name, str) else None
