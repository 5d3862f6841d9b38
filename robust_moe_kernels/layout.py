"""Memory formats: the ops treat a sample's map as one dense run of elements, in either of the two common orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

__all__ = [
    "Geometry",
    "channels_last",
    "channels_last_empty",
    "dense",
    "dense_format",
    "expert_of_row",
    "pair_of",
    "rows_like",
]


def dense_format(tensor: Tensor) -> torch.memory_format:
    """``channels_last`` for a 4-d tensor that is laid out so and not contiguous as well, else ``contiguous_format``."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels-last, else a contiguous copy."""
    return tensor.contiguous(memory_format=dense_format(tensor))


def rows_like(x: Tensor, rows: int) -> Tensor:
    """An uninitialised tensor of ``rows`` maps like those of the dense tensor x, in its memory format."""
    strides = (x.shape[1:].numel(), *x.stride()[1:])
    return x.new_empty_strided((rows, *x.shape[1:]), strides)


def pair_of(numbers: Sequence[int]) -> tuple[int, int]:
    """Two numbers, (vertical, horizontal), as a tuple of two; raises ``ValueError`` for more or fewer."""
    vertical, horizontal = numbers
    return vertical, horizontal


class Geometry(NamedTuple):
    """Stride, zero padding and dilation of a convolution, each (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> Self:
        """The inverse of ``numbers``."""
        down, across, top, left, step_down, step_across = numbers
        return cls((down, across), (top, left), (step_down, step_across))

    def numbers(self) -> list[int]:
        """The six integers in order, for a registered operation, whose schema knows no other type."""
        return [*self.stride, *self.padding, *self.dilation]

    def output_size(self, height: int, width: int, kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output map; ``kernel``: those of the filters."""
        sizes = zip((height, width), kernel, self.stride, self.padding, self.dilation, strict=True)
        high, wide = ((size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in sizes)
        return high, wide

    def output_like(self, x: Tensor, weight: Tensor, rows: int) -> Tensor:
        """An uninitialised channels-last output for input x [*, I, H, W] and weight [E, O, I, kh, kw]."""
        size = self.output_size(x.shape[2], x.shape[3], weight.shape[3:])
        return channels_last_empty(x, (rows, weight.shape[1], *size))


def channels_last(tensor: Tensor) -> Tensor:
    """[N, C, H, W] with C innermost and no gaps: the tensor itself if it is laid out so, else a copy."""
    n, c, h, w = tensor.shape
    if tensor.stride() == (h * w * c, 1, w * c, c):
        return tensor
    return channels_last_empty(tensor, (n, c, h, w)).copy_(tensor)


def channels_last_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised channels-last tensor [N, C, H, W] with the dtype and device of ``like``."""
    n, c, h, w = shape
    return like.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def expert_of_row(offsets: Tensor, rows: int) -> Tensor:
    """The expert [R] of each row, from where each expert's rows begin [E+1]; the device is not waited for."""
    return torch.searchsorted(offsets[1:], torch.arange(rows, device=offsets.device), right=True)
