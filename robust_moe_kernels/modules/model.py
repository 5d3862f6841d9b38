"""Mixture-of-experts layers inside a model: swap them in, find them, sum their losses, check them."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.balance import BALANCE_LOSSES
from robust_moe_kernels.modules.linking import link_layers
from robust_moe_kernels.modules.mlp_layer import FusedMLPMoE
from robust_moe_kernels.modules.moe_layer import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules.momentum import Momentum
from robust_moe_kernels.modules.ranks import rank_count
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.routing_record import RoutingRecord
from robust_moe_kernels.modules.token_gates import AdaptiveClusteringGate

__all__ = ["balance_loss", "check_finite", "moe_layers", "replace_blocks", "replace_mlps"]


def replace_blocks(model: nn.Module, names: str | Iterable[str], **options: Any) -> nn.Module:
    """Swap blocks or convolutions of a model, in place, for mixtures of experts.

    Args:
        model: any module.
        names: one or more submodule names, such as "layer4.1" (a block) or "layer4.1.conv2" (a convolution).
        options: those of :meth:`FusedBlockMoE.from_block`; a ``gate`` module is the first layer's, the others get
            copies of it.

    Returns:
        The same model.

    Raises:
        ValueError: a name that is no submodule (the nearest is offered) or lies inside another one named, or a module
            that cannot be replaced; the model is unchanged then.
    """

    each = _with_own_gates(options)

    def layer_of(module: nn.Module) -> MoELayer:
        if isinstance(module, nn.Conv2d):
            return FusedConvMoE.from_conv(module, **next(each))
        return FusedBlockMoE.from_block(module, **next(each))

    return _replace(model, names, layer_of)


def replace_mlps(
    model: nn.Module, names: str | Iterable[str], *, momentum: Momentum | None = None, **options: Any
) -> nn.Module:
    """Swap MLPs of a transformer, in place, for mixtures of experts, each token to experts of its own. They are linked
    with ``momentum``, or gates "adaptive_clustering" (:func:`~robust_moe_kernels.modules.link_layers`).

    Args:
        model: any module, such as a ViT, DeiT or Swin of timm or torchvision.
        names: one or more submodule names, such as "blocks.9.mlp" (timm's ViT), "layers.2.blocks.1.mlp" (its Swin),
            "encoder.layers.encoder_layer_9.mlp" (torchvision's ViT) or "features.5.1.mlp" (its Swin).
        momentum: over the outputs of these layers, in the model's order; None: none.
        options: those of :meth:`FusedMLPMoE.from_mlp`; a ``gate`` module as there.

    Returns:
        The same model.

    Raises:
        ValueError: as :func:`replace_blocks`, and layers that cannot be linked; the model is unchanged then.
    """

    def link(layers: list[MoELayer]) -> None:
        if momentum is not None or any(isinstance(layer.gate, AdaptiveClusteringGate) for layer in layers):
            link_layers(layers, momentum)

    each = _with_own_gates(options)
    return _replace(model, names, lambda module: FusedMLPMoE.from_mlp(module, **next(each)), link)


def _with_own_gates(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options of one layer after another: each with a gate of its own"""
    yield options
    while True:
        gate = options.get("gate")
        yield options | {"gate": copy.deepcopy(gate)} if isinstance(gate, nn.Module) else options


def _replace(
    model: nn.Module,
    names: str | Iterable[str],
    layer_of: Callable[[nn.Module], MoELayer],
    link: Callable[[list[MoELayer]], None] = lambda layers: None,
) -> nn.Module:
    """Swap the submodules of these names for what ``layer_of`` makes of each; all of them or none. ``link`` gets the
    layers in the model's order."""
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        inner = next((other for other in names if other.startswith(f"{name}.")), None)
        if inner is not None:
            raise ValueError(f"names: expected modules apart from each other, got {inner!r} inside {name!r}")
    known = dict(model.named_modules())
    layers: dict[str, MoELayer] = {}
    for name in names:
        if not name or name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"names: expected the name of a submodule, got {name!r}{hint}")
        layers[name] = layer_of(known[name])
    link([layers[name] for name in known if name in layers])
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return model


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Every mixture-of-experts layer of a model by its name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def _records(model: nn.Module) -> dict[str, RoutingRecord]:
    """The last routing of every layer. Raises RuntimeError where there was no forward."""
    records = {}
    for name, layer in moe_layers(model).items():
        if layer.routing is None:
            raise RuntimeError(f"model: expected a forward through {name or 'the layer'!r} first, got none")
        records[name] = layer.routing
    return records


def balance_loss(model: nn.Module, kind: str | Callable[[RoutingRecord], Tensor] = "entropy") -> Tensor:
    """Sum of a balance loss over all mixture-of-experts layers, from their last forward.

    Args:
        model: after a forward.
        kind: a key of ``BALANCE_LOSSES``: entropy, kl, switch, entropy_released, importance, load, z or vmoe; or a
            function of one layer's record.

    Of layers whose batch lies on several ranks (``batch_over_ranks``) the record, and so the loss, is that of the whole
    batch, the same on every rank: in training mode, and in eval mode where gradients are recorded, as the loss is
    trained on then.

    Returns:
        A scalar on the graph of that forward; 0 for a model without such layers.

    Raises:
        ValueError: an unknown kind. RuntimeError: a layer that no forward has reached; with gradients enabled, a layer
            in training whose last forward was under ``no_grad``: the loss would train nothing.
    """
    if not (callable(kind) or kind in BALANCE_LOSSES):
        near = difflib.get_close_matches(str(kind), BALANCE_LOSSES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kind: expected one of {', '.join(BALANCE_LOSSES)}, got {kind!r}{hint}")
    loss = kind if callable(kind) else BALANCE_LOSSES[kind]
    records = _records(model)
    if torch.is_grad_enabled():
        for name, layer in moe_layers(model).items():
            _expect_graph(name, layer, records[name])
    several = rank_count() > 1
    layers = moe_layers(model).values()
    of_all = [several and layer.over_ranks and (layer.training or torch.is_grad_enabled()) for layer in layers]
    rows = [r.of_all_ranks() if wide else r for r, wide in zip(records.values(), of_all, strict=True)]
    losses = [loss(record) for record in rows]
    return sum(losses[1:], losses[0]) if losses else torch.zeros(())


def _expect_graph(name: str, layer: MoELayer, record: RoutingRecord) -> None:
    """Raise RuntimeError where the loss would have no gradient although the gate is trained."""
    trained = layer.training and layer.fixed_expert is None and any(p.requires_grad for p in layer.gate.parameters())
    if trained and not record.logits.requires_grad:
        raise RuntimeError(
            f"model: expected a forward with gradients through {name or 'the layer'!r}, whose gate is trained; the last"
            " one was under no_grad, as torch.utils.checkpoint makes it with use_reentrant=True (use False, or add the"
            " balance loss inside of the checkpointed function); to read the value alone, call this under no_grad"
        )


def check_finite(model: nn.Module) -> None:
    """Raise if a gate's scores were NaN or infinite in the last forward, or a reroute named an expert out of range.
    Waits for the device once; call it where the host reads a result anyway.

    Raises:
        FloatingPointError: names the layers and how many rows. ValueError: names the layers and how many experts.
            RuntimeError: a layer that no forward has reached.
    """
    records = _records(model)
    if not records:
        return
    flags = {name: record.nonfinite for name, record in records.items()}
    rerouted = {name: record.invalid for name, record in records.items() if record.invalid is not None}
    counts = torch.stack([*flags.values(), *rerouted.values()]).tolist()
    broken = [f"{name} ({count} rows)" for name, count in zip(flags, counts, strict=False) if count]
    if broken:
        raise FloatingPointError(f"gate scores: expected finite numbers, got NaN or infinity in {', '.join(broken)}")
    invalid = [f"{name} ({count})" for name, count in zip(rerouted, counts[len(flags) :], strict=True) if count]
    if invalid:
        raise ValueError(f"reroute: expected experts of the layer, got others in {', '.join(invalid)}")
