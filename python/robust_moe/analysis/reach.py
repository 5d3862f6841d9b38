"""How far an image must move before a hard router may send it to another expert.

Certificates use :func:`router_reach`, which takes any router and the rounding of its constants. For an affine router
whose weights are known exactly :func:`exact_router_reach` may reach further; its distances are an input for
:func:`~robust_moe.analysis.bounds.hard_router_radius`, which takes them from the caller.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, hstack, vstack
from torch import Tensor

from robust_moe.analysis.rounding import gamma
from robust_moe_kernels.checks import expect, expect_tensor

__all__ = ["exact_router_reach", "router_reach"]

_RAY = 1e9  # multipliers end here where an expert is out of reach altogether and the dual is unbounded


def router_reach(lead: Tensor, difference_lipschitz: Tensor) -> Tensor:
    """Distances t_k below which argmax h(x') is not k, from pairs of logits; float64 [B, E], 0 for the chosen expert.

    For k to win, h_k ≥ h_i must hold at x' for *every* i, and h_i − h_k falls by at most D_ik ‖δ‖∞:
    t_k = max_i [h_i − h_k]_+ / D_ik, and R(ε) = {k : t_k ≤ ε} holds every expert that is reachable within ε. For an
    affine router h = Wx + b, D_ik = ‖w_i − w_k‖₁ is exact and so is each pair's condition; that all pairs hold at *one*
    x' may take longer (:func:`exact_router_reach`); with two experts the sets are the same.

    Args:
        lead: h_i(x) − h_k(x) at [b, i, k], or less; [B, E, E], finite.
        difference_lipschitz: D [E, E] or [B, E, E] >= 0: ℓ∞ Lipschitz constants of h_i − h_k.

    Raises:
        ValueError: shapes or ranges.
    """
    lead = _lead(lead)
    expect_tensor(difference_lipschitz, "difference_lipschitz")
    constants = difference_lipschitz.double()
    ok = tuple(constants.shape) in (tuple(lead.shape), tuple(lead.shape[1:]))
    wanted = f"shape {list(lead.shape[1:])} or {list(lead.shape)}, as lead"
    expect(ok, "difference_lipschitz", wanted, list(constants.shape))
    expect(bool((constants >= 0).all()), "difference_lipschitz", "numbers >= 0", constants.min().item())
    tiny = torch.finfo(torch.float64).tiny
    distance = torch.where(constants > 0, lead / constants.clamp_min(tiny) * (1 - gamma(2)), float("inf"))
    return torch.where(lead > 0, distance, 0.0).amax(1)


def exact_router_reach(lead: Tensor, weight: Tensor) -> Tensor:
    """Distances at which each expert of an affine router h = Wx + b becomes reachable, exactly; float64 [B, E].

    t_k is the value of a linear program: the least t with a δ, |δ_p| ≤ t, such that (w_i − w_k)·δ ≤ h_k − h_i for all
    i. By duality t_k = max over λ ≥ 0, λ ≠ 0 of Σ_i λ_i (h_i − h_k) / ‖Σ_i λ_i (w_i − w_k)‖₁, of which
    :func:`router_reach` takes the λ with one entry. *Every* λ gives a distance that is not too long, so the quotient of
    the λ that the solver returns is safe however well it was solved. A huge number: never chosen. No certificate of
    :func:`~robust_moe.analysis.certify_mixture` uses it. The pixel range is not used. One program of E − 1 + d
    variables an image and expert, on the host.

    Args:
        lead: h_i(x) − h_k(x) at [b, i, k], or less; [B, E, E], finite.
        weight: W [E, d] with respect to the pixels.
    """
    lead = _lead(lead)
    expect_tensor(weight, "weight")
    ok = weight.dim() == 2 and weight.shape[0] == lead.shape[1]
    expect(ok, "weight", f"shape [{lead.shape[1]}, d]", list(weight.shape))
    matrix, values = weight.double().cpu(), lead.cpu()
    apart = matrix[:, None] - matrix[None]
    reach = router_reach(values, apart.abs().sum(2) * (1 + gamma(matrix.shape[1])))
    for row, expert in (reach > 0).nonzero().tolist():
        others = [i for i in range(len(matrix)) if i != expert]
        size = (matrix[others].abs() + matrix[expert].abs()).numpy()
        found = _program(values[row, others, expert].numpy(), apart[others, expert].numpy(), size)
        reach[row, expert] = max(reach[row, expert].item(), found)
    return reach.to(lead.device)


def _program(lead: np.ndarray, apart: np.ndarray, size: np.ndarray) -> float:
    """lead [E − 1], apart and the magnitude it was computed from [E − 1, d] -> a distance that is not too long."""
    count, pixels = apart.shape
    # maximise λ·lead subject to |λ·apart| ≤ s for each pixel and Σ s ≤ 1; variables (λ, s)
    bounds = -eye_array(pixels)
    signed = csr_array(apart.T)
    both = vstack([hstack([signed, bounds]), hstack([-signed, bounds])])
    total = csr_array(np.concatenate([np.zeros(count), np.ones(pixels)])[None])
    limits = np.zeros(2 * pixels + 1)
    limits[-1] = 1.0
    objective = np.concatenate([-lead, np.zeros(pixels)])
    upper = [(0, _RAY)] * count + [(0, None)] * pixels
    solved = linprog(objective, A_ub=vstack([both, total]), b_ub=limits, bounds=upper, method="highs")
    if solved.x is None:
        return 0.0  # the pairs' distance stands
    multipliers = np.maximum(solved.x[:count], 0)
    won = multipliers @ lead - gamma(count) * (multipliers @ np.abs(lead))
    norm = np.abs(multipliers @ apart).sum() + gamma(count + pixels) * (multipliers @ size).sum()
    return max(0.0, float(won / norm * (1 - gamma(4)))) if norm > 0 else 0.0


def _lead(lead: Tensor) -> Tensor:
    expect_tensor(lead, "lead")
    ok = lead.dim() == 3 and lead.shape[1] == lead.shape[2] >= 1
    expect(ok, "lead", "shape [B, E, E]", list(lead.shape))
    expect(bool(lead.isfinite().all()), "lead", "finite numbers", "a NaN or an infinity")
    return lead.double()
