"""How far an image must move before a hard router may send it to another expert.

Certificates use :func:`router_reach`, which takes any router and the rounding of its constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe.analysis.rounding import gamma
from robust_moe_kernels.checks import expect, expect_tensor

__all__ = ["router_reach"]


def router_reach(lead: Tensor, difference_lipschitz: Tensor) -> Tensor:
    """Distances t_k below which argmax h(x') is not k, from pairs of logits; float64 [B, E], 0 for the chosen expert.

    For k to win, h_k ≥ h_i must hold at x' for *every* i, and h_i − h_k falls by at most D_ik ‖δ‖∞:
    t_k = max_i [h_i − h_k]_+ / D_ik, and R(ε) = {k : t_k ≤ ε} holds every expert that is reachable within ε. For an
    affine router h = Wx + b, D_ik = ‖w_i − w_k‖₁ is exact and so is each pair's condition; all pairs may hold at *one*
    x' only further away, and with two experts nowhere else.

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


def _lead(lead: Tensor) -> Tensor:
    expect_tensor(lead, "lead")
    ok = lead.dim() == 3 and lead.shape[1] == lead.shape[2] >= 1
    expect(ok, "lead", "shape [B, E, E]", list(lead.shape))
    expect(bool(lead.isfinite().all()), "lead", "finite numbers", "a NaN or an infinity")
    return lead.double()
