"""What the engine has read of experts, kept from forward to forward for as long as it is still what they are.

Reading 16 experts anew takes Python as long as the engine takes for a small layer; asking whether anything has changed
takes a fraction of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.interception import has_hooks

__all__ = ["Reading"]

T = TypeVar("T")

_SETTINGS = {  # attributes that a reading depends on
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "momentum", "track_running_stats"),
}


class Reading(Generic[T]):
    """``content``, which was made of the experts ``members``: each one's modules, itself first."""

    def __init__(self, container: nn.Module, members: Sequence[Sequence[nn.Module]], content: T) -> None:
        self.content = content
        self._modules: list[tuple[dict[str, Any], str, Any]] = [
            (container._modules, name, module) for name, module in container._modules.items()
        ]
        self._parts: list[tuple[nn.Module, type[nn.Module], int]] = []
        self._settings: list[tuple[dict[str, Any], tuple[str, ...], list[Any]]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor | None, int]] = []
        self.keeps = True  # whether it can be asked later: tensors without numbers have no place
        for module in (part for modules in members for part in modules):
            self._parts.append((module, type(module), len(module._modules)))
            self._modules += [(module._modules, name, child) for name, child in module._modules.items()]
            for kind, names in _SETTINGS.items():
                if isinstance(module, kind):
                    self._settings.append((module.__dict__, names, [module.__dict__[name] for name in names]))
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    plain = tensor is None or (type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta)
                    self.keeps &= plain
                    place = tensor.data_ptr() if tensor is not None and plain else 0
                    self._tensors.append((table, name, tensor, place))

    def holds(self) -> bool:
        """Whether modules, their classes, hooks and settings, and the tensors and where they lie, are as they were."""
        for table, name, child in self._modules:
            if table.get(name) is not child:
                return False
        for module, kind, children in self._parts:
            if type(module) is not kind or len(module._modules) != children:
                return False
            if has_hooks(module) or "forward" in module.__dict__ or "weight" in module.__dict__:
                return False
        for attributes, names, values in self._settings:
            if [attributes[name] for name in names] != values:
                return False
        with torch._C.DisableTorchFunction():
            for table, name, tensor, place in self._tensors:
                if table.get(name) is not tensor or (tensor is not None and tensor.data_ptr() != place):
                    return False
        return True
