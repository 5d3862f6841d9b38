"""Who else sees, or changes, what a model computes: compilers, hooks, function transforms."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from robust_moe_kernels.modules.walk import modules_of

__all__ = [
    "Snapshot",
    "has_ended",
    "has_hooks",
    "is_batched",
    "is_compiled",
    "is_hooked",
    "tracing",
    "transformed",
    "transforming",
    "version",
]


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of the model is compiled or scripted."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported for this: it takes a second
    kinds = (torch.jit.ScriptModule, *(() if dynamo is None else (dynamo.OptimizedModule,)))
    return any(
        isinstance(module, kinds) or getattr(module, "_compiled_call_impl", None) is not None
        for module in modules_of(model)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody looks at what passes through this very module: any hook, but for those that have an attribute
    ``blind``, which only note that a module was called."""
    found = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(found) and any(not getattr(hook, "blind", False) for hooks in found for hook in hooks.values())


def is_hooked(model: nn.Module) -> bool:
    """Whether anybody looks at what passes between the modules inside of the model."""
    if nn.modules.module._has_any_global_hook():
        return True
    return any(has_hooks(module) for module in modules_of(model) if module is not model)


def transformed() -> bool:
    """Whether somebody else intercepts operations too: function transforms, forward gradients, saved tensors' hooks,
    tracing."""
    return (
        transforming() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch.jit.is_tracing()
    )


def transforming() -> str | None:
    """What asks for more than a value or a gradient of the operations that run now, in words."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms the forward"
    return (
        "the forward has a tangent (forward-mode derivatives)"
        if torch.autograd.forward_ad._current_level >= 0
        else None
    )


def tracing() -> str | None:
    """What writes down the operations that run now, to run them on other numbers later, in words; not torch.compile,
    which knows the fused operations."""
    if torch.jit.is_tracing():
        return "torch.jit traces the forward"
    return "torch.export traces the forward" if torch.compiler.is_exporting() else None


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


class Snapshot:
    """What a tensor was, to be asked later whether it still is: changed in place it counts, and given other memory
    (``tensor.data = ...``, which does not count) it lies elsewhere. The memory is kept alive until then, or what was
    given to the tensor could come to lie where it did. A change in place through ``.data`` is not seen.

    ``counted``: its changes are counted, and its memory is somebody else's to compare and keep.
    """

    __slots__ = ("_address", "_memory", "_version")

    def __init__(self, tensor: Tensor, counted: bool = False) -> None:
        self._version = version(tensor)
        placed = not counted and not isinstance(tensor, FakeTensor)  # which lies nowhere
        self._address = tensor.data_ptr() if placed else None
        self._memory = tensor.untyped_storage() if placed else None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether ``tensor``, the same as then, is unchanged."""
        return version(tensor) == self._version and (self._address is None or tensor.data_ptr() == self._address)


def is_batched(d: Tensor) -> bool:
    """Many gradients at once, as of ``is_grads_batched``: the package's operations take one."""
    return torch._C._functorch.is_batchedtensor(d) or torch._C._functorch.is_legacy_batchedtensor(d)


def has_ended(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a ``torch.vmap`` that has returned, so that no operation takes it any more."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while (inner := functorch.unwrap_if_dead(tensor)) is not tensor:  # one derivative that has returned, then the next
        tensor = inner
    return functorch.is_batchedtensor(tensor) and functorch.maybe_get_level(tensor) > (
        functorch.maybe_current_level() or 0
    )
