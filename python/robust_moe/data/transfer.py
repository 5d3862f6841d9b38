"""Tensors to a GPU without the host waiting for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["one_ahead", "send"]

Tensors = TypeVar("Tensors", bound=NamedTuple)
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


def one_ahead(batches: Iterable[Tensors], device: torch.device) -> Iterator[Tensors]:
    """The named tuples with their own tensors on ``device``; other values, and tensors inside of them, stay as they
    are. On a GPU the copy of the next is under way, on a stream of its own, while this one is worked on; the tensors
    should be pinned."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    ahead: deque[tuple[Tensors, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(copying):
            ahead.append((_moved(batch, device), copying.record_event()))
        if len(ahead) > 1:
            yield _received(*ahead.popleft())
    if ahead:
        yield _received(*ahead.popleft())


def _moved(batch: Any, device: torch.device) -> Any:
    tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return batch._replace(**{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def _received(batch: Any, arrived: torch.cuda.Event) -> Any:
    """The batch, which the current stream goes on with when it has arrived, and whose memory is not used again before
    that stream is done with it."""
    current = torch.cuda.current_stream()
    current.wait_event(arrived)
    for value in batch:
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch
