"""Between the convolutions of routed residual blocks, over the compiled extension; see csrc/expert_block.

Maps are of any one floating dtype, tables of float32, or of float64 for float64 maps; each element is rounded once to
the maps' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.layout import channels_last_empty

__all__ = [
    "column_sums", "head_backward", "head_forward", "head_norm_backward", "norm_backward", "norm_finalise",
    "norm_finalise_backward", "scale_shift", "sum_rows", "why_not", "why_not_case",
]  # fmt: skip

why_not = native.why_not_cuda


def why_not_case(*operands: Tensor) -> str | None:
    """Reason why these operands cannot be computed here, or ``None``."""
    kinds = {tensor.dtype for tensor in operands}
    maps = {tensor.dtype for tensor in operands if tensor.dim() == 4}
    if len(kinds) == 1 or (len(maps) < 2 and torch.float32 not in maps and torch.float64 not in kinds):
        return None
    named = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}))
    return f"the native block computes maps of one dtype, with tables of float32 or float64, not {named} together"


def _accumulator(kind: torch.dtype) -> torch.dtype:
    return torch.float64 if kind == torch.float64 else torch.float32


def _table(like: Tensor, table: Tensor) -> Tensor:
    """A table as the kernels of ``like``'s device read it: in the type of its arithmetic, without gaps."""
    return table.to(_accumulator(like.dtype)).contiguous()


def _tables(like: Tensor, *tables: Tensor | None) -> list[Tensor | None]:
    return [None if table is None else _table(like, table) for table in tables]


def _run(kernel: str, maps: Tensor, offsets: Tensor, *arguments: object) -> None:
    """A kernel whose first arguments are the rows' maps: those of ``maps``."""
    rows, channels, height, width = maps.shape
    sizes = (offsets.numel() - 1, rows, height * width, channels, native.dtype_code(maps))
    native.run(kernel, maps, offsets.data_ptr(), *sizes, *arguments)


def column_sums(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, shares: int
) -> Tensor:
    out = value.new_empty(2, shares, offsets.numel() - 1, value.shape[1], dtype=torch.float64)
    tables = _tables(value, scale, shift)
    addresses = map(native.address, (value, other, *tables, out[0], out[1]))
    _run("column_sums", value, offsets, *addresses, shares)
    return out


def _finalise(kernel: str, shares: Tensor, offsets: Tensor, pixels: int, *arguments: object, kind: Tensor) -> None:
    sums = (shares.data_ptr(), shares.shape[1], offsets.data_ptr(), *shares.shape[2:], pixels)
    native.run(kernel, shares, *sums, *arguments, native.dtype_code(kind))


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
    kinds = running_mean.dtype, running_var.dtype
    parameters = [_table(weight, table) for table in (weight, bias, running_mean, running_var)]
    first = parameters[0]
    outputs = [torch.empty_like(first) for _ in range(6)]
    counted = torch.empty_like(tracked)
    inputs = map(native.address, (*parameters, tracked))
    addresses = map(native.address, (*outputs, counted))
    _finalise("norm_finalise", shares, offsets, pixels, *inputs, eps, momentum, *addresses, kind=first)
    return (*outputs[:4], outputs[4].to(kinds[0]), outputs[5].to(kinds[1]), counted)


def norm_finalise_backward(
    shares: Tensor, offsets: Tensor, pixels: int, scale: Tensor, mean: Tensor, rstd: Tensor, training: bool
) -> list[Tensor]:
    outputs = [torch.empty_like(scale) for _ in range(4 if training else 2)]
    addresses = [*map(native.address, outputs), 0, 0][:4]
    tables = map(native.address, (scale, mean, rstd))
    _finalise("norm_finalise_backward", shares, offsets, pixels, *tables, *addresses, kind=scale)
    return outputs


def scale_shift(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    out = channels_last_empty(z, tuple(z.shape))
    tables = _tables(z, scale, shift)
    _run("scale_shift", z, offsets, *map(native.address, (z, *tables)), relu, out.data_ptr())
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
    tables = _tables(z, p, q, r, scale, shift)
    _run("norm_backward", z, offsets, *map(native.address, (d, z, *tables, out)))
    return out


def _head(
    kernel: str, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
    out: Tensor | None = None, d_out: Tensor | None = None, d_rows: Tensor | None = None,
    d_weights: Tensor | None = None, d_z: Tensor | None = None,
) -> None:  # fmt: skip
    batch, top_k = weights.shape
    scale, shift, weights = (_table(z, table) for table in (scale, shift, weights))
    skip_scale, skip_shift = _tables(z, skip_scale, skip_shift)
    inputs = (z, scale, shift, x, skip_scale, skip_shift, order, inverse, weights)
    addresses = map(native.address, (*inputs, out, d_out, d_rows, d_weights, d_z))
    _run(kernel, z, offsets, *addresses, batch, top_k)


def head_forward(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> Tensor:  # fmt: skip
    out = channels_last_empty(z, (weights.shape[0], *z.shape[1:]))
    _head(
        "head_forward", z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights, out=out
    )  # fmt: skip
    return out


def _gradients(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (d_rows, d_weights), the latter in the type of the arithmetic."""
    return channels_last_empty(z, tuple(z.shape)), weights.new_empty(weights.shape, dtype=_accumulator(z.dtype))


def head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    d_rows, d_weights = _gradients(z, weights)
    head = (z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights)
    _head("head_backward", *head, d_out=d_out, d_rows=d_rows, d_weights=d_weights)
    return d_rows, d_weights.to(weights.dtype)


def head_norm_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_z = channels_last_empty(z, tuple(z.shape))
    d_rows, d_weights = _gradients(z, weights)
    head = (z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights)
    _head("head_backward", *head, d_out=d_out, d_rows=d_rows, d_weights=d_weights, d_z=d_z)
    return d_z, d_rows, d_weights.to(weights.dtype)


def sum_rows(rows: Tensor, other: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    batch = inverse.numel() // top_k
    out = channels_last_empty(rows, (batch, *rows.shape[1:]))
    arguments = (*map(native.address, (rows, other, inverse, out)), batch, top_k, rows.shape[1:].numel())
    native.run("sum_rows", rows, *arguments, native.dtype_code(rows))
    return out
