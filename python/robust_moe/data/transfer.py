"""Small tensors to a GPU without the host waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["send"]

ALIGNMENT = 16  # bytes: each tensor's beginning in the common buffer


def send(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on ``device``: one copy of all of them, from pinned memory, so that the host goes on at once (a copy
    from ordinary memory makes it wait for everything that the device was given before). Nothing is done on the CPU.

    Returns:
        Tensors of the same shapes and dtypes, in memory that they share.
    """
    if device.type == "cpu" or not tensors:
        return tensors
    begins, total = [], 0
    for tensor in tensors:
        begins.append(total)
        total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    whole = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def part(buffer: Tensor, begin: int, like: Tensor) -> Tensor:
        return buffer[begin : begin + like.nbytes].view(like.dtype).view(like.shape)

    for begin, tensor in zip(begins, tensors, strict=True):
        part(whole, begin, tensor).copy_(tensor)
    moved = whole.to(device, non_blocking=True)
    return [part(moved, begin, tensor) for begin, tensor in zip(begins, tensors, strict=True)]
