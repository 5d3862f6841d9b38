"""Empirical estimates of local Lipschitz constants: lower bounds, found by search. Nothing here is a certificate.

The largest gradient that a search meets in a ball is at most the true constant. So a radius computed from it is an
*estimate* that may be too large; it says how vacuous a sound bound is, and compares models, but promises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.analysis.lipschitz import class_margins
from robust_moe.attacks.base import expect_length, expect_number
from robust_moe.seeding import derive_seed
from robust_moe_kernels.checks import expect, expect_images
from robust_moe_kernels.modules import attack_mode

__all__ = ["estimate_lipschitz", "estimate_radius"]


def estimate_lipschitz(
    function: Callable[[Tensor], Tensor], x: Tensor, eps: float, *, steps: int = 10, restarts: int = 1, seed: int = 0
) -> Tensor:
    """Lower bounds of the local ℓ∞ Lipschitz constants max ‖∇g(x')‖₁, ‖x' − x‖∞ ≤ eps, x' in [0, 1]; float64 [B, K].

    Ascent on the norm of the gradient: x itself, then from a random start ``steps`` sign steps whose length falls from
    2 eps, ``restarts`` times, for each of the K functions; the largest norm met counts. The direction H sign(∇g) is
    taken from gradients at two points 0.1 eps to either side, which needs no second derivatives (gates have none) and
    feels the kinks of ReLU networks; a random sign where they are equal. A single start may end in a local maximum.

    Args:
        function: x' [B, ...] -> [B, K], a row from its own image only.
        x: float32 or float64 [B, ...] in [0, 1]. eps: radius >= 0.
        steps: >= 0; each costs three forwards and backwards for each function. restarts: >= 1.
        seed: of starts and random signs; the result depends on the order of the images in the batch.

    Raises:
        ValueError: pixels or a setting out of range, an output of another shape. FloatingPointError: a non-finite
            gradient.
    """
    expect_images(x, "x")
    ok = x.numel() == 0 or bool(((x >= 0) & (x <= 1)).all())
    expect(ok, "x", "pixels in [0, 1]", f"{x.min():g} to {x.max():g}" if x.numel() else "none")
    expect_length("eps", eps)
    for name, value, least in (("steps", steps, 0), ("restarts", restarts, 1)):
        expect_number(name, value, Integral)
        expect(value >= least, name, f"a count >= {least}", value)
    x = x.detach()
    generator = torch.Generator().manual_seed(derive_seed(seed, "estimate_lipschitz"))
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone()  # a tensor that autograd may save
        values = function(x)
        expect(values.dim() == 2 and len(values) == len(x), "function(x)", f"shape [{len(x)}, K]", list(values.shape))
        columns = []

        def inside(images: Tensor) -> Tensor:
            return torch.minimum(torch.maximum(images, x - eps), x + eps).clamp(0, 1)

        for k in range(values.shape[1]):
            best = _gradient(function, x, k)[1]
            for _ in range(restarts):
                at = inside(x + eps * _uniform(x, generator))
                for step in range(steps):
                    gradient, norm = _gradient(function, at, k)
                    ahead, ahead_norm = _gradient(function, inside(at + 0.1 * eps * gradient.sign()), k)
                    behind, behind_norm = _gradient(function, inside(at - 0.1 * eps * gradient.sign()), k)
                    best = torch.stack([best, norm, ahead_norm, behind_norm]).amax(0)
                    uphill = ahead - behind
                    sign = torch.where(uphill == 0, _uniform(x, generator), uphill).sign()
                    at = inside(at + 2 * eps * (1 - step / steps) * sign)
                best = torch.maximum(best, _gradient(function, at, k)[1])
            columns.append(best)
    return torch.stack(columns, 1)


def estimate_radius(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, probabilities: bool = True, **search: Any
) -> Tensor:
    """min(eps, min_j m_j(x) / L̂_j) with estimated L̂_j: an *estimate* of a radius, not a certificate; float64 [B].

    0 where x is misclassified. A sound bound by the same formula (:func:`~robust_moe.analysis.bounds.moe_radius`) is
    smaller; the true radius may be on either side.

    Args:
        model: images [B, ...] in [0, 1] -> logits; attacked in evaluation mode and left as found.
        y: int64 labels [B].
        eps: ball in which gradients are searched; the estimate ends there.
        probabilities: margins of the softmax, not of the logits.
        search: ``steps``, ``restarts``, ``seed`` of :func:`estimate_lipschitz`.
    """

    def margins(images: Tensor) -> Tensor:
        logits = model(images)
        return class_margins(logits.softmax(1) if probabilities else logits, y)

    with attack_mode(model):
        found = estimate_lipschitz(margins, x, eps, **search)
        with torch.no_grad():
            margin = margins(x).double()
    ratio = torch.where(found > 0, margin / found.clamp_min(1e-300), float("inf"))
    return torch.where(margin > 0, ratio, 0.0).amin(1).clamp_max(eps)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(like.shape, generator=generator, dtype=torch.float64) - 1).to(like)


def _gradient(function: Callable[[Tensor], Tensor], at: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """A function's gradient at each image, [B, ...], and its ℓ1 norm, float64 [B]."""
    at = at.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(at)[:, column].sum(), at)
    norm = gradient.flatten(1).abs().double().sum(1)
    if not bool(norm.isfinite().all()):
        raise FloatingPointError("estimate_lipschitz: the function gave a non-finite gradient")
    return gradient, norm
