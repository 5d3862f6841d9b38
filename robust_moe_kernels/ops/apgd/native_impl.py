"""Auto-PGD's steps over the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native

__all__ = ["apgd_step", "apgd_track", "why_not"]

why_not = native.why_not_cuda


def apgd_step(
    x: Tensor, previous: Tensor, grad: Tensor, x0: Tensor, eta: Tensor, eps: float, share: float, norm: str,
    nonfinite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    samples = x.shape[0]
    native.run(
        "apgd_step",
        x,
        norm == "L2",
        *map(native.address, (x, previous, grad, x0, eta, out, nonfinite)),
        samples,
        x.numel() // max(samples, 1),
        eps,
        share,
        native.dtype_code(x),
    )
    return out


def apgd_track(
    x: Tensor, grad: Tensor, improved: Tensor, fooled: Tensor, x_best: Tensor, grad_best: Tensor, x_fooled: Tensor
) -> None:
    samples = x.shape[0]
    native.run(
        "apgd_track",
        x,
        *map(native.address, (x, grad, improved, fooled, x_best, grad_best, x_fooled)),
        samples,
        x.numel() // max(samples, 1),
        native.dtype_code(x),
    )
