"""Models whose weights lie in parts in several processes: PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from robust_moe_kernels.modules.walk import modules_of

__all__ = ["sharded_parts", "whole_weights"]

_held: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many hold each part whole


def sharded_parts(modules: Iterable[nn.Module]) -> list[Any]:
    """Those that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported for this: it takes half a second
    return [] if fsdp is None else [module for module in modules if isinstance(module, fsdp.FSDPModule)]


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of a model that ``fully_shard`` has spread; nothing for any other model.

    They are gathered once, on entry, and let go on exit, instead of around every forward and backward of a part.
    Forwards and gradients to the inputs then ask nothing of the other processes, and each may make as many as it likes.
    All processes have to enter and to leave; may be nested. For attacks and evaluations: what is computed inside leaves
    no gradient of the weights behind.

    Afterwards every part is let go after its forward and its backward, also one that was made with
    ``reshard_after_forward=False``.
    """
    parts = sharded_parts(modules_of(model))
    begun = []
    try:
        for part in parts:
            begun.append(part)
            _held[part] = _held.get(part, 0) + 1
            if _held[part] == 1:
                part.unshard()
                _reshards(part, False)
        yield
    finally:
        for part in begun:
            _held[part] -= 1
            if _held[part] == 0:
                _reshards(part, True)
                part.reshard()


def _reshards(part: Any, after_passes: bool) -> None:
    part.set_reshard_after_forward(after_passes, recurse=False)
    part.set_reshard_after_backward(after_passes, recurse=False)
