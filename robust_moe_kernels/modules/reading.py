"""The parameters that the engine has read from the experts, kept between forwards until an expert changes.

Reading 16 experts anew takes Python as long as the engine takes for a small layer; asking whether anything has changed
takes a fraction of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.interception import has_hooks

__all__ = ["POOLING", "Reading", "own_computation"]

T = TypeVar("T")

# What computes otherwise, or from other numbers, than class and parameters say.
_OWN = frozenset(("forward", "_conv_forward", "weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
POOLING = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_SETTINGS = {  # attributes that a reading depends on
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "momentum", "track_running_stats"),
    nn.AvgPool2d: POOLING,
    nn.GELU: ("approximate",),
    nn.Module: ("gate_last",),  # of timm's GluMlp
}


def own_computation(module: nn.Module) -> str | None:
    """The attribute by which this very module computes otherwise than its class does from its parameters; None: none.
    A bias that a layer has not is such an attribute too, and says nothing."""
    if _OWN.isdisjoint(module.__dict__):
        return None
    return next((name for name in _OWN if module.__dict__.get(name) is not None), None)


class Reading(Generic[T]):
    """``content``, which was made of the experts ``members``: each one's modules, itself first."""

    def __init__(self, container: nn.Module, members: Sequence[Sequence[nn.Module]], content: T) -> None:
        self.content = content
        self._container, self._count = container._modules, len(container._modules)
        self._modules: list[tuple[dict[str, Any], str, Any]] = [
            (container._modules, name, module) for name, module in container._modules.items()
        ]
        self._parts: list[tuple[nn.Module, type[nn.Module], dict[str, Any], dict[str, Any], int]] = []
        self._settings: list[tuple[dict[str, Any], tuple[str, ...], list[Any]]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor | None, Any]] = []
        self.keeps = True  # whether it can be asked later: tensors without numbers have no place
        for module in (part for modules in members for part in modules):
            tables = (module._parameters, module._buffers)
            self._parts.append((module, type(module), *tables, len(module._modules)))
            self._modules += [(module._modules, name, child) for name, child in module._modules.items()]
            for kind, names in _SETTINGS.items():
                if isinstance(module, kind) and names[0] in module.__dict__:
                    self._settings.append((module.__dict__, names, [module.__dict__[name] for name in names]))
            for table in tables:
                for name, tensor in table.items():
                    plain = tensor is None or (type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta)
                    self.keeps &= plain
                    place = _place(tensor) if tensor is not None and plain else None
                    self._tensors.append((table, name, tensor, place))

    def holds(self) -> bool:
        """Whether modules, their classes, hooks and settings, and the tensors and where they lie, are as they were."""
        if len(self._container) != self._count:
            return False
        for table, name, child in self._modules:
            if table.get(name) is not child:
                return False
        for module, kind, parameters, buffers, children in self._parts:
            if type(module) is not kind or len(module._modules) != children:
                return False
            if module._parameters is not parameters or module._buffers is not buffers:
                return False
            if has_hooks(module) or own_computation(module) is not None:
                return False
        for attributes, names, values in self._settings:
            if [attributes[name] for name in names] != values:
                return False
        with torch._C.DisableTorchFunction():
            for table, name, tensor, place in self._tensors:
                if table.get(name) is not tensor or (tensor is not None and _place(tensor) != place):
                    return False
        return True


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
