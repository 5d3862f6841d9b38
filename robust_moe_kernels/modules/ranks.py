"""Sums over the ranks of ``torch.distributed``'s default process group, differentiable any number of times.

Without a process group, or with one rank, each is what one rank has. All ranks have to ask in the same order. Only sums
and broadcasts are asked of the group, which every backend knows for tensors on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "drawn_over_ranks",
    "gather_over_ranks",
    "mean_over_ranks",
    "offsets_over_ranks",
    "rank_count",
    "sum_over_ranks",
]


def rank_count() -> int:
    """Ranks that share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # every rank's loss depends on the sum: what is lowered is the sum of the ranks' losses
        return _Sum.apply(gradients[0])


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of the ranks' ``x``, of one shape on all of them; bit for bit the same on each. Its gradient is the sum
    of the ranks' gradients: losses that are averaged over the ranks are differentiated as one."""
    if rank_count() == 1:
        return x
    out: Tensor = _Sum.apply(x)
    return out


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of the ranks' ``x``, of one shape on all of them."""
    return sum_over_ranks(x) / rank_count()


def gather_over_ranks(x: Tensor) -> Tensor:
    """The ranks' rows [N, ...], as many on each, below each other [R * N, ...]."""
    count = rank_count()
    if count == 1:
        return x
    rank = dist.get_rank()
    before, behind = (x.new_zeros(others * len(x), *x.shape[1:]) for others in (rank, count - 1 - rank))
    return sum_over_ranks(torch.cat([before, x, behind]))


def offsets_over_ranks(offsets: Tensor) -> Tensor:
    """Offsets [E + 1] of the rows of every rank together, from those of this rank's."""
    counts: Tensor = sum_over_ranks(offsets.diff())
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(offsets.dtype)


def drawn_over_ranks(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of the form of ``like`` [N, ...], drawn on the first rank for the batch of all.

    They are those that one rank with the whole batch would draw for these samples, whose sample j R + r is rank r's
    sample j; ``shape`` says how rows belong to samples (``RoutingRecord.shape``). The generators of other ranks stay.
    """
    count = rank_count()
    if count == 1:
        return torch.randn_like(like)
    rows = (shape[0] * count, like.numel() // max(1, shape[0]))
    make = torch.randn if dist.get_rank() == 0 else torch.zeros
    whole = make(rows, dtype=like.dtype, device=like.device)
    dist.broadcast(whole, 0)
    return whole.unflatten(0, (shape[0], count))[:, dist.get_rank()].reshape_as(like)
