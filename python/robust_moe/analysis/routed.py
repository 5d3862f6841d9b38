"""Routed layers inside a network: which experts a gate may choose over a set of images, with which weights.

A routed layer computes Σ_i w_i(x) e_i(x), the k experts with the highest gate logits h having a weight. Over a set of
images, bounds on the differences h_i − h_j say which experts are chosen at every image of the set, and which may be
chosen at some image; they bound the weights of all. Where both are the same k experts, the choice provably cannot
change on the set; elsewhere an expert's weight lies between 0 and its largest, which is sound too.

For any w⁰ and any c, if Σ_i w_i = 1,

    Σ_i w_i e_i = Σ_i w⁰_i e_i + (1 − Σ_i w⁰_i) c + Σ_i (w_i − w⁰_i)(e_i − c),

so the layer is an affine map of its experts, whose coefficients are numbers of each image, up to an error of at most
Σ_i |w_i − w⁰_i| |e_i − c|: backward relaxation passes it, and experts that agree cost the gate nothing. Where the
weights need not sum to 1, c = 0. No Lipschitz constant exists: the output jumps where the choice changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe.analysis.rounding import ABSOLUTE, UNDERFLOW, gamma

__all__ = ["Mix", "Mixed", "Weights", "relaxed_mix", "weight_bounds"]

_EXPONENT = 300.0  # e^300 is infinity as far as a sum that is no smaller than 1, and its inverse, go


@dataclass(frozen=True)
class Weights:
    """The weights [E] that a gate's logits, an earlier node [E], give its experts."""

    source: int
    top_k: int  # how many are not 0
    renormalize: bool  # divided by the sum over the chosen, not over all E


@dataclass(frozen=True)
class Mix:
    """The sum of the experts' outputs, earlier nodes of one shape, by their weights."""

    weights: int
    experts: tuple[int, ...]
    convex: bool  # the weights sum to 1


class Mixed(NamedTuple):
    """Σ_i w_i e_i lies within ``error`` of Σ_i coefficients_i e_i + ``lift``, for each number of the output."""

    coefficients: Tensor  # [B, E]
    lift: Tensor  # [B, ...]
    error: Tensor  # [B, ...]


def weight_bounds(lead: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """(lower, upper) bounds [B, E] of the weights over a set of images; both exactly 0 for an expert never chosen.

    A tie counts as undecided, whichever expert the gate would take.

    Args:
        lead: h_i − h_j is at least this for every image of the set, at [b, i, j]; float64 [B, E, E].
        top_k: k, 1 <= k <= E.
        renormalize: divide by the sum over the chosen experts; otherwise by that over all.
    """
    count = lead.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=lead.device)
    ahead = (lead > 0) & ~itself  # [i, j]: expert i is before j at every image
    always = (~(ahead | itself)).sum(2) < top_k  # fewer than k experts may be before it
    ever = ahead.sum(1) < top_k  # fewer than k experts are sure to be
    ever &= always | (always.sum(1, keepdim=True) < top_k)
    smallest = lead.clamp(-_EXPONENT, _EXPONENT).exp()  # of e^(h_i − h_j)
    largest = (-lead.transpose(1, 2)).clamp(-_EXPONENT, _EXPONENT).exp()
    rivals = ever[:, :, None] & ~itself  # [i, j]: expert i may be chosen beside j
    if renormalize:
        least = smallest.masked_fill(~rivals, torch.inf).topk(top_k - 1, 1, largest=False).values.sum(1)
        most = largest.masked_fill(~rivals, 0.0).topk(top_k - 1, 1).values.sum(1)
    else:
        least = smallest.masked_fill(itself, 0.0).sum(1)
        most = largest.masked_fill(itself, 0.0).sum(1)
    low = torch.where(always, 1 / (1 + most) - ABSOLUTE, 0.0).clamp_min(0)
    high = torch.where(ever, 1 / (1 + least) + ABSOLUTE, 0.0).clamp_max(1)
    return low, high


def relaxed_mix(centre: Tensor, radius: Tensor, low: Tensor, high: Tensor, convex: bool) -> Mixed:
    """The affine map that a routed layer is close to, and how close.

    Args:
        centre, radius: |w_i − centre_i| ≤ radius_i for all images of the set; [B, E], both 0 for one never chosen.
        low, high: ends of the experts' outputs, [B, E, ...]; float64 all.
        convex: the weights sum to 1.
    """
    ones = (1,) * (low.dim() - 2)
    away = radius.view(*radius.shape, *ones)
    size = torch.maximum(low.abs(), high.abs())
    if convex:
        out = ((centre + radius) == 0).view(*centre.shape, *ones)
        middle = (low.masked_fill(out, torch.inf).amin(1) + high.masked_fill(out, -torch.inf).amax(1)) / 2
        distance = torch.maximum(high - middle[:, None], middle[:, None] - low)
    else:
        middle, distance = torch.zeros_like(low[:, 0]), size
    sums = centre.sum(1).view(-1, *ones)
    n = low.shape[1] + 4
    error = (away * (distance + gamma(n) * (size + middle.abs()[:, None]))).sum(1) * (1 + gamma(n))
    error = error + gamma(n) * middle.abs() * (1 + sums) + UNDERFLOW
    return Mixed(centre, (1 - sums) * middle if convex else middle, error)
