"""Attacks on mixtures of experts that climb the classification: through the experts (RA-E), and by the soft mixture.

RA-E is PGD on another model. It and RA-R (:mod:`robust_moe.attacks.router`) are metrics of Zhang et al. (ICML 2025,
"Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach"), which leaves the attacks open; the
definitions here are ours. Whatever an attack climbs, its images are scored on the whole model, which routes them anew.

They work on every model in which ``moe_layers`` finds a layer, be its experts blocks, convolutions or whole networks.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from torch import Tensor

from robust_moe.attacks.losses import LOSSES
from robust_moe.attacks.passes import Passes
from robust_moe.attacks.pgd import PGD
from robust_moe.attacks.routes import eval_rule, record_clean
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import AllExperts, DrawnReroute, FixedRoutes, last_routes, moe_layers, rerouted

__all__ = ["ExpertPGD", "MoEAttack", "TransferPGD"]


class MoEAttack(PGD):
    """What the attacks on mixtures share: PGD after one forward of the clean images, which shows their routes.

    Args:
        eps, steps, alpha, norm, random_start, restarts, seed, loss, eot_iter, mode, graph: see
            :class:`~robust_moe.attacks.pgd.PGD`; the loss is ``"ce"``, ``"margin"`` or ``"dlr"``.

    Raises:
        ValueError: a setting out of its range; when called, a model without mixture-of-experts layers, or with
            one that its forward does not reach.
    """

    losses = tuple(LOSSES)

    def __init__(
        self,
        eps: float,
        steps: int,
        alpha: float | None = None,
        norm: str = "Linf",
        random_start: bool = True,
        restarts: int = 1,
        seed: int = 0,
        *,
        loss: str = "ce",
        eot_iter: int = 1,
        mode: str = "eval",
        graph: str | bool = "auto",
    ) -> None:
        options: dict[str, Any] = {"loss": loss, "eot_iter": eot_iter, "mode": mode, "graph": graph}
        super().__init__(eps, steps, alpha, norm, random_start, restarts, seed, **options)

    @property
    def passes(self) -> tuple[int, int]:
        forwards, backwards = super().passes
        return forwards + 1, backwards

    def prepare(self, passes: Passes, x0: Tensor) -> Passes:
        expect(len(moe_layers(passes.model)) > 0, "model", "at least one mixture-of-experts layer", "none")
        record_clean(passes, x0)
        return self.routed(passes)

    @abstractmethod
    def routed(self, passes: Passes) -> Passes:
        """``passes`` with ``loss`` and ``extras`` after the forward of the clean images.

        Tensors of the batch go into ``extras`` and nowhere else, and the loss is a bound method: so the steps can be
        captured once and replayed for other batches (:mod:`robust_moe.attacks.graph`).
        """


class ExpertPGD(MoEAttack):
    """RA-E: the routes are held as they were at the clean image while PGD climbs through the chosen experts.

    Args:
        freeze_weights: the gate's weights are held too, so that no gradient reaches a gate and only the experts are
            attacked; ``False``: the experts are held, their weights follow the gate; not where an expert's room is
            limited, and tokens that it has none for keep the weight 0. Of a routing rule of evaluation
            that draws its experts the mean weights over the draws are held.
        others: see :class:`MoEAttack`.
    """

    def __init__(self, eps: float, steps: int, *args: Any, freeze_weights: bool = True, **settings: Any) -> None:
        super().__init__(eps, steps, *args, **settings)
        self.freeze_weights = freeze_weights

    def routed(self, passes: Passes) -> Passes:
        layers, extras = moe_layers(passes.model), list[Tensor]()
        for name, route in last_routes(passes.model).items():
            layer = layers[name]
            free = layer.reroute is None and layer.fixed_expert is None
            rule = eval_rule(layer, layer.training) if free else None
            if not self.freeze_weights:
                expected = "True where a routing rule of evaluation weighs the experts"
                expect(rule is None, "freeze_weights", expected, f"False with {rule!r} in layer {name!r}")
                full = layer.last_routing().dropped is not None  # held experts would take what they had no room for
                expected = "True where experts have no room for some tokens"
                expect(not full, "freeze_weights", expected, f"False with a capacity in layer {name!r}")
                extras.append(route.indices)
            elif isinstance(rule, DrawnReroute):
                mean = rule.mean_weights(layer.route_options, layer.last_routing())
                extras += mean.sort(dim=1, descending=True, stable=True)[::-1]
            else:
                assert route.weights is not None
                extras += [route.indices, route.weights]
        return replace(passes, loss=self._loss, extras=tuple(extras))

    def _loss(self, logits: Tensor, y: Tensor, *_: Tensor) -> Tensor:
        return self.loss(logits, y)

    def climb(self, passes: Passes, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        size = 2 if self.freeze_weights else 1
        names = moe_layers(passes.model)
        held = [passes.extras[i : i + size] for i in range(0, len(passes.extras), size)]
        with rerouted(passes.model, {name: FixedRoutes(*route) for name, route in zip(names, held, strict=True)}):
            return super().climb(passes, x, x0)


class TransferPGD(PGD):
    """PGD that climbs the soft mixture of all experts, which has a gradient through its gates; its images are for the
    model itself, whose hard choice has none. Arguments: see :class:`~robust_moe.attacks.pgd.PGD`."""

    def climb(self, passes: Passes, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        free = [name for name, layer in moe_layers(passes.model).items() if layer.reroute is None]
        with rerouted(passes.model, dict.fromkeys(free, AllExperts())):
            return super().climb(passes, x, x0)
