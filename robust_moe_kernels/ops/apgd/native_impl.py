"""Auto-PGD's steps over the compiled extension (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native

__all__ = ["apgd_step", "apgd_track", "why_not"]

why_not = native.why_not_cpu


def apgd_step(
    x: Tensor, previous: Tensor, grad: Tensor, x0: Tensor, eta: Tensor, eps: float, share: float, norm: str,
    nonfinite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x)
    samples = x.shape[0]
    native.extension().apgd_step_cpu(
        norm == "L2",
        x.data_ptr(),
        previous.data_ptr(),
        grad.data_ptr(),
        x0.data_ptr(),
        eta.data_ptr(),
        out.data_ptr(),
        samples,
        x.numel() // max(samples, 1),
        eps,
        share,
        native.dtype_code(x),
        native.threads(),
        native.address(nonfinite),
    )
    return out


def apgd_track(
    x: Tensor, grad: Tensor, improved: Tensor, fooled: Tensor, x_best: Tensor, grad_best: Tensor, x_fooled: Tensor
) -> None:
    samples = x.shape[0]
    native.extension().apgd_track_cpu(
        x.data_ptr(),
        grad.data_ptr(),
        improved.data_ptr(),
        fooled.data_ptr(),
        x_best.data_ptr(),
        grad_best.data_ptr(),
        x_fooled.data_ptr(),
        samples,
        x.numel() // max(samples, 1),
        native.dtype_code(x),
        native.threads(),
    )
