"""Two names for one tensor, so that the gradients of its two readers arrive apart and are added by its own backward.

Autograd adds up what the readers of a tensor send before its node sees it: a launch, and a pass over the map, for every
residual block. A node that returns its output twice gets both gradients, and its kernel adds them.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.ops.expert_block import relu_backward

__all__ = ["Twins", "is_batched", "through_relu", "version"]


class Twins:
    """Outputs that have a twin, which one reader is to get. All others read the tensor itself; so the readers need not
    be known, nor how many there are."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Tensor], Tensor, int]] = {}  # by the tensor; its twin and version

    def put(self, tensor: Tensor, twin: Tensor) -> None:
        """``twin`` is an output of the same node as ``tensor`` and shares its memory and its version counter."""
        key = id(tensor)
        self._of[key] = (weakref.ref(tensor, lambda _: self._of.pop(key, None)), twin, version(tensor))

    def reader(self, tensor: Tensor) -> Tensor:
        """What another reader of ``tensor`` should read, who changes nothing in place: the twin, once, unless the
        tensor has changed."""
        ref, twin, made = self._of.get(id(tensor), (None, tensor, 0))
        if ref is None or ref() is not tensor:
            return tensor
        del self._of[id(tensor)]
        return twin if version(tensor) == made else tensor

    def clear(self) -> None:
        """Forget all, and keep no graph alive."""
        self._of.clear()


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


def through_relu(d: Tensor, d_twin: Tensor | None, out: Tensor) -> Tensor:
    """The gradient before a ReLU that gave ``out``, from what its readers send; differentiable where that is asked."""
    plain = torch.is_grad_enabled() or is_batched(d) or (d_twin is not None and is_batched(d_twin))
    if not plain:
        return relu_backward(d, d_twin, out, AUTO)
    return torch.ops.aten.threshold_backward(d if d_twin is None else d + d_twin, out, 0)


def is_batched(d: Tensor) -> bool:
    """Many gradients at once, as of ``is_grads_batched``: the package's operations take one."""
    return torch._C._functorch.is_batchedtensor(d) or torch._C._functorch.is_legacy_batchedtensor(d)
