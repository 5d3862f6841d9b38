"""Certified ℓ∞ radii in closed form, from margins and Lipschitz constants that the caller vouches for.

Setting. F(x) = Σ_i a_i(x) f_i(x), with f_i(x) and a(x) probabilities. For the label y and another class j, expert i has
the margin g_ij = f_i^y − f_i^j and the mixture the margin m_j = Σ_i a_i g_ij. Let, on a convex set D that contains x
(the whole space, or a ball around x), |g_ij(x') − g_ij(x)| ≤ L_ij ‖x' − x‖∞, |a_i(x') − a_i(x)| ≤ r_i ‖x' − x‖∞ and
|g_ij(x')| ≤ M_ij. Then for x' in D with ‖x' − x‖∞ ≤ ε

    m_j(x') − m_j(x) = Σ_i a_i(x) [g_ij(x') − g_ij(x)] + Σ_i [a_i(x') − a_i(x)] g_ij(x')
                     ≥ −ε Σ_i [a_i(x) L_ij + r_i M_ij]  =: −ε S_j,

so the prediction stays y as long as ε S_j < m_j(x) for every j ≠ y: the radius is min_j m_j(x) / S_j. As Σ_i a_i = 1
at x and at x', g_ij(x') in the second sum may be replaced by g_ij(x') − c_j for any constant c_j, and M_ij may bound
|g_ij − c_j| instead: experts that agree cost the router nothing.

L_ij belongs to the *margin*. With constants l_i of single classes, |f_i^c(x') − f_i^c(x)| ≤ l_i ‖x' − x‖∞, only
L_ij ≤ 2 l_i follows, and dividing by l_i itself claims up to twice the true radius.

Shapes: batch B, experts E, and J = classes − 1 columns, one for each class but the label, as
:func:`~robust_moe.analysis.lipschitz.class_margins` orders them. Everything is computed in float64. A radius R
certifies the open ball ‖x' − x‖∞ < R; 0 certifies nothing (the point may be misclassified), ∞, to be read as more than
1e100, is possible where nothing moves. Constants below 1e-290 are not told from 0, nor margins below 1e-150.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe.analysis.rounding import gamma
from robust_moe_kernels.checks import expect, expect_tensor

__all__ = [
    "dual_radius",
    "dual_radius_any_standard",
    "hard_router_radius",
    "mixture_margin",
    "mixture_slope",
    "moe_radius",
]

_NO_MARGIN, _NO_SLOPE = 1e-150, 1e-290  # what may be underflow's doing; a quotient of the two is beyond any distance


def mixture_margin(weights: Tensor, margins: Tensor) -> Tensor:
    """m_j = Σ_i a_i g_ij, rounded down; float64 [B, J].

    weights: a_i(x) [B, E], each >= 0, each row's sum 1 (to 1e-4); margins: g_ij(x) [B, E, J], finite.
    """
    weights, margins = _weights(weights, exact=True), _shaped(margins, "margins", 3, "[B, E, J]")
    expect(weights.shape == margins.shape[:2], "weights", f"shape {list(margins.shape[:2])}", list(weights.shape))
    products = weights[:, :, None] * margins
    return products.sum(1) - gamma(products.shape[1]) * products.abs().sum(1)


def mixture_slope(
    weights: Tensor, margin_lipschitz: Tensor, weight_lipschitz: Tensor, margin_bound: Tensor | float = 1.0
) -> Tensor:
    """S_j = Σ_i [a_i L_ij + r_i M_ij], rounded up: how fast a soft mixture's margin can fall; float64 [B, J].

    Args:
        weights: a_i(x) [B, E], or upper bounds of them, as S_j grows in each.
        margin_lipschitz: L_ij >= 0, [B, E, J] or what broadcasts to it.
        weight_lipschitz: r_i >= 0, [B, E] or what broadcasts to it.
        margin_bound: M_ij >= 0, broadcast to [B, E, J]: of |g_ij|, or of |g_ij − c_j| for constants c_j of your choice.
    """
    weights = _weights(weights, exact=False)
    constants = _constants(margin_lipschitz, "margin_lipschitz")
    expect(constants.dim() == 3, "margin_lipschitz", "3 dimensions [B, E, J]", f"shape {list(constants.shape)}")
    shape = (*weights.shape, constants.shape[2])
    constants = _expanded(constants, "margin_lipschitz", shape)
    rates = _expanded(_constants(weight_lipschitz, "weight_lipschitz"), "weight_lipschitz", tuple(weights.shape))
    limits = _expanded(_constants(margin_bound, "margin_bound"), "margin_bound", shape)
    total = (weights[:, :, None] * constants + rates[:, :, None] * limits).sum(1)
    return total * (1 + gamma(2 * weights.shape[1]))


def moe_radius(margin: Tensor, slope: Tensor, ball: Tensor | float = float("inf")) -> Tensor:
    """min_j m_j / S_j, the certified radius of a soft mixture; float64 [B].

    Args:
        margin: m_j(x) [B, J], of :func:`mixture_margin` (or of a single network: a mixture of one).
        slope: S_j >= 0 [B, J], of :func:`mixture_slope`.
        ball: radius of the ball around x on which the constants hold, a number or [B]; the result is never larger.
    """
    margin, slope = _pair(margin, slope, "")
    return _smallest(margin, slope, ball)


def dual_radius_any_standard(
    alpha: Tensor | float, robust_margin: Tensor, robust_slope: Tensor, ball: Tensor | float = float("inf")
) -> Tensor:
    """Radius of F_D = (1 − α) F_S + α F_R whatever probabilities F_S gives, there or anywhere; float64 [B].

    F_S^y − F_S^j ≥ −1 and no more is known, so the dual's margin at x' is at least α m_R,j(x') − (1 − α)
    ≥ α m_R,j(x) − (1 − α) − ε α S_j: the radius is min_j [α m_R,j − (1 − α)]_+ / (α S_j). As m_R,j ≤ 1 it can be
    positive for α > 1/2 only, and is for m_R,j > (1 − α) / α.

    alpha: in [0, 1], a number or [B]; robust_margin, robust_slope, ball: as for :func:`moe_radius`.
    """
    margin, slope = _pair(robust_margin, robust_slope, "robust_")
    alpha = _alpha(alpha, margin)
    numerator = alpha * margin - (1 - alpha)
    return _smallest(numerator - gamma(4) * (alpha * margin.abs() + 1), alpha * slope, ball)


def dual_radius(
    alpha: Tensor | float,
    standard_margin: Tensor,
    standard_slope: Tensor,
    robust_margin: Tensor,
    robust_slope: Tensor,
    ball: Tensor | float = float("inf"),
) -> Tensor:
    """Radius of F_D = (1 − α) F_S + α F_R where both margins have a slope; float64 [B].

    The dual's margin is (1 − α) m_S,j + α m_R,j and falls by at most (1 − α) κ_S,j + α S_j a unit of ‖δ‖∞: the radius
    is the smallest quotient of the two over j.

    alpha: in [0, 1], a number or [B]; standard_margin, standard_slope: m_S,j(x) and its Lipschitz constant κ_S,j >= 0,
    [B, J] each; the others as for :func:`dual_radius_any_standard`.
    """
    robust_margin, robust_slope = _pair(robust_margin, robust_slope, "robust_")
    standard_margin, standard_slope = _pair(standard_margin, standard_slope, "standard_")
    same = standard_margin.shape == robust_margin.shape
    expect(same, "standard_margin", f"shape {list(robust_margin.shape)}, as robust_margin", list(standard_margin.shape))
    alpha = _alpha(alpha, robust_margin)
    numerator = (1 - alpha) * standard_margin + alpha * robust_margin
    error = gamma(4) * ((1 - alpha) * standard_margin.abs() + alpha * robust_margin.abs())
    return _smallest(numerator - error, (1 - alpha) * standard_slope + alpha * robust_slope, ball)


def hard_router_radius(
    reach: Tensor, margins: Tensor, margin_lipschitz: Tensor, ball: Tensor | float = float("inf")
) -> Tensor:
    """Radius of F(x) = f_{argmax h(x)}(x); float64 [B].

    Expert k is used by no x' closer than t_k to x (t_k = 0 for the chosen one and those that tie with it), and at a
    distance below ρ_k = min_j g_kj(x) / L_kj, or 0 where some g_kj(x) ≤ 0, it says y. So ε is safe iff
    for every k ε < t_k or ε < ρ_k: as both are thresholds, the supremum is min_k max(t_k, ρ_k), no search needed.

    Args:
        reach: t_k >= 0 [B, E], infinity allowed: :func:`~robust_moe.analysis.reach.router_reach`.
        margins: g_kj(x) [B, E, J] of every expert at x itself; probabilities or logits.
        margin_lipschitz: L_kj >= 0, broadcast to [B, E, J].
        ball: radius of the ball on which the constants hold, a number or [B].
    """
    margins = _shaped(margins, "margins", 3, "[B, E, J]")
    expect_tensor(reach, "reach")
    reach = reach.double()
    ok = reach.shape == margins.shape[:2]
    expect(ok, "reach", f"shape {list(margins.shape[:2])} (B, E, as margins)", list(reach.shape))
    expect(bool((reach >= 0).all()), "reach", "distances >= 0", _range(reach))
    constants = _constants(margin_lipschitz, "margin_lipschitz")
    constants = _expanded(constants, "margin_lipschitz", tuple(margins.shape))
    return torch.minimum(torch.maximum(reach, _quotient(margins, constants).amin(2)).amin(1), _ball(ball, margins))


def _smallest(margin: Tensor, slope: Tensor, ball: Tensor | float) -> Tensor:
    return torch.minimum(_quotient(margin, slope).amin(1), _ball(ball, margin))


def _quotient(margin: Tensor, slope: Tensor) -> Tensor:
    """margin / slope rounded down, 0 where the margin is not positive, ∞ where only the slope is 0."""
    quotient = torch.where(slope > 0, margin / (slope + _NO_SLOPE) * (1 - gamma(4)), float("inf"))
    return torch.where(margin > _NO_MARGIN, quotient, 0.0)


def _pair(margin: Tensor, slope: Tensor, prefix: str) -> tuple[Tensor, Tensor]:
    margin = _shaped(margin, f"{prefix}margin", 2, "[B, J]")
    slope = _constants(slope, f"{prefix}slope")
    return margin, _expanded(slope, f"{prefix}slope", tuple(margin.shape))


def _shaped(value: Tensor, name: str, dims: int, meaning: str) -> Tensor:
    expect_tensor(value, name)
    ok = value.dim() == dims and value.shape[-1] >= 1
    expect(ok, name, f"{dims} dimensions {meaning} with J >= 1", f"shape {list(value.shape)}")
    expect(bool(value.isfinite().all()), name, "finite numbers", _range(value))
    return value.double()


def _weights(value: Tensor, exact: bool) -> Tensor:
    value = _shaped(value, "weights", 2, "[B, E]")
    expect(bool((value >= 0).all()), "weights", "numbers >= 0", _range(value))
    sums = value.sum(1)
    ok = (sums >= 1 - 1e-4) & ((sums <= 1 + 1e-4) | (not exact))
    wanted = "rows that sum to 1" if exact else "rows that sum to at least 1"
    expect(bool(ok.all()), "weights", wanted, f"sums {_range(sums)}")
    return value


def _constants(value: Tensor | float, name: str) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64)
    expect(bool((value.isfinite() & (value >= 0)).all()), name, "finite numbers >= 0", _range(value))
    return value


def _expanded(value: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    ok = value.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    expect(ok, name, f"a shape that broadcasts to {list(shape)}", list(value.shape))
    return value.expand(shape)


def _alpha(value: Tensor | float, margin: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=margin.device)
    expect(bool(((value >= 0) & (value <= 1)).all()), "alpha", "a number in [0, 1]", _range(value))
    return _expanded(value, "alpha", (margin.shape[0],))[:, None]


def _ball(value: Tensor | float, margin: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=margin.device)
    expect(bool((value >= 0).all()), "ball", "radii >= 0", _range(value))
    return _expanded(value, "ball", (margin.shape[0],))


def _range(value: Tensor) -> str:
    if value.numel() == 1:
        return f"{value.item():g}"
    return f"values from {value.min().item():g} to {value.max().item():g}"
