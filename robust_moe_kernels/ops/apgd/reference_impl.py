"""The specification of Auto-PGD's steps, in plain PyTorch.

Each operation below rounds once, in this order, and none contracts a multiplication with an addition: the ℓ∞ step is
the same bit for bit in every implementation, and the ℓ2 step wherever the norms are. Those are summed in float64, in
any order, and rounded to the images' type: in float32 two orders hardly ever differ. Tracking is a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apgd_step", "apgd_track", "why_not"]

_TINY = 1e-12  # keeps the direction of a zero vector finite


def why_not(device_type: str) -> str | None:
    return None


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _l2_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x.reshape(x.shape[0], x.shape[1:].numel()).double(), dim=1)
    return _per_sample(norm.to(x.dtype), x)


def _project_linf(z: Tensor, x0: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(z, x0 - eps), x0 + eps).clamp(0.0, 1.0)


def _project_l2(z: Tensor, x0: Tensor, eps: float) -> Tensor:
    offset = z - x0
    norm = _l2_norm(offset)
    return (x0 + offset / (norm + _TINY) * norm.clamp_max(eps)).clamp(0.0, 1.0)


def apgd_step(
    x: Tensor, previous: Tensor, grad: Tensor, x0: Tensor, eta: Tensor, eps: float, share: float, norm: str,
    nonfinite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if nonfinite is not None:
        nonfinite |= ~torch.isfinite(grad).all()
    length = _per_sample(eta, x)
    if norm == "Linf":
        # Comparisons, not torch.sign: a NaN gradient leaves the pixel to its momentum.
        direction = (grad > 0).to(x.dtype) - (grad < 0).to(x.dtype)
        project = _project_linf
    else:
        direction = grad / (_l2_norm(grad) + _TINY)
        project = _project_l2
    z = project(x + length * direction, x0, eps)
    return project(x + (z - x) * share + (x - previous) * (1.0 - share), x0, eps)


def apgd_track(
    x: Tensor, grad: Tensor, improved: Tensor, fooled: Tensor, x_best: Tensor, grad_best: Tensor, x_fooled: Tensor
) -> None:
    for target, source, rows in ((x_best, x, improved), (grad_best, grad, improved), (x_fooled, x, fooled)):
        torch.where(_per_sample(rows, x), source, target, out=target)
