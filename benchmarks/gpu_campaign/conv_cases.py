"""Grouped convolutions to check and to time: operands, every candidate kernel, the library's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import triton_impl
from robust_moe_kernels.ops.expert_conv.tiles import Choice
from robust_moe_kernels.ops.expert_conv.triton_plan import gpu_of

__all__ = ["MODES", "OPERATIONS", "ConvCase", "Operands", "choices", "library", "precision", "row_counts", "runner"]

OPERATIONS = ("forward", "dgrad", "wgrad")
MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


@contextmanager
def precision(mode: str) -> Iterator[torch.dtype]:
    """The dtype of a mode; inside, float32 convolutions are made as the mode says."""
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee" if mode == "ieee" else "tf32"
    try:
        yield MODES[mode]
    finally:
        convolution.fp32_precision = before


def row_counts(rows: int, experts: int, spread: str) -> tuple[int, ...]:
    """Rows of each expert. "even", or "uneven": each has 0.7 of the one before; with four or more experts the last has
    none and the last but one a single row."""
    if spread == "even":
        return tuple(rows // experts + (number < rows % experts) for number in range(experts))
    shares = [0.7**number for number in range(experts)]
    counts = [int(rows * share / sum(shares)) for share in shares]
    if experts >= 4:
        counts[-2:] = 1, 0
    counts[0] += rows - sum(counts)
    return tuple(counts)


@dataclass(frozen=True)
class ConvCase:
    """One convolution of all experts: C channels in and out, square maps."""

    counts: tuple[int, ...]  # rows of each expert
    channels: int  # C
    size: int = 4  # H = W of the input
    kernel: int = 3
    stride: int = 1
    gather: bool = False  # rows are read through an index, as the first convolution of a layer reads its samples

    @property
    def geometry(self) -> Geometry:
        padding = self.kernel // 2
        return Geometry((self.stride, self.stride), (padding, padding), (1, 1))

    def gflop(self) -> float:
        """Products with real pixels, 2 FLOP each; the same for all three operations."""
        reached = range(-(self.kernel // 2), self.kernel - self.kernel // 2)
        line = sum(0 <= place + tap < self.size for place in range(0, self.size, self.stride) for tap in reached)
        return 2 * sum(self.counts) * self.channels**2 * line**2 / 1e9


class Operands(NamedTuple):
    """Tensors of a case on a device."""

    case: ConvCase
    x: Tensor  # [B or R, C, H, W]
    sample: Tensor | None  # int64 [R]
    weight: Tensor  # [E, C, C, k, k], output channels innermost
    offsets: Tensor  # int64 [E+1]
    d_out: Tensor  # [R, C, H', W']

    @classmethod
    def of(cls, case: ConvCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Operands:
        torch.manual_seed(seed)
        rows, experts, channels, kernel = sum(case.counts), len(case.counts), case.channels, case.kernel

        def maps(count: int, size: int) -> Tensor:
            return torch.randn(count, size, size, channels, device=device).to(dtype).permute(0, 3, 1, 2)

        x = maps(-(-rows // 2) if case.gather else rows, case.size)
        sample = torch.randint(len(x), (rows,), device=device) if case.gather else None
        weight = torch.randn(experts, kernel, kernel, channels, channels, device=device)
        weight = (weight / (kernel * channels**0.5)).to(dtype).permute(0, 4, 3, 1, 2)
        offsets = torch.tensor([0, *torch.tensor(case.counts).cumsum(0).tolist()], device=device)
        size = case.geometry.output_size(case.size, case.size, (kernel, kernel))[0]
        return cls(case, x, sample, weight, offsets, maps(rows, size))


def choices(operands: Operands, operation: str) -> list[tuple[str, Choice]]:
    """(label, choice) of every kernel and tile that can compute an operation on these operands, largest tiles first; on
    the CPU, where Triton's interpreter takes seconds for a large tile, of every kernel with its smallest."""
    find = triton_impl.filter_candidates if operation == "wgrad" else triton_impl.product_candidates
    channels, capability = operands.case.channels, gpu_of(operands.x.device).capability
    found = find(operands.x.dtype, channels, channels, capability)
    if not operands.x.is_cuda:
        found = tuple({choice.variant: choice for choice in found}.values())  # the last of a variant is the smallest
    return [(f"{choice.variant} {'x'.join(map(str, choice.tile))}", choice) for choice in found]


def runner(operands: Operands, operation: str, choice: Choice) -> Callable[[], Tensor]:
    """One operation by one candidate, its plan made beforehand, once."""
    case, x, sample, weight, offsets, d_out = operands
    geometry, size, rows = case.geometry, case.size, sum(case.counts)
    if operation == "wgrad":
        return partial(triton_impl.wgrad_by, choice, x, d_out, offsets, sample, weight, geometry)
    plan = triton_impl.plan_by(choice, weight, offsets, rows, size, size, operation == "dgrad", geometry)
    if operation == "dgrad":
        return partial(triton_impl.dgrad_by, choice, d_out, weight, offsets, plan, size, size, geometry)
    return partial(triton_impl.forward_by, choice, x, weight, offsets, sample, plan, geometry)


def library(operands: Operands, operation: str, dtype: torch.dtype) -> Tensor:
    """The same by PyTorch's convolutions, expert by expert, computed and returned in ``dtype``."""
    case, x, sample, weight, _, d_out = operands
    x, weight, d_out = ((x if sample is None else x[sample]).to(dtype), weight.to(dtype), d_out.to(dtype))
    pieces = []
    for rows, filters, gradient in zip(x.split(case.counts), weight, d_out.split(case.counts), strict=True):
        if operation == "forward":
            pieces.append(F.conv2d(rows, filters, None, case.stride, case.kernel // 2))
        else:
            pieces.append(_backward(case, rows, filters, gradient, operation))
    return torch.stack(pieces) if operation == "wgrad" else torch.cat(pieces)


def _backward(case: ConvCase, x: Tensor, weight: Tensor, d_out: Tensor, operation: str) -> Tensor:
    if len(x) == 0:
        return torch.zeros_like(weight) if operation == "wgrad" else torch.zeros_like(x)
    return convolution_backward(x, weight, d_out, case, operation)


def convolution_backward(x: Tensor, weight: Tensor, d_out: Tensor, case: ConvCase, operation: str) -> Tensor:
    """One gradient of an ordinary convolution of the case's geometry."""
    stride, padding = [case.stride] * 2, [case.kernel // 2] * 2
    mask = [operation == "dgrad", operation == "wgrad", False]
    found: Any = torch.ops.aten.convolution_backward(
        d_out, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask
    )
    return found[0] if operation == "dgrad" else found[1]
