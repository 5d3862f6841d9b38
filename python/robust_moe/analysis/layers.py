"""What each layer is, as a map that bounds can be propagated through; all in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from robust_moe.analysis.rounding import UNDERFLOW
from robust_moe.models.normalize import Normalize
from robust_moe.models.resnet import GlobalAveragePool
from robust_moe.models.routers import Router
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.gates import ConvGapGate, GapFcGate

__all__ = ["CHAINS", "LAYERS", "Linear", "expect_plain"]

Linear = Callable[[Tensor, bool], Tensor]  # (x [N, ...], absolute: with the entries' magnitudes) -> A x, no constant

_SMALLEST = 1e-290  # factor, short of none at all
_HOOKS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


def expect_plain(module: nn.Module, name: str) -> None:
    """A module does what its class says: no hooks of its own (pruning, weight and spectral norms are such, and leave
    parameters in ``module.weight`` that the next forward replaces) nor for all modules, no forward of its own."""
    found = [hook for hook in _HOOKS if getattr(module, f"_{hook}")]
    found += [f"{hook} of all modules" for hook in _HOOKS if getattr(torch_module, f"_global_{hook}", None)]
    found += ["a forward of its own"] if "forward" in vars(module) else []
    wanted = "a module without hooks (torch.nn.utils.remove_weight_norm and the like bake them in)"
    expect(not found, name, wanted, f"{type(module).__name__} with {', '.join(found)}")


def _dims(shape: torch.Size, *allowed: int) -> None:
    """Layers take some inputs without a batch, or with their channels elsewhere."""
    wanted = " or ".join(f"{count + 1} dimensions" for count in allowed)
    expect(len(shape) in allowed, "input", wanted, f"[B, {', '.join(map(str, shape))}]")


def _double(value: Tensor) -> Tensor:
    return value.detach().double()


class Map(NamedTuple):
    """A x + b."""

    linear: Linear
    constant: Tensor | None = None  # b, broadcast to the output
    size: Tensor | None = None  # what b was computed from, in magnitude; None: b itself
    exact: bool = False  # moves numbers and computes none


def _linear(layer: nn.Linear, shape: torch.Size) -> Map:
    weight = _double(layer.weight)
    bias = None if layer.bias is None else _double(layer.bias)
    return Map(lambda x, absolute: F.linear(x, weight.abs() if absolute else weight), bias)


def _conv(layer: nn.Conv2d, shape: torch.Size) -> Map:
    _dims(shape, 3)
    expect(layer.padding_mode == "zeros", "padding_mode", "'zeros'", repr(layer.padding_mode))
    weight = _double(layer.weight)
    bias = None if layer.bias is None else _double(layer.bias)[:, None, None]
    settings: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return Map(lambda x, absolute: F.conv2d(x, weight.abs() if absolute else weight, None, *settings), bias)


def _norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, shape: torch.Size) -> Map:
    """Channels are the first dimension after the batch, whatever follows."""
    _dims(shape, *((3,) if isinstance(layer, nn.BatchNorm2d) else (1, 2)))
    expect(shape[0] == layer.num_features, "batch norm", f"{layer.num_features} channels", shape[0])
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        raise ValueError("batch norm: expected running statistics, got none (track_running_stats=False)")
    scale = (_double(variance) + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * _double(layer.weight)
    lost = layer.weight is not None and bool(((scale.abs() < _SMALLEST) & (layer.weight != 0)).any())
    expect(not lost, "batch norm", f"factors of 0 or above {_SMALLEST:g}", "one that underflows")
    moved = -_double(mean) * scale
    beta = torch.zeros_like(moved) if layer.bias is None else _double(layer.bias)
    return _scaled(scale, moved + beta, moved.abs() + beta.abs(), (-1, *[1] * (len(shape) - 1)))


def _normalize(layer: Normalize, shape: torch.Size) -> Map:
    _dims(shape, 3)
    scale = 1 / _double(layer.std)
    shift = -_double(layer.mean) * scale
    return _scaled(scale, shift, shift.abs(), scale.shape)


def _scaled(scale: Tensor, shift: Tensor, shift_size: Tensor, shape: tuple[int, ...]) -> Map:
    scale, shift, shift_size = scale.reshape(shape), shift.reshape(shape), (shift_size + UNDERFLOW).reshape(shape)
    return Map(lambda x, absolute: x * (scale.abs() if absolute else scale), shift, shift_size)


def _average(layer: nn.AvgPool2d, shape: torch.Size) -> Map:
    divisor = layer.divisor_override
    expect(divisor is None or divisor > 0, "divisor_override", "None or a count > 0", divisor)
    return _pool(layer, shape)


def _pool(layer: nn.Module, shape: torch.Size) -> Map:
    _dims(shape, 3)
    return Map(lambda x, absolute: layer(x))


def _flatten(layer: nn.Flatten, shape: torch.Size) -> Map:
    expect(layer.start_dim % (len(shape) + 1) != 0, "start_dim", "not the batch", layer.start_dim)
    return Map(lambda x, absolute: layer(x), exact=True)


def _gap_fc(layer: GapFcGate, shape: torch.Size) -> Map:
    _dims(shape, 3)
    fc = _linear(layer.fc, shape)
    return fc._replace(linear=lambda x, absolute: fc.linear(x.mean((2, 3)), absolute))


def _conv_gap(layer: ConvGapGate, shape: torch.Size) -> Map:
    conv = _conv(layer.conv, shape)
    bias = None if conv.constant is None else conv.constant.flatten()
    return Map(lambda x, absolute: conv.linear(x, absolute).mean((2, 3)), bias)


# What each layer becomes on an input [B, *shape]: a map; "relu" or "relu_" (in place); None for nothing at all.
LAYERS: dict[type[nn.Module], Callable[[Any, torch.Size], Map | str | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.ReLU: lambda layer, shape: "relu_" if layer.inplace else "relu",
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.AvgPool2d: _average,
    nn.AdaptiveAvgPool2d: _pool,
    GlobalAveragePool: _pool,
    nn.Flatten: _flatten,
    nn.Identity: lambda layer, shape: None,
    nn.Dropout: lambda layer, shape: None,
    Normalize: _normalize,
    GapFcGate: _gap_fc,
    ConvGapGate: _conv_gap,
}

# Modules that apply children in turn, by their names, and whose forward torch.fx cannot trace or need not. A child that
# appears twice is applied twice.
CHAINS: dict[type[nn.Module], Callable[[nn.Module], Sequence[str]]] = {
    nn.Sequential: lambda module: list(module._modules),
    Router: lambda module: ("normalize", "body"),
}
