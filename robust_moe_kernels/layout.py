"""Memory formats: the ops treat a sample's map as one dense run of elements, in either of the two common orders."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense", "dense_format", "rows_like"]


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
