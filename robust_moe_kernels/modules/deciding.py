"""What a layer makes of its gate's logits: noise, choice, the rules in force, buffers and padding, in this order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.assignment import chosen_by_experts, within_capacity
from robust_moe_kernels.modules.gates import noisy_choice, score_noise_scale
from robust_moe_kernels.modules.general_path import decide_plainly
from robust_moe_kernels.modules.ranks import drawn_over_ranks
from robust_moe_kernels.modules.route_options import Reroute, RouteOptions, checked_routes
from robust_moe_kernels.modules.routing_record import RoutingRecord
from robust_moe_kernels.ops.gate import top_k_gate, top_k_route
from robust_moe_kernels.ops.routing import Route

__all__ = ["Decision", "decide"]


class Decision(NamedTuple):
    """What ``decide`` returns."""

    record: RoutingRecord
    route: Route | None = None  # where the gate's kernel has sorted the record's pairs already
    computed: int | None = None  # pairs that are computed at most, where the host knows that it is fewer than all


def decide(
    gate: Callable[[Tensor], Tensor], x: Tensor, num_experts: int, options: RouteOptions, training: bool, *,
    shape: tuple[int, ...], padding: Tensor | None = None, plainly: bool = False, over_ranks: bool = False,
) -> Decision:  # fmt: skip
    """Where rows x [N, ...] go; ``plainly``: by operations of PyTorch alone; ``over_ranks``: they are a part of a batch
    on all ranks, for which noise is drawn."""
    rows = x.shape[0]
    clean = gate(x)
    wanted = f"logits of shape [{rows}, {num_experts}]"
    expect(clean.shape == (rows, num_experts), "gate(x)", wanted, list(clean.shape))
    noise = options.noise if training and options.noise_std > 0 else None
    scale, logits = None, clean
    if noise in ("logits", "vmoe"):
        constant = noise == "vmoe"
        scale = _equal_noise_scale(clean, options) if constant else score_noise_scale(clean, options.noise_std)
        logits = clean + scale * (drawn_over_ranks(clean, shape) if over_ranks else torch.randn_like(clean))
    own = None if training else options.inference
    if noise == "released":
        own = _choose_by_noise_over_ranks if over_ranks else _choose_by_noise
    route = None
    if plainly:
        out = decide_plainly(logits, options)
    elif own is None and options.reroute is None and padding is None and not options.limits:
        out, route = top_k_route(logits, options.top_k, options.renormalize, options.straight_through)
    else:
        out = top_k_gate(logits, options.top_k, options.renormalize, options.straight_through)
    record = RoutingRecord(logits=logits, clean_logits=clean, noise_scale=scale, shape=shape, **out._asdict())
    if padding is not None:
        record = record.with_padding(padding)
    if own is not None:
        record = _ruled(own, options, record)
    computed = None
    if options.limits:
        by_experts = options.choice == "expert" and own is None
        record = (chosen_by_experts if by_experts else within_capacity)(options, record)
        computed = min(num_experts * options.buffer(rows, num_experts), record.indices.numel())
    if options.reroute is not None:
        record, computed = _ruled(options.reroute, options, record), None
    if padding is not None:
        record = record.dropping(padding[:, None].expand(record.indices.shape))
    return Decision(record, route, computed)


def _equal_noise_scale(logits: Tensor, options: RouteOptions) -> Tensor:
    """[N, 1] standard deviation of V-MoE's score noise, ``noise_std``/E for every row."""
    return logits.new_full((logits.shape[0], 1), options.noise_std / logits.shape[1])


def _ruled(rule: Reroute, options: RouteOptions, record: RoutingRecord) -> RoutingRecord:
    """The record with the routes of a rule. What it names is computed: it replaces what buffers have dropped too."""
    routes = rule(options, record)
    ours = rule in (_choose_by_noise, _choose_by_noise_over_ranks)
    indices, weights, invalid = (*routes, None) if ours else checked_routes(routes, record)
    return replace(record, indices=indices, weights=weights, invalid=invalid, dropped=None)


def _choose_by_noise(options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
    indices = noisy_choice(record.scores, options.noise_std, options.top_k)
    return indices, options.weigh(record.scores.gather(1, indices))


def _choose_by_noise_over_ranks(options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
    indices = noisy_choice(record.scores, options.noise_std, options.top_k, record.shape)
    return indices, options.weigh(record.scores.gather(1, indices))
