"""Steering: every expert that a hard route could choose is attacked, also those that it does not choose now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust_moe.attacks.base import MOST_RESTARTS, MOST_STEPS, Found, expect_length, expect_number
from robust_moe.attacks.losses import LOSSES
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.pgd import PGD
from robust_moe.attacks.route_search import worst_route
from robust_moe.attacks.routes import (
    CUSHION,
    CleanGates,
    Goal,
    expect_routes,
    leads,
    record_clean,
    routed_layers,
    routes_tried,
    soft_gates,
)
from robust_moe.attacks.steps import StepAttack, keep_worse
from robust_moe.attacks.table import ATTACKS
from robust_moe.settings import setting
from robust_moe.tokens import mean_of_tokens, most_tokens
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import MoELayer, rerouted
from robust_moe_kernels.ops.attack_step import pgd_step

__all__ = ["Steering"]


@ATTACKS.register("steering")
class Steering(PGD):
    """PGD, and then for each expert a climb that drives the gate to it and attacks the classification through it.

    A hard route is a step in the loss: PGD and AutoAttack climb through the experts that are chosen at the moment, and
    see nothing of a wrong one on the other side of the gate's plane. J-TLGA (arXiv:2602.01369) attacks gate and loss
    together for the same reason; here the route to each expert is a problem of its own, and every image keeps the worst
    answer. Images are scored on the whole model, which routes them.

    The first half of a climb's steps raises the lead of the expert (:func:`~robust_moe.attacks.routes.route_lead`, in
    units of the spread, over the experts, of the gate's logits at the clean image) until the expert is selected by a
    lead of ``CUSHION``, and the classification loss where that is so. The second half raises the classification loss
    where the image is sent to the expert, and ``route_weight`` times what is missing of that lead, so that an image
    that was lost to another expert is driven back. All iterates are judged. Layers take turns, and are then joined
    greedily (:func:`~robust_moe.attacks.route_search.worst_route`). For k > 1 the expert is to be among the selected;
    the weight that it has there is something that the loss has a gradient to. Where a routing rule of evaluation
    replaces the gate's choice (:mod:`robust_moe.models.inference`), an expert counts as selected where the rule gives
    it weight, or might have drawn it.

    Of a layer that routes tokens all tokens of an image are driven at once, each to the expert of one rank in its own
    ranking: to the first choices, the second ones, and so on. The lead is the mean over the tokens, each counted up to
    ``CUSHION``, and the image is where it is driven to if more than half of its tokens are.

    PGD comes first, with the same settings and starts, and its images are replaced by worse ones only: this attack is
    never weaker. Where no gate has a choice (a dense model, k = E without such a rule, a fixed expert, routes that the
    caller imposes) it is PGD, and warns. Of two members of a dual model the layers of both are steered.

    Args:
        eps: radius of the ball, >= 0, pixels being in [0, 1].
        steps: gradient steps of each climb, >= 0.
        routes: experts of each layer to steer to, >= 1: the first in the ranking of its gate at the clean image, the
            selected ones first of all; None, and of a layer with fewer experts: all.
        experts: numbers of the experts to steer to, tokens all to the same, instead of the first ``routes``.
        route_weight: λ >= 0, of the lead that is missing.
        soft_gradient: let the loss see a hard choice as the soft mixture in the backward pass
            (:class:`~robust_moe_kernels.modules.SoftGradient`); runs all E experts.
        alpha: step size, >= 0; None: ``2.5 * eps / steps`` for PGD and twice that for the climbs to the experts, each
            of whose halves can then cross the ball.
        norm, random_start, restarts, seed, eot_iter, mode, graph: see :class:`~robust_moe.attacks.pgd.PGD`; only PGD's
            own steps run as a graph.
        loss: ``"ce"``, ``"margin"`` or ``"dlr"``.

    Raises:
        ValueError: a setting out of its range; when called, an expert that a layer does not have, or a layer that the
            model's forward does not reach.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(StepAttack.Config):
        """Settings of steering."""

        steps: int = setting(40, "gradient steps towards and through each expert", at_least=0, at_most=MOST_STEPS)
        alpha: Fraction | None = setting(
            None, "step size, as eps; null: 2.5 * eps / steps for PGD, 5 * eps / steps to the experts", at_least=0
        )
        random_start: bool = setting(True, "start uniformly inside the ball")
        restarts: int = setting(1, "independent starts; each sample keeps its worst", at_least=1, at_most=MOST_RESTARTS)
        loss: Literal["ce", "margin", "dlr"] = setting("ce", "what is raised through the expert")
        routes: int = setting(
            8, "experts of each layer to steer to, the gate's first choices; at most E", at_least=1, at_most=1024
        )
        route_weight: float = setting(1.0, "of the lead that the expert's gate logit misses", at_least=0)
        soft_gradient: bool = setting(False, "a hard choice has the soft mixture's gradient; runs all experts")

    losses = tuple(LOSSES)

    def __init__(
        self,
        eps: float,
        steps: int = 40,
        alpha: float | None = None,
        norm: str = "Linf",
        random_start: bool = True,
        restarts: int = 1,
        seed: int = 0,
        *,
        loss: str = "ce",
        routes: int | None = 8,
        experts: Sequence[int] | None = None,
        route_weight: float = 1.0,
        soft_gradient: bool = False,
        eot_iter: int = 1,
        mode: str = "eval",
        graph: str | bool = "auto",
    ) -> None:
        options: dict[str, Any] = {"loss": loss, "eot_iter": eot_iter, "mode": mode, "graph": graph}
        super().__init__(eps, steps, alpha, norm, random_start, restarts, seed, **options)
        expect_routes(routes)
        expect_length("route_weight", route_weight)
        self.routes = routes
        expect(experts is None or len(experts) > 0, "experts", "at least one expert, or None", experts)
        self.experts = None if experts is None else tuple(experts)
        for number, expert in enumerate(self.experts or ()):
            expect_number(f"experts[{number}]", expert, Integral)
            expect(expert >= 0, f"experts[{number}]", "a number >= 0", expert)
        self.route_weight = float(route_weight)
        self.soft_gradient = soft_gradient
        self.climb_alpha = 2.5 * self.eps / max(steps // 2, 1) if alpha is None else self.alpha

    @property
    def passes(self) -> tuple[int, int]:
        """(forwards, backwards) of a sample that nothing fools, on a model with one layer of at least ``routes``
        experts (None: of one): the most for one layer. :meth:`most_passes` knows other models."""
        return self._most([(self.routes or 1) if self.experts is None else len(self.experts)])

    def most_passes(self, model: nn.Module) -> tuple[int, int]:
        return self._most([self._count(layer) for layer in self.steered(model)])

    def _most(self, counts: list[int]) -> tuple[int, int]:
        forwards, backwards = super().passes
        if not counts:
            return forwards, backwards
        climbs = self.restarts * (sum(counts) + sum(counts[1:]))  # alone, and joined
        steps = climbs * self.steps * self.eot_iter
        return 2 + forwards + steps + climbs, backwards + steps  # the clean images, and what PGD made of them, are seen

    def _count(self, layer: MoELayer) -> int:
        return routes_tried(self.routes, layer.num_experts) if self.experts is None else len(self.experts)

    def steered(self, model: nn.Module) -> list[MoELayer]:
        """The layers of ``model`` that choose among experts, and whose choice the caller does not replace.

        Raises:
            ValueError: one that lacks an expert of ``experts``.
        """
        layers = [layer for layer in routed_layers(model, self.mode == "train") if layer.reroute is None]
        for layer in layers:
            for number, expert in enumerate(self.experts or ()):
                expected = f"an expert below {layer.num_experts}, as the layer has them"
                expect(expert < layer.num_experts, f"experts[{number}]", expected, expert)
        return layers

    def run(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Tensor:
        layers = self._steered_or_warned(passes.model)
        if not layers:
            return super().run(passes, x0, sample_index, seed)
        return self._steer(layers, passes, x0, sample_index, seed).images

    def search(self, passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int) -> Found:
        """Costs no forward more than :meth:`run` where there is something to steer."""
        layers = self._steered_or_warned(passes.model)
        if not layers:
            images = super().run(passes, x0, sample_index, seed)
            return Found(images, *passes.score(images))
        return self._steer(layers, passes, x0, sample_index, seed)

    def _steered_or_warned(self, model: nn.Module) -> list[MoELayer]:
        layers = self.steered(model)
        if not layers:
            warnings.warn("Steering: the model has no gate with a choice to steer; this is PGD", stacklevel=2)
        return layers

    def _steer(
        self, layers: list[MoELayer], passes: Passes, x0: Tensor, sample_index: Tensor | None, seed: int
    ) -> Found:
        images = super().run(passes, x0, sample_index, seed)
        found = Found(images, *passes.score(images))
        record_clean(passes, x0)
        gates = CleanGates.of(layers, len(x0))
        candidates = [ranked[:, :, : self.routes] for ranked in gates.ranked]
        if self.experts is not None:
            chosen = passes.y.new_tensor(self.experts)
            candidates = [chosen.expand(*ranked.shape[:2], -1) for ranked in gates.ranked]
        with rerouted(passes.model, soft_gates(passes.model) if self.soft_gradient else {}):
            climb = _Climb(self, layers)
            return worst_route(self, passes, x0, sample_index, seed, gates, candidates, climb, found)


class _Climb:
    """One climb of many images, each to its own goal."""

    def __init__(self, attack: Steering, layers: list[MoELayer]) -> None:
        self.attack, self.layers = attack, layers

    def __call__(self, passes: Passes, x: Tensor, x0: Tensor, goal: Goal) -> Found:
        attack, worst = self.attack, None
        drive, through = (replace(passes, loss=loss, extras=goal.extras()) for loss in (self._drive, self._through))
        for done in range(attack.steps):
            seen = (drive if done < attack.steps // 2 else through).examine(x)
            loss = attack.loss(seen.logits, passes.y)
            worst = keep_worse(worst, Found(x, passes.fooled(seen.logits), loss))
            nonfinite = passes.tally.nonfinite
            x = pgd_step(x, seen.grad, x0, attack.eps, attack.climb_alpha, norm=attack.norm, nonfinite=nonfinite)
        passes.tally.settle()
        return keep_worse(worst, Found(x, *passes.score(x)))

    def _drive(self, logits: Tensor, y: Tensor, *goal: Tensor) -> Tensor:
        lead, there = self._leads(goal, lambda lead: lead >= CUSHION)
        return torch.where(there, self.attack.loss(logits, y), lead)

    def _through(self, logits: Tensor, y: Tensor, *goal: Tensor) -> Tensor:
        lead, there = self._leads(goal, lambda lead: lead > 0)
        return torch.where(there, self.attack.loss(logits, y), 0.0) + self.attack.route_weight * lead

    def _leads(self, goal: tuple[Tensor, ...], is_there: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(sum over the layers of the lead, at most ``CUSHION`` each; whether each of them sends the image there), [B]
        each; ``is_there``: of a token, from its lead."""
        each = [lead.clamp_max(CUSHION) for lead in leads(self.layers, Goal.of_extras(*goal))]
        there = torch.stack([most_tokens(is_there(lead)) for lead in each], 1).all(1)
        return torch.stack([mean_of_tokens(lead) for lead in each], 1).sum(1), there
