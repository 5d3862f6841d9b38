"""Between the convolutions of routed residual blocks, over the compiled extension (CPU, float32); see
csrc/expert_block."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.layout import channels_last_empty, expert_of_row

__all__ = ["column_sums", "head_backward", "head_forward", "norm_backward", "scale_shift", "why_not", "why_not_case"]

why_not = native.why_not_cpu


def why_not_case(*operands: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``."""
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in operands} - {"float32"}
    return f"the native block computes float32, not {', '.join(sorted(kinds))}" if kinds else None


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.dim() == 4 or tensor.is_contiguous()  # maps are channels-last, tables plain
    return tensor.data_ptr()


def _rows(z: Tensor, offsets: Tensor) -> tuple[int, int, int, int, int]:
    return offsets.data_ptr(), offsets.numel() - 1, z.shape[2] * z.shape[3], z.shape[1], native.threads()


def column_sums(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    sums = torch.empty(offsets.numel() - 1, value.shape[1], dtype=torch.float64)
    products = torch.empty_like(sums)
    tensors = (value, other, scale, shift, sums, products)
    native.extension().column_sums_cpu(*_rows(value, offsets), *map(_address, tensors))
    return sums, products


def scale_shift(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    out = channels_last_empty(z, tuple(z.shape))
    native.extension().scale_shift_cpu(*_rows(z, offsets), *map(_address, (z, scale, shift)), relu, out.data_ptr())
    return out


def norm_backward(
    d: Tensor,
    z: Tensor,
    offsets: Tensor,
    p: Tensor,
    q: Tensor | None,
    r: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    out = channels_last_empty(z, tuple(z.shape))
    native.extension().norm_backward_cpu(*_rows(z, offsets), *map(_address, (d, z, p, q, r, scale, shift, out)))
    return out


def head_forward(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> Tensor:  # fmt: skip
    batch, top_k = weights.shape
    out = channels_last_empty(z, (batch, *z.shape[1:]))
    expert = expert_of_row(offsets, z.shape[0])
    tensors = (z, scale, shift, x, skip_scale, skip_shift, order, expert, inverse, weights, out, None, None, None)
    sizes = (batch, top_k, z.shape[2] * z.shape[3], z.shape[1], native.threads())
    native.extension().head_forward_cpu(*map(_address, tensors), *sizes)
    return out


def head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, top_k = weights.shape
    d_rows, d_weights = channels_last_empty(z, tuple(z.shape)), torch.empty_like(weights)
    expert = expert_of_row(offsets, z.shape[0])
    inputs = (z, scale, shift, x, skip_scale, skip_shift, order, expert, inverse, weights)
    sizes = (batch, top_k, z.shape[2] * z.shape[3], z.shape[1], native.threads())
    native.extension().head_backward_cpu(*map(_address, (*inputs, None, d_out, d_rows, d_weights)), *sizes)
    return d_rows, d_weights
