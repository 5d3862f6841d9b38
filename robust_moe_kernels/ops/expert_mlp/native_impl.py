"""The routed MLP over the compiled extension (CPU; float32, bfloat16, float16): see csrc/expert_mlp.

16-bit operands are converted to float32, which holds all of their numbers, and results rounded once: a little slower
than float32, with copies twice their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.ops.expert_mlp.activation import FUNCTIONS, Activation

__all__ = ["backward", "forward", "why_not", "why_not_case"]

_KINDS = (torch.float32, torch.bfloat16, torch.float16)

why_not = native.why_not_cpu


def why_not_case(*operands: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``."""
    if operands[0].dtype in _KINDS:
        return None
    known = ", ".join(str(kind).removeprefix("torch.") for kind in _KINDS)
    return f"the native MLP computes {known}, not {operands[0].dtype}"


def _run(
    kernel: str, tensors: dict[str, Tensor | None], x: Tensor, weight2: Tensor, z: Tensor, weights: Tensor,
    activation: Activation,
) -> None:  # fmt: skip
    names = (
        "x", "weight1", "bias1", "weight2", "bias2", "weights", "order", "inverse", "offsets", "y", "z", "d_y", "d_x",
        "d_weight1", "d_bias1", "d_weight2", "d_bias2", "d_weights",
    )  # fmt: skip
    sizes = (*weights.shape, z.shape[0], weight2.shape[0], x.shape[1], weight2.shape[2], weight2.shape[1])
    addresses = (native.address(tensors.get(name)) for name in names)
    function = FUNCTIONS.index(activation.function)
    getattr(native.extension(), kernel)(*addresses, *sizes, function, activation.gated, native.threads())


def _widened(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, rows: int, activation: Activation,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dtype != torch.float32:
        wide = _widened(x, weight1, bias1, weight2, bias2)
        y, z = forward(*wide, weights, order, inverse, offsets, rows, activation)
        return y.to(x.dtype), z.to(x.dtype)
    y, z = x.new_empty(x.shape[0], weight2.shape[1]), x.new_empty(rows, weight1.shape[1])
    tensors = {
        "x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "weights": weights,
        "order": order, "inverse": inverse, "offsets": offsets, "y": y, "z": z,
    }  # fmt: skip
    _run("expert_mlp_forward_cpu", tensors, x, weight2, z, weights, activation)
    return y, z


def backward(
    d_y: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, activation: Activation, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    if x.dtype != torch.float32:
        wide = _widened(d_y, x, z, weight1, weight2, bias2)
        *found, d_weights = backward(*wide, weights, order, inverse, offsets, activation, needs)
        return *(None if gradient is None else gradient.to(x.dtype) for gradient in found), d_weights
    likes = (x, weight1, weight1[:, :, 0], weight2, weight2[:, :, 0], weights)
    found = [like.new_empty(like.shape) if wanted else None for like, wanted in zip(likes, needs, strict=True)]
    names = ("d_x", "d_weight1", "d_bias1", "d_weight2", "d_bias2", "d_weights")
    tensors = {
        "x": x, "weight1": weight1, "weight2": weight2, "bias2": bias2, "weights": weights, "order": order,
        "inverse": inverse, "offsets": offsets, "z": z, "d_y": d_y, **dict(zip(names, found, strict=True)),
    }  # fmt: skip
    _run("expert_mlp_backward_cpu", tensors, x, weight2, z, weights, activation)
    return tuple(found)
