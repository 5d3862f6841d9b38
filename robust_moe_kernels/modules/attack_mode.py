"""The state of a model while it is attacked: frozen, its batch norms folded, and afterwards as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from robust_moe_kernels import native
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.chain import Place
from robust_moe_kernels.modules.experts import Experts
from robust_moe_kernels.modules.norm_folding import backbone_folded
from robust_moe_kernels.modules.residual import ResidualExperts
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.sharded import whole_weights
from robust_moe_kernels.modules.shared_launches import shared_launches
from robust_moe_kernels.modules.token_gates import AdaptiveClusteringGate
from robust_moe_kernels.modules.walk import modules_of, parameters_of

__all__ = ["MODES", "attack_mode"]

MODES = ("eval", "train")


@contextmanager
def attack_mode(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Freeze ``model`` and set its mode for the span of an attack, then put back all of it exactly as found.

    Frozen parameters make autograd skip every weight gradient: a PGD step then costs one forward and one backward to
    the input, and keeps for it only what the input's gradient needs. In ``"eval"`` mode the batch norms of every
    ``FusedBlockMoE`` on the grouped engine are folded into a scale and a shift [E, C] once, on entry, and not in each
    forward; the results are the same bit for bit. A norm whose parameters or running statistics are replaced or changed
    inside (but through ``.data``, which nothing can see) goes unfolded from then on; so do all in compiled graphs.
    Under autocast the frozen filters of all experts on the grouped engine are cast once, and again where they were
    replaced or changed in that sense.

    In any model, ordinary convolutions run with the batch norms that follow them folded too, but in small forwards on a
    CPU (:mod:`~robust_moe_kernels.modules.norm_folding`). That equals the unfolded model up to rounding: a gradient
    next to zero may have another sign. It is the same in every forward of a size, but for those without gradients that
    come before the model's first with gradients, from which it is learned.

    With a model on the CPU the process keeps freed memory from then on (:func:`~.native.keep_freed_memory`, which says
    how to prevent that): an attack allocates the same large maps again and again.

    Weights that FSDP2 has spread over processes are whole inside (:func:`~.sharded.whole_weights`).

    Flags are restored one submodule and one parameter at a time, so a partly frozen model or a batch norm held in eval
    mode comes back as it was; so does each MoE layer's ``routing``, the record of the caller's last forward, and what
    linked layers have left for the next. The running spreads of :class:`AdaptiveClusteringGate` never move. May be
    nested, but not entered by two threads at once on one model, whose flags these are. Gradients are enabled inside,
    also under ``no_grad`` or ``inference_mode``.

    Args:
        model: any module, with or without MoE layers, compiled or not.
        mode: ``"eval"``, or ``"train"``: batch statistics (which move the running ones), nothing folded.

    Raises:
        ValueError: another mode.
    """
    expect(mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
    modules = modules_of(model)  # once: the walk takes time in every attack
    with whole_weights(model, modules), _attacked(model, modules, mode):
        yield


@contextmanager
def _attacked(model: nn.Module, modules: list[nn.Module], mode: str) -> Iterator[None]:
    parameters = parameters_of(modules)
    if any(parameter.device.type == "cpu" for parameter in parameters):
        native.keep_freed_memory()
    blocks = [module for module in modules if isinstance(module, ResidualExperts)]
    before: list[_Setting] = [
        (setattr, layer, "routing", layer.routing) for layer in modules if isinstance(layer, MoELayer)
    ]
    chains = {id(place.chain): place.chain for place in _places(modules)}.values()
    before += [(setattr, chain, "handed", chain.handed) for chain in chains]
    gates = [module for module in modules if isinstance(module, AdaptiveClusteringGate)]
    before += [(setattr, gate, "learns", gate.learns) for gate in gates]
    experts = [module for module in modules if isinstance(module, Experts)]
    before += [(setattr, each, "held", each.held) for each in experts]
    before += [(setattr, block, "folded", block.folded) for block in blocks]
    before += [(setattr, module, "training", module.training) for module in modules]
    before += [(parameter.requires_grad_, parameter.requires_grad) for parameter in parameters]
    try:
        model.train(mode == "train")
        for parameter in parameters:
            parameter.requires_grad_(False)
        for gate in gates:
            gate.learns = False
        with torch.inference_mode(False), torch.enable_grad():
            for each in experts:
                each.held = []
            for block in blocks:
                block.folded = block.fold() if mode == "eval" else None
            shared = shared_launches(model) if _shares(mode, parameters) else nullcontext()
            with shared, backbone_folded(model) if mode == "eval" else nullcontext():
                yield
    finally:
        _put_back(before)


def _places(modules: Iterable[nn.Module]) -> list[Place]:
    """The places of linked layers in their chains."""
    every = [(layer.output_place, layer.choice_place) for layer in modules if isinstance(layer, MoELayer)]
    return [place for pair in every for place in pair if place is not None]


_Setting = tuple[Any, ...]  # a function and its arguments


def _put_back(settings: list[_Setting]) -> None:
    """Call each, the last first, and only then raise: what one module refuses does not keep the others from theirs."""
    error = None
    for function, *arguments in reversed(settings):
        try:
            function(*arguments)
        except Exception as raised:
            error = raised
    if error is not None:
        raise error


def _shares(mode: str, parameters: list[nn.Parameter]) -> bool:
    """Whether layers do things together. Not in evaluation on a CPU without autocast: there is nothing to do, and every
    question to a tensor would pass through one more function mode, some thousands in a forward."""
    kinds = {parameter.device.type for parameter in parameters}
    return mode == "train" or kinds != {"cpu"} or torch.is_autocast_enabled("cpu")
