"""Gradients and running statistics of several processes: their means, in all of them.

Once a backward is over, and not on its way: a method may make any number of forwards and backwards then, the mean is
that of what is stepped, and an adversarial step has one backward to the weights for some sixteen other passes, so that
there is little to hide the sums behind (docs/clusters.md has the numbers).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_moe_kernels.modules import moe_layers, rank_count
from robust_moe_kernels.modules.experts import Experts

__all__ = ["average_buffers", "average_gradients", "may_lack_gradients", "mean_gradients"]

UNDER_WAY = 4  # sums at once
BUCKET = 2**25  # bytes that are summed at once: fewer, and the messages' latency counts


def may_lack_gradients(model: nn.Module) -> bool:
    """Whether a parameter may get a gradient in some processes and none in others: that of a whole network as an expert
    which only some have an image for. Experts of other kinds without images get zeros."""
    return any(not isinstance(layer.experts, Experts) for layer in moe_layers(model).values())


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], some_have_none: bool) -> None:
    """Replace each parameter's gradient by the mean of the processes'. All of them have to call this."""
    if rank_count() == 1:
        return
    parameters = list(parameters)
    means = mean_gradients(parameters, [parameter.grad for parameter in parameters], some_have_none)
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean


@torch.no_grad()
def mean_gradients(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], some_have_none: bool
) -> list[Tensor | None]:
    """The means of the processes' ``gradients``, which may be written over.

    Args:
        some_have_none: as :func:`may_lack_gradients` says; what is missing counts as 0. Reads the host. False: a
            parameter has a gradient in all processes or in none.
    """
    count = rank_count()
    if count == 1:
        return list(gradients)
    found: list[Tensor | None] = list(gradients)
    if some_have_none and found:
        have = torch.tensor([gradient is not None for gradient in found], dtype=torch.int32)
        have = have.to(parameters[0].device)
        dist.all_reduce(have)
        for place, anywhere in enumerate(have.tolist()):
            if anywhere and found[place] is None:
                found[place] = torch.zeros_like(parameters[place])
    _average([gradient for gradient in found if gradient is not None])
    return found


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give every process the mean of the running statistics, and the most batches that one has counted.

    Each has moved them by its own images: the mean of the means is that of all images, the mean of the variances what
    one process would have without the differences between the shares. All processes then attack, average and validate
    one and the same model. What they all have alike, such as a data set's mean, stays as it is: the means are taken in
    float64, as in float32 a sum of equal numbers may round, and step after step they would move.
    """
    if rank_count() == 1:
        return
    buffers = list(model.buffers())
    floating = [buffer for buffer in buffers if buffer.is_floating_point()]
    means = [buffer.double() for buffer in floating]
    _average(means)
    if floating:
        torch._foreach_copy_(floating, means)
    whole = [buffer for buffer in buffers if not (buffer.is_floating_point() or buffer.is_complex())]
    whole = [buffer for buffer in whole if buffer.dtype != torch.bool]
    if whole:
        counts = torch.cat([buffer.reshape(-1).long() for buffer in whole])
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        parts = counts.split([buffer.numel() for buffer in whole])
        torch._foreach_copy_(whole, [part.view_as(buffer) for part, buffer in zip(parts, whole, strict=True)])


def _average(tensors: list[Tensor]) -> None:
    """Replace the tensors by the processes' means, in place; the order of the sums follows from their forms alone."""
    count = rank_count()
    under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()

    def finish_first() -> None:
        bucket, flat, sum_of_all = under_way.popleft()
        sum_of_all.wait()
        parts = flat.div_(count).split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])

    for bucket in _buckets(tensors):
        if len(under_way) == UNDER_WAY:  # all at once would be a second copy of every gradient
            finish_first()
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    while under_way:
        finish_first()


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors in order, those of one dtype together, each bucket of :data:`BUCKET` bytes or of one tensor."""
    made: list[list[Tensor]] = []
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        room = 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if tensor.nbytes > room:
                made.append([])
                room = BUCKET
            made[-1].append(tensor)
            room -= tensor.nbytes
    return made
