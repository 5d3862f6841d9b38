"""Attacks that mixtures of experts are trained against: on a model and its second expert, on a model and its routes.

Both are PGD with a loss that compares with the clean image. What belongs to a batch goes through ``passes.extras`` and
the loss is a bound method, so that the steps can be captured once and replayed (:mod:`robust_moe.attacks.graph`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import PGD, Counts, attack_mode
from robust_moe.attacks.losses import cross_entropy, kl_divergence
from robust_moe.attacks.passes import Passes
from robust_moe.tokens import mean_of_tokens, of_images
from robust_moe_kernels.modules import MoELayer, RouteOptions, moe_layers, rerouted
from robust_moe_kernels.modules.routing_record import RoutingRecord

__all__ = [
    "OneExpert",
    "RoutePGD",
    "SecondExpertPGD",
    "clean_second_experts",
    "gate_divergence",
    "gate_logits",
    "held",
    "second_experts",
]


@dataclass(frozen=True, eq=False)
class OneExpert:
    """A reroute: each row to one given expert with weight 1, as if the layer were that expert.

    index: int64 [N], of images or of their tokens; a forward of n times as many rows takes it n times over.
    """

    index: Tensor

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        index = self.index.repeat(len(record.scores) // len(self.index))[:, None]
        return index, torch.ones_like(index, dtype=record.weights.dtype)


def held(indices: Mapping[str, Tensor]) -> dict[str, OneExpert]:
    """:class:`OneExpert` for every layer named; what ``rerouted`` takes."""
    return {name: OneExpert(index) for name, index in indices.items()}


def second_experts(model: nn.Module) -> dict[str, Tensor]:
    """Each layer's second-ranked expert of each row, an image or a token, in the last forward, int64 [N], by the gate's
    logits without noise."""
    ranked = {
        name: layer.last_routing().clean_logits.detach().sort(dim=1, descending=True, stable=True).indices
        for name, layer in moe_layers(model).items()
    }
    return {name: indices[:, 1].contiguous() for name, indices in ranked.items()}


def clean_second_experts(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """:func:`second_experts` of ``images`` in eval mode; the model is left as found. One forward."""
    with attack_mode(model), torch.no_grad():
        model(images)
        return second_experts(model)


class _BothModels(nn.Module):
    """[B, 2 * classes]: logits of a model, then its logits along imposed routes. ``counts`` grows by the passes of the
    second: whoever calls this module counts one."""

    def __init__(self, model: nn.Module, routes: Mapping[str, OneExpert], counts: Counts) -> None:
        super().__init__()
        self.model, self.routes, self.counts = model, routes, counts

    def forward(self, x: Tensor) -> Tensor:
        self.counts.add(Counts(len(x), len(x) if x.requires_grad else 0))
        logits = self.model(x)
        with rerouted(self.model, self.routes):
            return torch.cat([logits, self.model(x)], 1)


class SecondExpertPGD(PGD):
    """The inner maximum of RT-ER: CE(F(x'), y) + β KL(f_2(x') ‖ f_2(x)), f_2 being the expert ranked second at the
    clean x, held there while x' moves. In a model with several layers, f_2 takes the second expert in each.

    Costs two forwards and backwards a step, and two forwards before the first. Whoever scores its images scores them by
    this loss, and as fooled where F misclassifies them.

    Args:
        beta: β >= 0.
        settings: those of :class:`~robust_moe.attacks.PGD`; its ``loss`` is not used.
    """

    def __init__(self, *, beta: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.beta = beta

    @property
    def passes(self) -> tuple[int, int]:
        forwards, backwards = super().passes
        return 2 * forwards + 2, 2 * backwards

    def prepare(self, passes: Passes, x0: Tensor) -> Passes:
        with torch.no_grad():
            passes.logits(x0)
            second = second_experts(passes.model)
            with rerouted(passes.model, held(second)):
                clean = passes.logits(x0)
        return _paired(replace(passes, loss=self._objective, extras=(clean, *second.values())))

    def fooled(self, logits: Tensor, y: Tensor) -> Tensor:
        """Of the logits of both."""
        return super().fooled(logits.chunk(2, 1)[0], y)

    def climb(self, passes: Passes, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        return super().climb(_paired(passes), x, x0)

    def _climb(self, passes: Passes, x: Tensor, x0: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(passes.model, _BothModels)  # see prepare
        return super()._climb(replace(passes, model=passes.model.model), x, x0)  # graphs are kept by model

    def _objective(self, both: Tensor, y: Tensor, clean: Tensor, *_: Tensor) -> Tensor:
        logits, second = both.chunk(2, 1)
        return cross_entropy(logits, y) + self.beta * kl_divergence(clean, second)


def _paired(passes: Passes) -> Passes:
    """``passes`` of a model, on the model and its second experts, which are in the extras."""
    second = dict(zip(moe_layers(passes.model), passes.extras[1:], strict=True))
    return replace(passes, model=_BothModels(passes.model, held(second), passes.tally.counts))


def gate_logits(model: nn.Module) -> tuple[Tensor, ...]:
    """Each layer's gate logits [N, E] of the last forward, on its graph."""
    return tuple(layer.last_routing().logits for layer in moe_layers(model).values())


def gate_divergence(logits: tuple[Tensor, ...], clean: tuple[Tensor, ...], images: int) -> Tensor:
    """Sum over the layers of KL(softmax(clean) ‖ softmax(logits)), of tokens the mean over those of an image, [B];
    ``clean`` is a constant, ``images`` is B."""
    rows = [kl_divergence(one, other.detach()) for one, other in zip(logits, clean, strict=True)]
    layers = [mean_of_tokens(of_images(each, images)) for each in rows]
    return sum(layers[1:], layers[0])


class RoutePGD(PGD):
    """AdvMoE's attack: KL(F(x) ‖ F(x')) + Σ KL(r(x) ‖ r(x')) over the layers' routing scores r, clean sides constant.

    Args:
        predictions: whether the model's divergence is raised too; ``False``: the routes' alone.
        settings: those of :class:`~robust_moe.attacks.PGD`; with a random start, as the gradient at the image is zero.
    """

    def __init__(self, *, predictions: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.predictions = predictions

    @property
    def passes(self) -> tuple[int, int]:
        forwards, backwards = super().passes
        return forwards + 1, backwards

    def prepare(self, passes: Passes, x0: Tensor) -> Passes:
        with torch.no_grad():
            clean = passes.logits(x0)
        layers = _Gates(passes.model, self.predictions)
        return replace(passes, loss=layers.objective, extras=(clean, *gate_logits(passes.model)))


class _Gates:
    """The gates of a model under attack; reads each layer's record of the forward just made."""

    def __init__(self, model: nn.Module, predictions: bool) -> None:
        self.layers: list[MoELayer] = list(moe_layers(model).values())
        self.predictions = predictions

    def objective(self, logits: Tensor, y: Tensor, clean: Tensor, *gates: Tensor) -> Tensor:
        now = tuple(layer.last_routing().logits for layer in self.layers)
        route = gate_divergence(now, gates, len(y))
        return kl_divergence(logits, clean) + route if self.predictions else route
