"""Routing against Python's own stable sort; integers, so every comparison is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.routing import ROUTING, Route, sort_by_expert

OP = "routing"


def distinct(batch: int, top_k: int, experts: int) -> Callable[[torch.Generator], Tensor]:
    """Indices as a gate gives them: k different experts a sample."""
    return lambda generator: torch.rand(batch, experts, generator=generator).argsort(1)[:, :top_k].contiguous()


class Case(NamedTuple):
    name: str
    experts: int
    indices: Callable[[torch.Generator], Tensor]
    reason: str


CASES = (
    Case("empty_batch", 4, distinct(0, 2, 4), "no pairs: all offsets 0"),
    Case("one_row", 4, distinct(1, 2, 4), "the smallest batch"),
    Case("one_expert", 1, distinct(6, 1, 1), "E = 1: the identity"),
    Case("all_chosen", 4, distinct(9, 4, 4), "k = E: every expert has B rows"),
    Case("prime", 7, distinct(33, 3, 7), "E not a power of two"),
    Case("large", 513, distinct(40, 2, 513), "more experts than pairs: most are empty"),
    Case("block", 5, distinct(205, 5, 5), "1025 pairs: one more than a block of 1024 (and not a multiple of 256)"),
    Case("all_on_one", 5, lambda _: torch.full((300, 1), 3), "one expert has all rows, its neighbours none"),
    Case("all_on_last", 3, lambda _: torch.full((8, 1), 2), "the last expert: offsets end in 0, 0, 0, R"),
    Case("middle_empty", 4, lambda _: torch.tensor([[3, 0], [0, 3], [3, 0]]), "experts 1 and 2 have no row"),
    Case("repeated", 4, lambda _: torch.tensor([[2, 2], [1, 2], [2, 1]]), "one sample twice at one expert"),
)


def oracle(indices: Tensor, experts: int) -> Route:
    keys = indices.flatten().tolist()
    bins = [key if 0 <= key < experts else experts for key in keys]
    order = sorted(range(len(bins)), key=lambda pair: bins[pair])  # Python's sort is stable
    inverse = [0] * len(bins)
    for row, pair in enumerate(order):
        inverse[pair] = row
    offsets = [sum(expert < end for expert in bins) for end in range(experts + 1)]
    invalid = torch.tensor(bins.count(experts), dtype=torch.int32)
    sample = [pair // indices.shape[1] for pair in order]
    tensors = [torch.tensor(values, dtype=torch.int64) for values in (order, sample, inverse, offsets)]
    return Route(*tensors, invalid, indices.shape[1])


def on_cpu(route: Route) -> Route:
    return Route(*(part.cpu() for part in route[:5]), route.top_k)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_a_stable_sort(target, case, generator, assert_same_bits):
    indices = case.indices(generator)
    route = sort_by_expert(indices.to(target.device), case.experts, target.impl)
    expected = oracle(indices, case.experts)
    assert_same_bits(on_cpu(route), expected)
    counts = [indices.eq(expert).sum().item() for expert in range(case.experts)]
    assert route.counts.tolist() == counts


@pytest.mark.parametrize(
    "layout",
    [lambda i: i.t().contiguous().t(), lambda i: i.repeat_interleave(3, 0)[::3], lambda i: torch.cat([i, i], 1)[:, :2]],
    ids=["transposed", "every_third_row", "columns_of_wider"],
)
def test_layout_changes_nothing(target, layout, generator, assert_same_bits):
    indices = distinct(20, 2, 6)(generator).to(target.device)
    strided = layout(indices)
    assert not strided.is_contiguous()
    assert_same_bits(sort_by_expert(strided, 6, target.impl), sort_by_expert(indices, 6, target.impl))


@pytest.mark.parametrize(
    "indices",
    [[[0, 4], [-1, 2], [3, 1]], [[7, 9], [-3, 2**40]], [[-(2**63), 2**63 - 1], [0, 0]], [[2, 1], [0, 3]]],
    ids=["some", "all_out_of_range", "extreme", "none"],
)
def test_experts_out_of_range_sort_behind_all(target, indices, assert_same_bits):
    """What a GPU does, where nothing waits to raise: such pairs get rows of their own at the end, and are counted."""
    pairs = torch.tensor(indices)
    parts = ROUTING.module(target.impl).sort_by_expert(pairs.flatten().to(target.device), 4, 2)
    assert_same_bits(on_cpu(Route(*parts, 2)), oracle(pairs, 4))


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    indices = distinct(400, 3, 11)(generator).to(target.device)
    assert_same_bits(sort_by_expert(indices, 11, target.impl), sort_by_expert(indices, 11, target.impl))


def test_opcheck(target, generator):
    indices = distinct(7, 2, 5)(generator).to(target.device)
    torch.library.opcheck(torch.ops.robust_moe_kernels.sort_by_expert.default, (indices, 5, target.impl))


def test_compiles_without_graph_breaks(target, generator):
    indices = distinct(12, 2, 5)(generator).to(target.device)

    def rows_of_samples(values: Tensor) -> Tensor:
        route = sort_by_expert(values, 5, target.impl)
        return (route.order // route.top_k) * 100 + route.inverse + route.counts.max() + route.invalid

    compiled = torch.compile(rows_of_samples, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), rows_of_samples(indices))


def test_is_in_the_table():
    assert OPS[OP] is ROUTING
