"""Attacks on the router of a mixture of experts (RA-R), and on it and the classification at once.

Both are PGD on another loss, which reads the gates; the images are scored on the whole model, as those of
:mod:`robust_moe.attacks.moe` are.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks.base import Found, expect_length
from robust_moe.attacks.moe import MoEAttack
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.route_search import worst_route
from robust_moe.attacks.routes import (
    CUSHION,
    CleanGates,
    Goal,
    expect_routes,
    fewest_chosen,
    full,
    leads,
    routed_layers,
    routes_tried,
    soft_gates,
)
from robust_moe.tokens import capped_mean
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer, rerouted

__all__ = ["JointPGD", "RouterAttack", "RouterPGD", "router_margin"]


def router_margin(logits: Tensor, selected: Tensor, cushion: float = 0.0) -> Tensor:
    """How far a gate is from giving up one more of the experts it had selected, [N].

    Pair the selected experts, weakest first, with the others, strongest first: as many selected experts have fallen
    behind as there are pairs in which the other is ahead. The margin is the lead of the other in the first pair that is
    not ahead by more than ``cushion``, or in the last pair. So one expert after the other is pushed out, the easiest
    first, and none is let in again. For one selected expert this is the margin loss of Carlini and Wagner with the
    expert as the class. Where all are selected no expert can leave: 0, without a gradient.

    Args:
        logits: [N, E], any floating dtype; computed in fp32 at least.
        selected: the experts selected on the clean images, int64 [N, k], or bool [N, E] where their number differs
            between rows.
        cushion: >= 0, in units of the logits.
    """
    h = full(logits)
    mask = selected.dtype == torch.bool
    chosen = selected if mask else torch.zeros_like(h, dtype=torch.bool).scatter(1, selected, True)
    most = max(h.shape[1] // 2, 1)  # pairs; the lead of one that an image does not have is -infinity
    weakest = h.masked_fill(~chosen, torch.inf).topk(most, dim=1, largest=False).values
    strongest = h.masked_fill(chosen, -torch.inf).topk(most, dim=1).values
    lead = strongest - weakest  # falls from pair to pair
    count = chosen.sum(1, keepdim=True)
    pairs = torch.minimum(count, h.shape[1] - count)
    first = torch.minimum((lead.detach() > cushion).sum(1, keepdim=True), pairs - 1).clamp_min(0)
    return torch.where(pairs > 0, lead.gather(1, first), 0.0)[:, 0]


class RouterAttack(MoEAttack):
    """An attack whose loss reads the gates.

    The router's loss is the sum over the layers of :func:`router_margin`, each layer's in units of the spread (the
    standard deviation over the experts) of its logits at the clean image, so that a layer with large logits does not
    outweigh the others, and with a cushion of ``CUSHION`` such units. Of a layer that routes tokens it is the mean over
    an image's tokens, each in units of its own spread and counted up to ``CUSHION``: a token that has lost all that it
    can lose adds nothing more. Where a routing rule of evaluation replaces the
    gate's choice, the selected experts are those that it gives weight to, or might have drawn; where it does so to all,
    the gate's first alone. Layers with k = E and no such rule, or a fixed expert, cannot be rerouted and add nothing.

    Args:
        soft_gradient: let the classification loss, and the gates of later layers, see a hard choice of experts as the
            soft mixture in the backward pass (:class:`~robust_moe_kernels.modules.SoftGradient`); runs all E experts.
            Layers whose routes the caller imposes are left alone.
        others: see :class:`MoEAttack`.
    """

    def __init__(self, eps: float, steps: int, *args: Any, soft_gradient: bool = False, **settings: Any) -> None:
        super().__init__(eps, steps, *args, **settings)
        self.soft_gradient = soft_gradient

    @abstractmethod
    def objective(self, logits: Tensor, y: Tensor, router: Tensor) -> Tensor:
        """Loss of each sample [B] from the logits, the labels and the router's loss [B]."""

    def routed(self, passes: Passes) -> Passes:
        gates = _Gates(self, routed_layers(passes.model, passes.mode == "train"))
        return replace(passes, loss=gates.loss, extras=gates.clean(len(passes.y)))

    def climb(self, passes: Passes, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        with rerouted(passes.model, soft_gates(passes.model) if self.soft_gradient else {}):
            return super().climb(passes, x, x0)


class RouterPGD(RouterAttack):
    """RA-R: PGD on the router's loss alone, which pushes the experts selected at the clean image out of the top k.

    The labels only decide who is fooled, which tells restarts apart.

    Args:
        targeted: drive each layer's gate to every other expert in turn, the nearest in its ranking first, and then the
            layers jointly (:func:`~robust_moe.attacks.route_search.worst_route`), by the lead of that expert over the
            k-th best of the others; tokens all at once, each to the expert of that rank among its own others, by the
            mean of their leads, counted up to ``CUSHION``. Each image keeps what is misclassified, else the highest
            loss.
        routes: experts of each layer that ``targeted`` tries, >= 1; None, and of a layer with fewer others: all.
        others: see :class:`RouterAttack`.
    """

    def __init__(
        self, eps: float, steps: int, *args: Any, targeted: bool = False, routes: int | None = 8, **settings: Any
    ) -> None:
        super().__init__(eps, steps, *args, **settings)
        expect(isinstance(targeted, bool), "targeted", "True or False", repr(targeted))
        expect_routes(routes)
        self.each_expert = targeted  # "targeted" is PGD's, of labels
        self.routes = routes

    @property
    def passes(self) -> tuple[int, int]:
        """(forwards, backwards); with ``targeted`` of a sample that nothing fools, on a model with one layer that has
        ``routes`` experts to spare: the most for one layer. None counts as one expert: the model is not known."""
        if not self.each_expert:
            return super().passes
        return self._most([self.routes or 1])

    def most_passes(self, model: nn.Module) -> tuple[int, int]:
        if not self.each_expert:
            return super().most_passes(model)
        layers = routed_layers(model, self.mode == "train")
        spare = [layer.num_experts - fewest_chosen(layer, self.mode == "train") for layer in layers]
        return self._most([routes_tried(self.routes, count) for count in spare] or [1])

    def _most(self, counts: list[int]) -> tuple[int, int]:
        climbs = self.restarts * (sum(counts) + sum(counts[1:]))  # alone, and joined
        return 1 + climbs * (self.steps * self.eot_iter + 1), climbs * self.steps * self.eot_iter

    def routed(self, passes: Passes) -> Passes:
        """With ``targeted`` the labels' loss, which tells experts apart; the climbs have the gate's."""
        return passes if self._targets(passes) else super().routed(passes)

    def _targets(self, passes: Passes) -> list[MoELayer]:
        return routed_layers(passes.model, passes.mode == "train") if self.each_expert else []

    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        layers = self._targets(passes)
        if not layers:
            return super().run(passes, x0, sample_index, seed)
        gates = CleanGates.of(layers, len(x0))  # the last forward was that of the clean images, in prepare
        candidates = [experts[:, :, : self.routes] for experts in gates.others()]
        nothing = passes.y.new_zeros(len(x0), dtype=torch.bool), gates.spread[0].new_full((len(x0),), -torch.inf)
        found = Found(x0, *nothing)

        def climb(passes: Passes, x: Tensor, x0: Tensor, goal: Goal) -> Found:
            (x, *_) = self.climb(replace(passes, loss=lead, extras=goal.extras()), x, x0)
            return Found(x, *passes.score(x))

        def lead(logits: Tensor, y: Tensor, *goal: Tensor) -> Tensor:
            each = [capped_mean(lead, CUSHION) for lead in leads(layers, Goal.of_extras(*goal))]
            return torch.stack(each, 1).sum(1)

        return worst_route(self, passes, x0, sample_index, seed, gates, candidates, climb, found).images

    def objective(self, logits: Tensor, y: Tensor, router: Tensor) -> Tensor:
        return router


class JointPGD(RouterAttack):
    """The route-aware attack: PGD on the classification loss plus ``router_weight`` times the router's.

    Where routes do not matter, the router's share of the step is lost, and the attack is weaker than plain PGD: judge a
    model by the worst case of the two, as the evaluations of :mod:`robust_moe.evaluation` do, which have both from the
    same starts; so this attack does not pay for the other a second time.

    Args:
        router_weight: λ >= 0.
        soft_gradient, others: see :class:`RouterAttack`.
    """

    def __init__(
        self,
        eps: float,
        steps: int,
        *args: Any,
        router_weight: float = 1.0,
        soft_gradient: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(eps, steps, *args, soft_gradient=soft_gradient, **settings)
        expect_length("router_weight", router_weight)
        self.router_weight = float(router_weight)

    def objective(self, logits: Tensor, y: Tensor, router: Tensor) -> Tensor:
        return self.loss(logits, y) + self.router_weight * router


class _Gates:
    """The gates of a model under attack. Reads each layer's record of the forward just made."""

    def __init__(self, attack: RouterAttack, layers: list[MoELayer]) -> None:
        self.attack, self.layers = attack, layers

    def clean(self, images: int) -> tuple[Tensor, ...]:
        """For each layer the experts selected, bool [B, T, E], and the spread of its logits, float64 [B, T], at the
        clean images, B = ``images`` of them."""
        gates = CleanGates.of(self.layers, images)
        return tuple(tensor for pair in zip(gates.chosen, gates.spread, strict=True) for tensor in pair)

    def loss(self, logits: Tensor, y: Tensor, *clean: Tensor) -> Tensor:
        # zero, but on the graph of the input: where no layer can be rerouted the gradient is zero and not missing.
        # Clamped, as 0 * infinity is NaN; the NaN of a logit stays, for the tally to see.
        router = (0 * logits.clamp(-1, 1)).sum(1)
        for layer, selected, spread in zip(self.layers, clean[::2], clean[1::2], strict=True):
            h = full(layer.last_routing().logits)
            rows = router_margin(h / spread.flatten()[:, None].to(h.dtype), selected.flatten(0, 1), CUSHION)
            router = router + capped_mean(rows.view_as(spread), CUSHION)
        return self.attack.objective(logits, y, router)
