"""A model's modules and tensors, without their names: a step of training asks for them some thirty times, and
``nn.Module.modules()`` takes a millisecond of a slow host's time for a ResNet-18 (each name is passed up through every
level of the tree). Measured beside an H100: of a step's 29.6 ms at 256 images these lists, and what was made of them,
took more than half."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

__all__ = ["modules_of", "parameters_of", "tensors_of"]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """What ``model.modules()`` gives, in its order."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found.values())


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What ``model.parameters()`` gives, of a model with these modules, in its order."""
    every = (parameter for module in modules for parameter in module._parameters.values())
    return list({id(parameter): parameter for parameter in every if parameter is not None}.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters of a model with these modules, and its buffers."""
    modules = list(modules)
    every = (buffer for module in modules for buffer in module._buffers.values())
    buffers = {id(buffer): buffer for buffer in every if buffer is not None}
    return [*parameters_of(modules), *buffers.values()]
