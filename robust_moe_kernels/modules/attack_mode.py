"""The state of a model while it is attacked: frozen, its batch norms folded, and afterwards as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.model import moe_layers
from robust_moe_kernels.modules.residual import ResidualExperts

__all__ = ["MODES", "attack_mode"]

MODES = ("eval", "train")


@contextmanager
def attack_mode(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Freeze ``model`` and set its mode for the span of an attack, then put back all of it exactly as found.

    Frozen parameters make autograd skip every weight gradient: a PGD step then costs one forward and one backward to
    the input, and keeps for it only what the input's gradient needs. In ``"eval"`` mode the batch norms of every
    ``FusedBlockMoE`` on the grouped engine are folded into a scale and a shift [E, C] once, on entry, and not in each
    forward; the results are the same bit for bit. So parameters and running statistics are not to be changed inside;
    entering again folds their new values.

    Flags are restored one submodule and one parameter at a time, so a partly frozen model or a batch norm held in eval
    mode comes back as it was; so does each MoE layer's ``routing``, the record of the caller's last forward. May be
    nested. Gradients are enabled inside, also under ``no_grad`` or ``inference_mode``.

    Args:
        model: any module, with or without MoE layers, compiled or not.
        mode: ``"eval"``, or ``"train"``: batch statistics (which move the running ones), nothing folded.

    Raises:
        ValueError: another mode.
    """
    expect(mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    routings = [(layer, layer.routing) for layer in moe_layers(model).values()]
    blocks = [(block, block.folded) for block in model.modules() if isinstance(block, ResidualExperts)]
    try:
        model.train(mode == "train")
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            for block, _ in blocks:
                block.folded = block.fold() if mode == "eval" else None
            yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
        for layer, routing in routings:
            layer.routing = routing
        for block, folded in blocks:
            block.folded = folded
