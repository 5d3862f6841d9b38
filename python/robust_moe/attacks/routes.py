"""What attacks read of a model's gates, and the search over the experts that a gate can be driven to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from robust_moe.attacks.apgd import merge
from robust_moe.attacks.base import Found, expect_number
from robust_moe.attacks.passes import Passes
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import DrawnReroute, MoELayer, Reroute, SoftGradient, moe_layers

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
    "worst_route",
]

CUSHION = 0.25  # lead, in spreads of the gate's logits, from which a route counts as changed: a step may undo some


class CleanGates(NamedTuple):
    """What the gates of L layers say of B clean images."""

    layers: list[MoELayer]
    chosen: list[Tensor]  # of each layer bool [B, E], see chosen_experts; where that is all, the gate's first alone
    ranked: list[Tensor]  # of each layer int64 [B, E], all experts, the chosen ones first, each kind from the best on
    spread: Tensor  # float64 [B, L], > 0: standard deviation, over the experts, of each layer's logits

    @classmethod
    def of(cls, layers: list[MoELayer]) -> CleanGates:
        """From the records of the forward just made."""
        logits = [layer.last_routing().logits.detach() for layer in layers]
        chosen, ranked = [], []
        for layer, h in zip(layers, logits, strict=True):
            order, found = _ranking(h), _aimed_at(layer)
            chosen.append(found)
            ranked.append(order.gather(1, found.gather(1, order).sort(dim=1, descending=True, stable=True).indices))
        spread = torch.stack([h.double().std(dim=1, correction=0) for h in logits], 1)
        return cls(layers, chosen, ranked, spread.clamp_min(torch.finfo(torch.float32).eps))

    def others(self) -> list[Tensor]:
        """Of each layer int64 [B, m], the experts that are not chosen, from the best on. Where a rule of evaluation
        chooses more of them for some images than the fewest it may, chosen ones fill their rows."""
        found = []
        for layer, chosen, ranked in zip(self.layers, self.chosen, self.ranked, strict=True):
            order = ranked.gather(1, chosen.gather(1, ranked).sort(dim=1, stable=True).indices)
            found.append(order[:, : layer.num_experts - fewest_chosen(layer, layer.training)])
        return found


class Goal(NamedTuple):
    """Where each of B images is to be sent: the ``extras`` of a climb."""

    experts: Tensor  # int64 [B, L], an expert of each layer; -1: any
    spread: Tensor  # float64 [B, L], see CleanGates


class Climber(Protocol):
    """What the search needs of an attack."""

    restarts: int

    def start(self, x0: Tensor, sample_index: Tensor | None, seed: int, restart: int) -> Tensor:
        """First iterate."""
        ...


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
    """Experts that the layer gives weight to in the forward just made, bool [B, E]: the gate's first k, also where a
    caller's routes replace them; with a rule of evaluation those that it gives weight to, and of a rule that draws
    those that it might have drawn (:meth:`~robust_moe_kernels.modules.DrawnReroute.mean_weights`)."""
    record, rule = layer.last_routing(), eval_rule(layer, layer.training)
    none = torch.zeros_like(record.scores)
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
    """Experts that the layer gives weight to, at least: k; 1 with a rule of evaluation."""
    return layer.top_k if eval_rule(layer, training) is None else 1


def most_chosen(layer: MoELayer, training: bool) -> int:
    """Experts that the layer gives weight to, at most: k; with a rule of evaluation its ``top``, E where that is no
    integer."""
    rule, count = eval_rule(layer, training), layer.num_experts
    top = getattr(rule, "top", count)
    return layer.top_k if rule is None else min(top, count) if type(top) is int else count


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
    """All experts of each image [B, E], best first, ties to the lowest index as in the gate."""
    return logits.detach().sort(dim=1, descending=True, stable=True).indices


def route_lead(logits: Tensor, expert: Tensor, chosen: Tensor) -> Tensor:
    """How far an expert is inside the choice, [B]: the distance of its logit from the nearest expert's that is not
    chosen; where it is not chosen itself, minus that from the nearest expert's that is.

    For the first k of a gate this is its lead over the k-th best of the others. Where all experts are chosen it is
    ``CUSHION``, without a gradient.

    Args:
        logits: [B, E], any floating dtype; computed in fp32 at least.
        expert: int64 [B].
        chosen: bool [B, E], the experts that the layer gives weight to.
    """
    h, place = full(logits), expert[:, None]
    inside = chosen.gather(1, place)
    gaps = h.gather(1, place) - h
    rival = gaps.detach().abs().masked_fill(chosen == inside, torch.inf).argmin(1, keepdim=True)
    gap = gaps.gather(1, rival)
    lead = torch.where(torch.where(inside, gap < 0, gap > 0), -gap, gap)  # at a tie its own logit is to rise
    return torch.where((chosen == inside).all(1, keepdim=True), CUSHION, lead)[:, 0]


def leads(layers: Sequence[MoELayer], goal: Goal) -> Tensor:
    """:func:`route_lead` of each layer's goal in the forward just made, in units of the clean spread, [B, L]; exactly
    ``CUSHION``, without a gradient, where any expert will do."""
    columns = []
    for layer, expert, spread in zip(layers, goal.experts.unbind(1), goal.spread.unbind(1), strict=True):
        h = full(layer.last_routing().logits)
        lead = route_lead(h / spread[:, None].to(h.dtype), expert.clamp_min(0), _aimed_at(layer))
        columns.append(torch.where(expert < 0, CUSHION, lead))
    return torch.stack(columns, 1)


def worst_route(
    attack: Climber,
    passes: Passes,
    x0: Tensor,
    sample_index: Tensor | None,
    seed: int,
    gates: CleanGates,
    candidates: Sequence[Tensor],
    climb: Callable[[Passes, Tensor, Tensor, Goal], Found],
    found: Found,
) -> Found:
    """The worst of ``found`` and of a climb to each candidate, from each of the attack's starts.

    Each layer's candidates are tried in turn, the other layers left to their gates. Then they are joined greedily: each
    image keeps the first layer's candidate that did most harm while the second layer's are tried, and so on. Of the
    climbs that fool an image the first counts. Where ``passes.reads``, fooled images take no part in further climbs,
    and several climbs of those left run as one batch that fits in ``passes.room``; what is found does not depend on it,
    but for rounding.

    Args:
        candidates: for each layer int64 [B, m], the experts to try.
        climb: from starts, clean images and goals to what was found; its passes have the batch's labels.
        found: images, success and classification loss so far; not written to.
    """
    search = _Search(passes, x0, gates, candidates, climb, Found(*(tensor.clone() for tensor in found)))
    for restart in range(attack.restarts):
        search.climb_all(attack.start(x0, sample_index, seed, restart))
    return search.found


@dataclass(eq=False)
class _Search:
    """The arguments of :func:`worst_route` and what was found so far, which it writes to."""

    passes: Passes
    x0: Tensor
    gates: CleanGates
    candidates: Sequence[Tensor]
    climb: Callable[[Passes, Tensor, Tensor, Goal], Found]
    found: Found

    def climb_all(self, start: Tensor) -> None:
        """To every candidate of every layer, and to the most harmful ones joined."""
        layers = range(len(self.candidates))
        none = torch.full_like(self.gates.ranked[0][:, :1], -1).expand(-1, len(layers))  # [B, L]
        alone = none.clone()
        self._try(start, [(layer, rank) for layer in layers for rank in range(self._width(layer))], none, alone)
        held = none.clone()
        held[:, 0] = alone[:, 0]
        for layer in layers[1:]:
            self._try(start, [(layer, rank) for rank in range(self._width(layer))], held.clone(), held)

    def _width(self, layer: int) -> int:
        return self.candidates[layer].shape[1]

    def _try(self, start: Tensor, trials: list[tuple[int, int]], held: Tensor, worst: Tensor) -> None:
        """Climb to the candidate of each (layer, rank) while the other layers are held; write the most harmful into
        that layer's column of ``worst`` [B, L]."""
        passes, y = self.passes, self.passes.y
        left = torch.arange(len(y), device=y.device)
        harm = torch.full_like(worst, -torch.inf, dtype=torch.float64)
        while trials:
            if passes.reads:
                left = (~self.found.fooled).nonzero()[:, 0]
                if not len(left):
                    return
            together = trials[: max(passes.room // max(len(left), 1), 1)]
            trials = trials[len(together) :]
            goals = []
            for layer, rank in together:
                experts = held[left]
                experts[:, layer] = self.candidates[layer][left, rank]
                goals.append(experts)
            times = len(together)
            goal = Goal(torch.cat(goals), self.gates.spread[left].repeat(times, 1))
            starts, clean = (torch.cat([images[left]] * times) for images in (start, self.x0))
            every = self.climb(replace(passes, y=y[left].repeat(times)), starts, clean, goal)
            parts = zip(*(tensor.split(len(left)) for tensor in every), strict=True)
            for (layer, rank), part in zip(together, map(Found._make, parts), strict=True):
                old = Found(*(tensor[left] for tensor in self.found))
                for whole, new in zip(self.found, merge(old, part), strict=True):
                    whole[left] = new
                more = part.loss.double() > harm[left, layer]
                harm[left, layer] = torch.where(more, part.loss.double(), harm[left, layer])
                worst[left, layer] = torch.where(more, self.candidates[layer][left, rank], worst[left, layer])
