"""The Jacobian of a soft mixture, in its two parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect, expect_images

__all__ = ["MixtureJacobian", "mixture_jacobian"]

Network = Callable[[Tensor], Tensor]


class MixtureJacobian(NamedTuple):
    """The two terms of J = ∂F/∂x; the second is routing × disagreement."""

    experts: Tensor  # [B, C, ...]: Σ_i p_i ∇f_i, what is left with the route held
    routing: Tensor  # [B, C, ...]: Σ_i p_i (f_i − f̄)(∇s_i − ∇s̄)ᵀ, 0 where the experts agree or the router is flat

    @property
    def total(self) -> Tensor:
        """J itself, [B, C, ...]."""
        return self.experts + self.routing


def mixture_jacobian(router: Network, experts: Sequence[Network], x: Tensor) -> MixtureJacobian:
    """J of F(x) = Σ_i p_i(x) f_i(x), p = softmax(s(x)), split as J = Σ p_i ∇f_i + Σ p_i (f_i − f̄)(∇s_i − ∇s̄)ᵀ.

    From ∇p_i = p_i (∇s_i − ∇s̄) with ∇s̄ = Σ_k p_k ∇s_k, J = Σ p_i ∇f_i + Σ f_i p_i (∇s_i − ∇s̄)ᵀ; and as
    Σ p_i (∇s_i − ∇s̄) = 0, the mean f̄ = Σ p_k f_k may be taken off every f_i. It is a covariance, under p, of outputs
    and router gradients (what Puigcerver et al., 2022, arXiv:2210.10253, measure as the experts' diversity).

    Args:
        router: x -> logits s [B, E].
        experts: E networks, x -> f_i [B, C]; logits or probabilities, whatever is mixed. No sample may depend on
            another (evaluation mode).
        x: float [B, ...].

    Costs E + C backward passes. Raises ValueError where the shapes do not fit.
    """
    expect_images(x, "x")
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        scores = router(x)
        expect(
            scores.shape == (len(x), len(experts)), "router(x)", f"shape {[len(x), len(experts)]}", list(scores.shape)
        )
        outputs = [expert(x) for expert in experts]
        shapes = {tuple(output.shape) for output in outputs}
        expect(len(shapes) == 1 and outputs[0].dim() == 2, "experts", "outputs of one shape [B, C]", shapes)
        values = torch.stack(outputs, 1)  # [B, E, C]
        weights = scores.detach().softmax(1)
        held = _rows((weights[:, :, None] * values).sum(1), x)
        slopes = _rows(scores, x).flatten(2)  # [B, E, pixels]
    apart = (values - (weights[:, :, None] * values).sum(1, keepdim=True)).detach()
    relative = slopes - (weights[:, :, None] * slopes).sum(1, keepdim=True)
    routing = torch.einsum("be,bec,bep->bcp", weights, apart, relative)
    return MixtureJacobian(held, routing.reshape(held.shape))


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """Gradient of every column of ``values`` [B, n] to its own sample: [B, n, ...]."""
    rows = []
    for column in values.unbind(1):
        gradient = None
        if column.requires_grad:
            (gradient,) = torch.autograd.grad(column.sum(), x, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(x) if gradient is None else gradient)
    return torch.stack(rows, 1)
