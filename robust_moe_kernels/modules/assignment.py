"""Which (row, expert) pairs are computed where an expert's buffer is limited: V-MoE's capacity, and expert choice.

Nothing here waits for the device: pairs that are not computed are marked, and sorted behind all experts. What becomes
of a row depends on the whole batch then.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robust_moe_kernels.modules.route_options import RouteOptions
from robust_moe_kernels.modules.routing_record import RoutingRecord
from robust_moe_kernels.ops.routing import Route, sort_by_expert

__all__ = ["chosen_by_experts", "route_of", "sorted_indices", "within_capacity"]


def within_capacity(options: RouteOptions, record: RoutingRecord) -> RoutingRecord:
    """The record with the pairs dropped that find their expert's buffer full (Riquelme et al., 2106.05974, appendix C).

    Every row's first choice is served before any second choice, and so on. Within a slot rows are served in the order
    of the batch ("vanilla"), or the largest score first ("batch": batch-prioritised routing), equal ones in the order
    of the batch. Padding takes no place.
    """
    rows, experts = record.scores.shape
    indices = record.indices
    if record.padding is not None:
        indices = indices.masked_fill(record.padding[:, None], experts)
    pairs = indices
    if options.priority == "batch":
        best = record.scores.detach().gather(1, record.indices).amax(1)
        served = best.sort(descending=True, stable=True).indices  # [N] rows, the most important first
        pairs = indices.index_select(0, served)
    pairs = pairs.t().reshape(-1)  # slot after slot
    found, order = pairs.sort(stable=True)
    begins = torch.searchsorted(found, torch.arange(experts + 1, device=found.device))
    places = torch.arange(len(found), device=found.device) - begins.index_select(0, found)  # in the buffers
    full = places >= options.buffer(rows, experts)
    full = torch.empty_like(full).index_copy(0, order, full).view(indices.shape[1], rows).t()
    if options.priority == "batch":
        full = torch.empty_like(full).index_copy(0, served, full)
    return record.dropping(full)


def chosen_by_experts(options: RouteOptions, record: RoutingRecord) -> RoutingRecord:
    """Expert choice (Zhou et al., 2202.09368): each expert takes the rows with the largest scores for it, as many as
    its buffer holds, weighted by these scores.

    A row has any number of experts, 0 to E. The record has E pairs for each, those taken first, the best of them first;
    the others are dropped. Padding is taken last, and dropped then.
    """
    scores = record.scores.detach()
    if record.padding is not None:
        scores = scores.masked_fill(record.padding[:, None], -1.0)
    rows, experts = scores.shape
    best = scores.sort(dim=0, descending=True, stable=True).indices[: options.buffer(rows, experts)]
    taken = torch.zeros_like(scores).scatter(0, best, 1.0)
    indices = (scores + 2.0 * taken).sort(dim=1, descending=True, stable=True).indices
    left = taken.gather(1, indices) == 0
    return replace(record, indices=indices, weights=record.scores.gather(1, indices)).dropping(left)


def sorted_indices(record: RoutingRecord) -> Tensor:
    """Expert of each pair as it is sorted: one past the last for those that are dropped, and past that for any that is
    none of the experts."""
    if record.dropped is None:
        return record.indices
    experts = record.scores.shape[1]
    return record.indices.masked_fill(record.indices >= experts, experts + 1).masked_fill(record.dropped, experts)


def route_of(record: RoutingRecord) -> Route:
    """The record's pairs sorted by expert, those that are dropped behind all experts."""
    experts = record.scores.shape[1]
    if record.dropped is None:
        return sort_by_expert(record.indices, experts)
    found = sort_by_expert(sorted_indices(record), experts + 1)
    return found._replace(offsets=found.offsets[:-1])
