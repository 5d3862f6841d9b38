"""What attacks read of a model's gates: which experts are chosen, and how far another one is from it.

A layer's rows are images, or their tokens (:mod:`robust_moe.tokens`): what is kept of B clean images has the shape
[B, T, ...], T being 1 for a layer that routes images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from robust_moe.attacks.base import expect_number
from robust_moe.attacks.passes import Passes
from robust_moe.tokens import of_images
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import DrawnReroute, MoELayer, Reroute, SoftGradient, moe_layers
from robust_moe_kernels.modules.assignment import chosen_by_experts

__all__ = [
    "CUSHION",
    "CleanGates",
    "Goal",
    "chosen_experts",
    "eval_rule",
    "expect_routes",
    "full",
    "leads",
    "most_chosen",
    "record_clean",
    "route_lead",
    "routed_layers",
    "routes_tried",
    "soft_gates",
]

CUSHION = 0.25  # lead, in spreads of the gate's logits, from which a route counts as changed: a step may undo some


class CleanGates(NamedTuple):
    """What the gates of L layers say of B clean images."""

    layers: list[MoELayer]
    chosen: list[Tensor]  # of each layer bool [B, T, E], see chosen_experts; where that is all, the gate's first alone
    ranked: list[Tensor]  # of each layer int64 [B, T, E], all experts, the chosen first, each kind from the best on
    spread: list[Tensor]  # of each layer float64 [B, T], > 0: standard deviation of a row's logits over the experts

    @classmethod
    def of(cls, layers: list[MoELayer], images: int) -> Self:
        """From the records of the forward just made, of B = ``images`` images."""
        gates = cls(layers, [], [], [])
        for layer in layers:
            h = layer.last_routing().logits.detach()
            order, chosen = _ranking(h), _aimed_at(layer)
            ranked = order.gather(1, chosen.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
            spread = h.double().std(dim=1, correction=0).clamp_min(torch.finfo(torch.float32).eps)
            gates.chosen.append(of_images(chosen, images))
            gates.ranked.append(of_images(ranked, images))
            gates.spread.append(of_images(spread, images))
        return gates

    def others(self) -> list[Tensor]:
        """Of each layer int64 [B, T, m], the experts that are not chosen, from the best on. Where a rule of evaluation
        chooses more of them for some rows than the fewest it may, chosen ones fill their places."""
        found = []
        for layer, chosen, ranked in zip(self.layers, self.chosen, self.ranked, strict=True):
            order = ranked.gather(2, chosen.gather(2, ranked).sort(dim=2, stable=True).indices)
            found.append(order[:, :, : layer.num_experts - fewest_chosen(layer, layer.training)])
        return found


class Goal(NamedTuple):
    """Where each of B images is to be sent by each of L layers."""

    experts: tuple[Tensor, ...]  # of each layer int64 [B, T], an expert for each token; -1: any
    spread: tuple[Tensor, ...]  # of each layer float64 [B, T], see CleanGates

    def extras(self) -> tuple[Tensor, ...]:
        """The ``extras`` of a climb's passes."""
        return (*self.experts, *self.spread)

    @classmethod
    def of_extras(cls, *extras: Tensor) -> Self:
        """What :meth:`extras` was made of."""
        layers = len(extras) // 2
        return cls(extras[:layers], extras[layers:])


def expect_routes(routes: int | None) -> None:
    """Refuse a setting ``routes``, experts of each layer to try, that is neither a count >= 1 nor None, all."""
    if routes is not None:
        expect_number("routes", routes, Integral)
        expect(routes >= 1, "routes", "a count >= 1", routes)


def routes_tried(routes: int | None, there: int) -> int:
    """How many of the ``there`` experts of a layer an attack with the setting ``routes`` tries."""
    return there if routes is None else min(routes, there)


def record_clean(passes: Passes, x0: Tensor) -> None:
    """One forward of the clean images: every layer's record is theirs.

    Raises:
        ValueError: a mixture-of-experts layer that the forward does not reach, whose record is none or of other images;
            or that it uses more than once, whose record is of the last use alone.
    """
    layers = moe_layers(passes.model)
    uses = Counter[nn.Module]()

    def count(module: nn.Module, *_: object) -> None:
        uses[module] += 1

    count.blind = True  # type: ignore[attr-defined]  # see interception.is_hooked: attacks fold on
    before = {layer: layer.routing for layer in layers.values()}
    hooks = [layer.register_forward_hook(count) for layer in layers.values()]
    try:
        with torch.no_grad():
            passes.logits(x0)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        reached = uses[layer] > 0 or layer.routing is not before[layer]  # hooks see no call of ``layer.forward``
        expect(reached, "model", "a forward that reaches every routed layer", f"none through {name!r}")
        expect(uses[layer] <= 1, "model", "a forward that uses a routed layer once", f"{uses[layer]} uses of {name!r}")


def eval_rule(layer: MoELayer, training: bool) -> Reroute | None:
    """The rule that replaces the gate's choice of k in the given mode; None: there is none."""
    return None if training else layer.inference


def chosen_experts(layer: MoELayer) -> Tensor:
    """Experts that the layer gives weight to in the forward just made, bool [N, E]: the gate's first k, also where a
    caller's routes replace them, and where a token finds no place at an expert; where experts choose, those that
    take the row; with a rule of evaluation those that it
    gives weight to, and of a rule that draws those that it might have drawn
    (:meth:`~robust_moe_kernels.modules.DrawnReroute.mean_weights`)."""
    record, rule = layer.last_routing(), eval_rule(layer, layer.training)
    none = torch.zeros_like(record.scores)
    if rule is None and layer.choice == "expert":
        record = chosen_by_experts(layer.route_options, record)
        assert record.dropped is not None
        return none.scatter(1, record.indices, (~record.dropped).to(none.dtype)) > 0
    if rule is None:
        return none.scatter(1, _ranking(record.logits)[:, : layer.top_k], 1) > 0
    if isinstance(rule, DrawnReroute):
        return rule.mean_weights(layer.route_options, record) > 0
    return none.scatter_add(1, record.indices, record.weights.detach().abs().to(none.dtype)) > 0


def _aimed_at(layer: MoELayer) -> Tensor:
    """:func:`chosen_experts`; where they are all of them, the gate's first alone: then it is the order that can be
    attacked."""
    found = chosen_experts(layer)
    first = torch.zeros_like(found).scatter(1, _ranking(layer.last_routing().logits)[:, :1], True)
    return found & (~found.all(1, keepdim=True) | first)


def fewest_chosen(layer: MoELayer, training: bool) -> int:
    """Experts that a row gets, at least: k; 1 with a rule of evaluation; 0 where experts choose."""
    if eval_rule(layer, training) is not None:
        return 1
    return 0 if layer.choice == "expert" else layer.top_k


def most_chosen(layer: MoELayer, training: bool) -> int:
    """Experts that a row gets, at most: k; with a rule of evaluation its ``top``, E where that is
    no integer, and where experts choose."""
    rule, count = eval_rule(layer, training), layer.num_experts
    if rule is None:
        return count if layer.choice == "expert" else layer.top_k
    top = getattr(rule, "top", count)
    return min(top, count) if type(top) is int else count


def routed_layers(model: nn.Module, training: bool) -> list[MoELayer]:
    """The layers that choose among experts in the given mode: k < E or a rule of evaluation, and no fixed expert."""
    return [
        layer
        for layer in moe_layers(model).values()
        if layer.fixed_expert is None and fewest_chosen(layer, training) < layer.num_experts
    ]


def soft_gates(model: nn.Module) -> dict[str, SoftGradient]:
    """A :class:`~robust_moe_kernels.modules.SoftGradient` for each layer that chooses among experts; layers
    whose routes the caller imposes are left alone."""
    return {
        name: SoftGradient()
        for name, layer in moe_layers(model).items()
        if layer.reroute is None and fewest_chosen(layer, layer.training) < layer.num_experts
    }


def full(logits: Tensor) -> Tensor:
    """In fp32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _ranking(logits: Tensor) -> Tensor:
    """All experts of each row [N, E], best first, ties to the lowest index as in the gate."""
    return logits.detach().sort(dim=1, descending=True, stable=True).indices


def route_lead(logits: Tensor, expert: Tensor, chosen: Tensor) -> Tensor:
    """How far an expert is inside the choice, [N]: the distance of its logit from the nearest expert's that is not
    chosen; where it is not chosen itself, minus that from the nearest expert's that is.

    For the first k of a gate this is its lead over the k-th best of the others. Where all experts are chosen it is
    ``CUSHION``, without a gradient.

    Args:
        logits: [N, E], any floating dtype; computed in fp32 at least.
        expert: int64 [N].
        chosen: bool [N, E], the experts that the layer gives weight to.
    """
    h, place = full(logits), expert[:, None]
    inside = chosen.gather(1, place)
    gaps = h.gather(1, place) - h
    rival = gaps.detach().abs().masked_fill(chosen == inside, torch.inf).argmin(1, keepdim=True)
    gap = gaps.gather(1, rival)
    lead = torch.where(torch.where(inside, gap < 0, gap > 0), -gap, gap)  # at a tie its own logit is to rise
    return torch.where((chosen == inside).all(1, keepdim=True), CUSHION, lead)[:, 0]


def leads(layers: Sequence[MoELayer], goal: Goal) -> list[Tensor]:
    """:func:`route_lead` of each layer's goal in the forward just made, in units of the clean spread, [B, T] each;
    exactly ``CUSHION``, without a gradient, where any expert will do."""
    found = []
    for layer, expert, spread in zip(layers, goal.experts, goal.spread, strict=True):
        h, aim = full(layer.last_routing().logits), expert.flatten()
        lead = route_lead(h / spread.flatten()[:, None].to(h.dtype), aim.clamp_min(0), _aimed_at(layer))
        found.append(torch.where(aim < 0, CUSHION, lead).view_as(expert))
    return found
