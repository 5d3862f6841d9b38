"""Attack steps over the compiled extension (CPU and CUDA)."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels import native

__all__ = ["cross_entropy", "cross_entropy_backward", "pgd_step", "random_start", "why_not"]

why_not = native.why_not_cuda


def pgd_step(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, alpha: float, norm: str, nonfinite: Tensor | None = None
) -> Tensor:
    out = torch.empty_like(x)
    samples = x.shape[0]
    native.run(
        "pgd_step",
        x,
        norm == "L2",
        x.data_ptr(),
        grad.data_ptr(),
        x0.data_ptr(),
        out.data_ptr(),
        native.address(nonfinite),
        samples,
        x.numel() // max(samples, 1),
        eps,
        alpha,
        native.dtype_code(x),
        native.dtype_code(grad),
    )
    return out


def random_start(x0: Tensor, sample_index: Tensor, eps: float, seed: int, stream: int, norm: str) -> Tensor:
    out = torch.empty_like(x0)
    samples = x0.shape[0]
    native.run(
        "random_start",
        x0,
        norm == "L2",
        x0.data_ptr(),
        sample_index.data_ptr(),
        out.data_ptr(),
        samples,
        x0.numel() // max(samples, 1),
        eps,
        seed & 0xFFFFFFFFFFFFFFFF,
        stream,
        native.dtype_code(x0),
    )
    return out


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    loss = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    addresses = (logits.data_ptr(), y.data_ptr(), loss.data_ptr())
    native.run("cross_entropy", logits, *addresses, *logits.shape, native.dtype_code(logits))
    return loss


def cross_entropy_backward(d_loss: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    d_logits = torch.empty_like(logits)
    addresses = (logits.data_ptr(), y.data_ptr(), d_logits.data_ptr())
    gradient = (d_loss.data_ptr(), d_loss.stride(0))
    native.run("cross_entropy_backward", logits, *gradient, *addresses, *logits.shape, native.dtype_code(logits))
    return d_logits
