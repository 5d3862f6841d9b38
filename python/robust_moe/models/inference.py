"""Routing rules for evaluation, which replace a layer's own rule of training; the table of them.

A rule is a :class:`~robust_moe_kernels.modules.Reroute`: from a layer's options and its gate's decision to experts and
weights. It holds in eval mode, and so for every attack made in eval mode, which sees the gradient that the rule leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust_moe.settings import Config, ConfigError, Table, setting
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import Reroute, RouteOptions, RoutingRecord

__all__ = ["INFERENCE_ROUTINGS", "InferenceConfig", "MarginSoft", "RandomTop"]

INFERENCE_ROUTINGS = Table("inference routing")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Config):
    """What the section of an inference routing may be: none, or the ``Config`` of a rule."""

    table: ClassVar[Table] = INFERENCE_ROUTINGS

    def build(self) -> Reroute | None:
        """The rule; None: layers route in evaluation as in training."""
        return None

    def expect_fits(self, num_experts: int) -> None:
        """Raise :class:`ConfigError` unless layers of so many experts can route by the rule."""


@INFERENCE_ROUTINGS.register("none")
class NoRule:
    """Layers route in evaluation as in training."""

    @dataclass(frozen=True, kw_only=True)
    class Config(InferenceConfig):
        """No settings."""


@dataclass(frozen=True, kw_only=True)
class _TopConfig(InferenceConfig):
    """Of rules over the experts that the gate ranks first."""

    top: int = setting(2, "m, experts that the gate ranks first and the rule chooses from", at_least=2)

    def build(self) -> Reroute | None:
        return type(self).owner(**self.own_arguments(InferenceConfig))

    def expect_fits(self, num_experts: int) -> None:
        if self.top > num_experts:
            raise ConfigError(f"inference.top: expected 2 <= m <= {num_experts}, got {self.top}")


@INFERENCE_ROUTINGS.register("margin_soft")
@dataclass(frozen=True)
class MarginSoft:
    """The best expert alone where the gate is sure; where others come within τ of it, a mixture.

    With the scores s_1 >= s_2 >= ... of the gate's softmax, expert i of the first m gets the weight

    w_i = r_i / Σ_j r_j,  r_i = max(0, 1 − (s_1 − s_i) / τ).

    Two experts at a tie have a half each; at a margin of τ the first has all. So the layer, m = E, is a continuous
    function of its scores, which a hard choice is not, and has a gradient in them wherever more than one expert counts;
    with m < E it jumps where the m-th and the next change places with a weight above 0. Nothing is drawn. All m experts
    run for every image, and the layer's record lists them, those beyond τ with weight 0.

    Ours. It replaces top_k and the weighting of the layer.

    Args:
        threshold: τ in (0, 1], a difference of scores.
        top: m >= 2.

    Raises:
        ValueError: an argument out of range.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(_TopConfig):
        """Settings of margin-soft routing."""

        threshold: float = setting(
            0.2, "tau, margin of the gate's scores from which the best expert is alone", above=0, at_most=1
        )

    threshold: float = 0.2
    top: int = 2

    def __post_init__(self) -> None:
        expect(0 < self.threshold <= 1, "threshold", "a number in (0, 1]", self.threshold)
        _expect_top(self.top)

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        scores, indices = _first(record, self.top)
        near = (1 - (scores[:, :1] - scores) / self.threshold).clamp_min(0)
        return indices, near / near.sum(1, keepdim=True)


@INFERENCE_ROUTINGS.register("random_top")
@dataclass(frozen=True)
class RandomTop:
    """One expert, drawn anew in every forward from the m that the gate ranks first, with probabilities p proportional
    to their scores; its weight is 1.

    The weight's gradient is that of log p, so the mean over draws of the output's gradient is the gradient of the mean
    output Σ p_i e_i(x). A single draw misleads an attack: average over some (``eot_iter`` of the attack, ``--preset
    rand``; Athalye et al., 2018, arXiv:1802.00420), and expect the flag ``randomised_output``. Draws come from
    PyTorch's global generator of the device.

    Ours. It replaces top_k and the weighting of the layer.

    Args:
        top: m >= 2.

    Raises:
        ValueError: an argument out of range.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(_TopConfig):
        """Settings of randomised routing."""

    top: int = 2

    def __post_init__(self) -> None:
        _expect_top(self.top)

    def __call__(self, options: RouteOptions, record: RoutingRecord) -> tuple[Tensor, Tensor]:
        scores, indices = _first(record, self.top)
        waits = torch.empty_like(scores.detach()).exponential_().clamp_min(torch.finfo(scores.dtype).tiny)
        drawn = (scores.detach() / waits).argmax(1, keepdim=True)  # the shortest wait, at rates that are the scores
        chance = (scores / scores.sum(1, keepdim=True)).gather(1, drawn).log()
        return indices.gather(1, drawn), 1 + (chance - chance.detach())

    def mean_weights(self, options: RouteOptions, record: RoutingRecord) -> Tensor:
        """p of the experts that may be drawn, 0 of the others, [B, E]."""
        scores, indices = _first(record, self.top)
        chances = (scores / scores.sum(1, keepdim=True)).detach()
        return torch.zeros_like(record.scores).scatter(1, indices, chances)


def _expect_top(top: int) -> None:
    expect(top >= 2, "top", "m >= 2", top)


def _first(record: RoutingRecord, top: int) -> tuple[Tensor, Tensor]:
    """(scores, experts) [B, m] that the gate ranks first, ties to the lowest index as in the gate; all where there are
    fewer, as after pruning."""
    indices = record.logits.detach().sort(dim=1, descending=True, stable=True).indices[:, :top]
    return record.scores.gather(1, indices), indices
