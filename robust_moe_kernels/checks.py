"""Argument checks shared by the ops: one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "expect",
    "expect_dtype",
    "expect_flag",
    "expect_images",
    "expect_nonnegative",
    "expect_same_device",
    "expect_shape",
    "expect_tensor",
]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_IMAGES = (torch.float32, torch.float64)  # bf16 near 1 has a spacing of 1/256 and would lose a 2/255 step


def expect(ok: bool, argument: str, expected: str, got: Any) -> None:
    """Raise ``ValueError`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def expect_tensor(value: Any, argument: str) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(value).__name__}")


def expect_dtype(tensor: Tensor, argument: str, dtypes: Iterable[torch.dtype]) -> None:
    """Raise ``TypeError`` unless the tensor has one of ``dtypes``."""
    allowed = tuple(dtypes)
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{argument}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def expect_shape(tensor: Tensor, argument: str, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ``ValueError`` unless the tensor's shape is ``shape``; ``meaning`` names its dimensions."""
    expect(tensor.shape == torch.Size(shape), argument, f"shape {list(shape)} ({meaning})", list(tensor.shape))


def expect_same_device(tensor: Tensor, argument: str, other: Tensor, other_argument: str) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    ok = tensor.device == other.device
    expect(ok, argument, f"a tensor on {other.device} (the device of {other_argument})", tensor.device)


def expect_flag(value: Any, argument: str, other: Tensor, other_argument: str) -> None:
    """Raise unless ``value`` is ``None`` or a bool scalar on the device of ``other``."""
    if value is not None:
        expect_tensor(value, argument)
        expect_dtype(value, argument, (torch.bool,))
        expect_shape(value, argument, (), "a scalar")
        expect_same_device(value, argument, other, other_argument)


def expect_images(value: Any, argument: str) -> None:
    """Raise unless ``value`` is a batch of images as attacks work on: [B, ...], float32 or float64."""
    expect_tensor(value, argument)
    expect_dtype(value, argument, _IMAGES)
    expect(value.dim() >= 2, argument, "at least 2 dimensions [B, ...]", f"shape {list(value.shape)}")


def expect_nonnegative(value: float, argument: str) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and >= 0."""
    expect(math.isfinite(value) and value >= 0, argument, "a finite number >= 0", value)
