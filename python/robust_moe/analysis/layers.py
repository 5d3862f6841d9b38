"""What each layer is, as a map that bounds can be propagated through; all in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double()


def _linear(layer: nn.Linear, shape: torch.Size):
    weight = _double(layer.weight)
    return lambda x, absolute: F.linear(x, weight.abs() if absolute else weight), _double(layer.bias)


def _conv(layer: nn.Conv2d, shape: torch.Size):
    _dims(shape, 3)
    expect(layer.padding_mode == "zeros", "padding_mode", "'zeros'", repr(layer.padding_mode))
    weight, bias = _double(layer.weight), _double(layer.bias)
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    bias = None if bias is None else bias[:, None, None]
    return lambda x, absolute: F.conv2d(x, weight.abs() if absolute else weight, None, *settings), bias


def _norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, shape: torch.Size):
    """Channels are the first dimension after the batch, whatever follows."""
    _dims(shape, *((3,) if isinstance(layer, nn.BatchNorm2d) else (1, 2)))
    expect(shape[0] == layer.num_features, "batch norm", f"{layer.num_features} channels", shape[0])
    expect(layer.running_mean is not None, "batch norm", "running statistics", "none (track_running_stats=False)")
    scale = (_double(layer.running_var) + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * _double(layer.weight)
    lost = layer.weight is not None and bool(((scale.abs() < _SMALLEST) & (layer.weight != 0)).any())
    expect(not lost, "batch norm", f"factors of 0 or above {_SMALLEST:g}", "one that underflows")
    moved = -_double(layer.running_mean) * scale
    beta = torch.zeros_like(moved) if layer.bias is None else _double(layer.bias)
    return _scaled(scale, moved + beta, moved.abs() + beta.abs(), (-1, *[1] * (len(shape) - 1)))


def _normalize(layer: Normalize, shape: torch.Size):
    _dims(shape, 3)
    scale = 1 / _double(layer.std)
    shift = -_double(layer.mean) * scale
    return _scaled(scale, shift, shift.abs(), scale.shape)


def _scaled(scale: Tensor, shift: Tensor, shift_size: Tensor, shape: tuple[int, ...]):
    scale, shift, shift_size = scale.reshape(shape), shift.reshape(shape), (shift_size + UNDERFLOW).reshape(shape)
    return lambda x, absolute: x * (scale.abs() if absolute else scale), shift, shift_size


def _average(layer: nn.AvgPool2d, shape: torch.Size):
    divisor = layer.divisor_override
    expect(divisor is None or divisor > 0, "divisor_override", "None or a count > 0", divisor)
    return _pool(layer, shape)


def _pool(layer: nn.Module, shape: torch.Size):
    _dims(shape, 3)
    return (lambda x, absolute: layer(x),)


def _flatten(layer: nn.Flatten, shape: torch.Size):
    expect(layer.start_dim % (len(shape) + 1) != 0, "start_dim", "not the batch", layer.start_dim)
    return lambda x, absolute: layer(x), None, None, True


def _gap_fc(layer: GapFcGate, shape: torch.Size):
    _dims(shape, 3)
    linear, bias = _linear(layer.fc, shape)
    return lambda x, absolute: linear(x.mean((2, 3)), absolute), bias


def _conv_gap(layer: ConvGapGate, shape: torch.Size):
    linear, bias = _conv(layer.conv, shape)
    return lambda x, absolute: linear(x, absolute).mean((2, 3)), None if bias is None else bias.flatten()


# What each layer becomes on an input [B, *shape]: (linear map[, constant[, its size[, exact]]]); "relu" or "relu_" (in
# place); None for nothing at all.
LAYERS: dict[type[nn.Module], Callable[[Any, torch.Size], Any]] = {
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
