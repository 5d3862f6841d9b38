"""Routing: the (sample, slot) pairs of a batch, stably sorted by expert, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect, expect_dtype, expect_same_device, expect_tensor
from robust_moe_kernels.dispatch import AUTO, Op
from robust_moe_kernels.operands import Operands

__all__ = ["ROUTING", "Route", "expect_route", "sort_by_expert"]

ROUTING = Op(__package__, cpu=("native", "reference"), cuda=("native", "triton", "reference"))


class Route(NamedTuple):
    """Where each (sample, slot) pair goes. Pair p = b*k + j is sample b's j-th expert; R = B*k; all int64.

    ``sort_by_expert`` and ``top_k_route`` make them. One made by hand is checked by every operation that it is given
    to: on the CPU whole, on a GPU without its numbers, where an index out of range gives NaN. Rows behind offsets[E]
    are of no expert; ``expert_mlp`` takes such a route, as a capacity makes it, and leaves them out.
    """

    order: Tensor  # [R] pair at each sorted row
    sample: Tensor  # [R] sample of that pair, order // k
    inverse: Tensor  # [R] sorted row of each pair
    offsets: Tensor  # [E+1] rows offsets[e]:offsets[e+1] belong to expert e
    invalid: Tensor  # [] int32, pairs whose expert is out of range; their rows come after offsets[E]
    top_k: int  # k

    @property
    def counts(self) -> Tensor:
        """[E] rows of each expert."""
        return self.offsets.diff()


def expect_route(route: Route, data: Tensor, argument: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``route`` is a Route whose top_k is an integer >= 1 and whose order
    [R], inverse [R] and offsets [E+1] are int64 on the device of ``data``; their numbers are not read."""
    if not isinstance(route, Route):
        raise TypeError(f"route: expected a Route, as sort_by_expert makes it, got {type(route).__name__}")
    expect(type(route.top_k) is int and route.top_k >= 1, "route.top_k", "an integer k >= 1", repr(route.top_k))
    for name in ("order", "inverse", "offsets"):
        table = getattr(route, name)
        expect_tensor(table, f"route.{name}")
        expect_dtype(table, f"route.{name}", (torch.int64,))
        expect(table.dim() == 1, f"route.{name}", f"shape [{'E+1' if name == 'offsets' else 'R'}]", list(table.shape))
        expect_same_device(table, f"route.{name}", data, argument)
    pairs = route.order.shape
    expect(route.inverse.shape == pairs, "route.inverse", f"shape [R] = {list(pairs)}", list(route.inverse.shape))


def sort_by_expert(indices: Tensor, num_experts: int, impl: str = AUTO) -> Route:
    """Sort the pairs of a batch by expert; pairs of one expert keep the order of their samples.

    Args:
        indices: expert of each pair [B, k], int64, in [0, num_experts).
        num_experts: E >= 1.
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".

    Returns:
        :class:`Route`. On a GPU a pair out of range is sorted behind all experts and counted in ``invalid``, without
        waiting for the device.

    Raises:
        TypeError, ValueError: wrong dtype or shape, E < 1, on the CPU an expert out of range.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    expect_tensor(indices, "indices")
    expect_dtype(indices, "indices", (torch.int64,))
    expect(indices.dim() == 2 and indices.shape[1] >= 1, "indices", "shape [B, k] with k >= 1", list(indices.shape))
    order, sample, inverse, offsets, invalid = torch.ops.robust_moe_kernels.sort_by_expert(indices, num_experts, impl)
    return Route(order, sample, inverse, offsets, invalid, indices.shape[1])


_NAME = "robust_moe_kernels::sort_by_expert"
_INDICES = Operands("indices int64 [B, k]")
torch.library.define(_NAME, "(Tensor indices, int num_experts, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


@torch.library.impl(_NAME, "default")
def _sort_by_expert(indices: Tensor, num_experts: int, impl: str) -> tuple[Tensor, ...]:
    top_k = _INDICES(indices)["k"]
    expect(top_k >= 1, "indices", "shape [B, k] with k >= 1", list(indices.shape))
    expect(num_experts >= 1, "num_experts", "E >= 1", num_experts)
    expect(num_experts < 2**31, "num_experts", "E < 2^31", num_experts)
    chosen = ROUTING.choose(impl, indices)
    outputs = chosen.sort_by_expert(indices.contiguous().view(-1), num_experts, top_k)
    if indices.device.type == "cpu" and outputs[-1].item():
        raise ValueError(
            f"indices: expected experts in [0, {num_experts}), got values from {indices.min().item()} to"
            f" {indices.max().item()}"
        )
    return outputs


@torch.library.register_fake(_NAME)
def _sort_by_expert_fake(indices: Tensor, num_experts: int, impl: str) -> tuple[Tensor, ...]:
    pairs = indices.shape[0] * indices.shape[1]
    return (
        *(indices.new_empty(pairs) for _ in range(3)),
        indices.new_empty(num_experts + 1),
        indices.new_empty((), dtype=torch.int32),
    )
