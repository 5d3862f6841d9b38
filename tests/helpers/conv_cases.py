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
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation)


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


def terms_of(case: Case, inputs: Inputs) -> tuple[int, int, int]:
    """The longest sum behind an element of (out, d_x, d_weight)."""
    taps = case.kernel[0] * case.kernel[1]
    pixels = inputs.d_out.shape[2] * inputs.d_out.shape[3]
    return taps * case.channels[0], taps * case.channels[1], max(case.counts) * pixels


def assert_within_bounds(
    results: tuple[Tensor | None, ...], inputs: Inputs, case: Case, unit: float | None = None
) -> None:
    """Any order of a sum of n products errs by at most n*u/(1 - n*u) times the sum of their sizes; then the result is
    rounded to its dtype once, or truncated: one spacing. ``unit``: of a coarser accumulation, to first order. None
    among the results (out, d_x, d_weight): not computed."""
    sizes = oracle(Inputs(*(None if t is None else t.abs() for t in inputs)), case)
    for actual, truth, size, terms in zip(results, oracle(inputs, case), sizes, terms_of(case, inputs), strict=True):
        if actual is None:
            continue
        number = torch.finfo(actual.dtype)
        u = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32).eps / 2
        relative = terms * u / (1 - terms * u) if unit is None else terms * unit
        allowed = relative * size + number.eps * np.abs(truth) + number.tiny
        error = np.abs(actual.cpu().double().numpy().astype(np.longdouble) - truth)
        assert actual.shape == truth.shape
        assert (error <= allowed).all(), float((error / allowed).max())
