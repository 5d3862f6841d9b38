"""Between the convolutions of routed residual blocks, over the compiled extension (CPU, float32); see
csrc/expert_block."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.layout import channels_last_empty, expert_of_row

__all__ = [
    "column_sums", "head_backward", "head_forward", "head_norm_backward", "norm_backward", "norm_finalise",
    "norm_finalise_backward", "scale_shift", "sum_rows", "why_not", "why_not_case",
]  # fmt: skip

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
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, shares: int
) -> Tensor:
    out = torch.empty(2, shares, offsets.numel() - 1, value.shape[1], dtype=torch.float64)
    out[:, 1:] = 0.0  # all of it is in the first share: a task sums its columns from the first pixel to the last
    native.extension().column_sums_cpu(
        *_rows(value, offsets), *map(_address, (value, other, scale, shift)), out[0].data_ptr(), out[1].data_ptr()
    )
    return out


def norm_finalise(
    shares: Tensor,
    offsets: Tensor,
    pixels: int,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor,
    eps: float,
    momentum: float,
) -> tuple[Tensor, ...]:
    outputs = (*(torch.empty_like(weight) for _ in range(6)), torch.empty_like(tracked))
    inputs = map(_address, (weight, bias, running_mean, running_var, tracked))
    sums = (shares.data_ptr(), shares.shape[1], offsets.data_ptr(), *shares.shape[2:], pixels)
    native.extension().norm_finalise_cpu(*sums, *inputs, eps, momentum, *map(_address, outputs))
    return outputs


def norm_finalise_backward(
    shares: Tensor, offsets: Tensor, pixels: int, scale: Tensor, mean: Tensor, rstd: Tensor, training: bool
) -> list[Tensor]:
    outputs = [torch.empty_like(scale) for _ in range(4 if training else 2)]
    sums = (shares.data_ptr(), shares.shape[1], offsets.data_ptr(), *shares.shape[2:], pixels)
    addresses = [*map(_address, outputs), 0, 0][:4]
    native.extension().norm_finalise_backward_cpu(*sums, *map(_address, (scale, mean, rstd)), *addresses)
    return outputs


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


def head_norm_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    head = (z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights)
    d_rows, d_weights = head_backward(d_out, *head)
    d_z = norm_backward(d_rows, z, offsets, scale, None, None, None, None)
    if skip_scale is not None:
        d_rows = norm_backward(d_rows, z, offsets, skip_scale, None, None, None, None)
    return d_z, d_rows, d_weights


def sum_rows(rows: Tensor, other: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    batch = inverse.numel() // top_k
    out = channels_last_empty(rows, (batch, *rows.shape[1:]))
    sizes = (batch, top_k, rows.shape[1:].numel(), native.threads())
    native.extension().sum_rows_cpu(*map(_address, (rows, other, inverse, out)), *sizes)
    return out
