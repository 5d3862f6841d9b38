"""Models whose weights lie in parts in several processes: PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from robust_moe_kernels.modules.walk import modules_of

__all__ = ["is_in_parts", "sharded_parts", "whole_weights"]

_held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many hold each part whole


def is_in_parts(tensor: Any) -> bool:
    """Whether each process has a part of the tensor."""
    distributed = sys.modules.get("torch.distributed.tensor")  # where it is not imported there is no such tensor
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def sharded_parts(modules: Iterable[nn.Module]) -> list[Any]:
    """Those of the modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it is not imported nobody has called it
    return [] if fsdp is None else [module for module in modules if isinstance(module, fsdp.FSDPModule)]


@contextmanager
def whole_weights(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Inside, every process has all weights of a model that ``fully_shard`` has spread; nothing for any other model.

    They are gathered once, on entry, and let go on exit, instead of around every forward and backward of a part.
    Forwards in evaluation mode and their gradients to the inputs then ask nothing of the other processes, and each may
    make as many as it likes. All processes have to enter and to leave; may be nested, and entered in
    ``inference_mode``. For attacks and evaluations: what is computed inside leaves no gradient of the weights behind.

    Afterwards the parts are let go, also where they were whole before, and from then on after each forward and
    backward, also where ``fully_shard`` was told ``reshard_after_forward=False``.

    Args:
        model: any module.
        modules: all of ``model``, where the caller has listed them already; None: they are listed here.

    Raises:
        ValueError: ``model`` is inside of the module that ``fully_shard`` was called on, or is made of its children:
            parameters of others than these stay in parts.
    """
    parts = sharded_parts(modules_of(model) if modules is None else modules)
    begun = []
    try:
        for part in parts:
            begun.append(part)
            _held[part] = _held.get(part, 0) + 1
            if _held[part] == 1:
                with torch.inference_mode(False):  # or what is gathered could not be learned from afterwards
                    part.unshard()
                _reshards(part, False)
        if parts:
            _expect_whole(model)
        yield
    finally:
        for part in begun:
            _held[part] -= 1
            if _held[part] == 0:
                _reshards(part, True)
                with torch.inference_mode(False):
                    part.reshard()


def _expect_whole(model: nn.Module) -> None:
    names = [name for name, parameter in model.named_parameters() if is_in_parts(parameter)]
    if names:
        raise ValueError(
            f"model: expected the module that fully_shard was called on, so that all its weights can be gathered, got "
            f"one with {len(names)} parameters of another part ({names[0]})"
        )


def _reshards(part: Any, after_passes: bool) -> None:
    part.set_reshard_after_forward(after_passes, recurse=False)
    part.set_reshard_after_backward(after_passes, recurse=False)
