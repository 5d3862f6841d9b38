"""A grouped convolution's cases, their inputs, and their results by loops over rows, pixels and taps in NumPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robust_moe_kernels.layout import Geometry, channels_last


class Case(NamedTuple):
    name: str
    counts: tuple[int, ...]  # rows of each expert
    channels: tuple[int, int]  # in, out
    size: tuple[int, int]  # of the input map
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    batch: int | None  # samples that rows gather from; None: rows are read as they lie
    reason: str

    @property
    def geometry(self) -> list[int]:
        return [*self.stride, *self.padding, *self.dilation]


class Inputs(NamedTuple):
    x: Tensor  # [B or R, I, H, W]
    weight: Tensor  # [E, O, I, kh, kw], output channels innermost
    offsets: Tensor
    sample: Tensor | None
    d_out: Tensor  # [R, O, H', W']

    def to(self, target: str | torch.dtype) -> Inputs:
        """Moved to a device, or numbers (not indices) converted to a dtype."""
        number = [tensor.to(target) for tensor in (self.x, self.weight, self.d_out)]
        index = [self.offsets, self.sample]
        if isinstance(target, str):
            index = [None if tensor is None else tensor.to(target) for tensor in index]
        return Inputs(number[0], number[1], index[0], index[1], number[2])


def inputs_of(case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Inputs:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, (inputs, outputs) = sum(case.counts), case.channels
    sample = None if case.batch is None else torch.randint(0, case.batch, (rows,), generator=generator)
    x = channels_last(drawn(rows if case.batch is None else case.batch, inputs, *case.size))
    weight = drawn(len(case.counts), *case.kernel, inputs, outputs).permute(0, 4, 3, 1, 2)
    size = Geometry(case.stride, case.padding, case.dilation).output_size(*case.size, case.kernel)
    d_out = channels_last(drawn(rows, outputs, *size))
    offsets = torch.tensor([0, *case.counts]).cumsum(0)
    return Inputs(x, weight, offsets, sample, d_out).to(dtype)


def oracle(inputs: Inputs, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, weight, d_out = (t.double().numpy().astype(np.longdouble) for t in (inputs.x, inputs.weight, inputs.d_out))
    rows, (height, width) = sum(case.counts), case.size
    sample = range(rows) if inputs.sample is None else inputs.sample.tolist()
    expert = np.repeat(np.arange(len(case.counts)), case.counts)
    out, d_weight = np.zeros_like(d_out), np.zeros_like(weight)
    d_x = np.zeros((rows, *x.shape[1:]), np.longdouble)
    for r, y, x_, i, j in np.ndindex(rows, *d_out.shape[2:], *case.kernel):
        from_y = y * case.stride[0] - case.padding[0] + i * case.dilation[0]
        from_x = x_ * case.stride[1] - case.padding[1] + j * case.dilation[1]
        if 0 <= from_y < height and 0 <= from_x < width:
            e, pixel = expert[r], x[sample[r], :, from_y, from_x]
            out[r, :, y, x_] += weight[e, :, :, i, j] @ pixel
            d_x[r, :, from_y, from_x] += weight[e, :, :, i, j].T @ d_out[r, :, y, x_]
            d_weight[e, :, :, i, j] += np.outer(d_out[r, :, y, x_], pixel)
    return out, d_x, d_weight
