"""Steps of projected-gradient attacks: step, project to the ball, clamp to [0, 1], in one pass over the image.

Not differentiable: an attack's iterate is a constant to the training loss (Madry et al., 1706.06083).
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from robust_moe_kernels.checks import (
    FLOATS,
    expect,
    expect_dtype,
    expect_flag,
    expect_images,
    expect_nonnegative,
    expect_same_device,
    expect_shape,
    expect_tensor,
)
from robust_moe_kernels.dispatch import AUTO, Op
from robust_moe_kernels.layout import dense_format
from robust_moe_kernels.operands import Operands

__all__ = ["ATTACK_STEP", "NORMS", "pgd_step", "random_start"]

ATTACK_STEP = Op(
    __package__,
    cpu=("native", "reference"),
    cuda=("native", "triton", "reference"),  # by an H100's times of all steps, and less of the host's
)
NORMS = ("Linf", "L2")


def pgd_step(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    eps: float,
    alpha: float,
    norm: str = "Linf",
    impl: str = AUTO,
    *,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """One step of projected gradient ascent.

    ``Linf``: z = x + alpha*sign(grad), delta = clamp(z - x0, -eps, eps). ``L2``: z = x + alpha*grad/||grad||, delta =
    z - x0, shortened to length eps where it is longer. Returns clamp(x0 + delta, 0, 1). A zero or NaN gradient element
    does not move its pixel under ``Linf``; a NaN anywhere makes the whole sample NaN under ``L2``.

    Args:
        x: iterate [B, ...], float32 or float64, in [0, 1].
        grad: gradient of the loss with respect to x, same shape, any floating dtype.
        x0: centre of the ball, as x.
        eps: radius, pixel units, >= 0.
        alpha: step length, pixel units, >= 0.
        norm: "Linf" or "L2" (per sample, over all but the first dimension).
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".
        nonfinite: bool scalar on the device of x, or None: set to true in place where an element of grad is NaN or
            infinite, otherwise left as it is. It saves an attack two kernels a step.

    Returns:
        The next iterate, shape and dtype of x, detached.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    expect_images(x, "x")
    expect_tensor(grad, "grad")
    expect_dtype(grad, "grad", FLOATS)
    expect_tensor(x0, "x0")
    expect_dtype(x0, "x0", (x.dtype,))
    for tensor, argument in ((grad, "grad"), (x0, "x0")):
        expect_shape(tensor, argument, tuple(x.shape), "the shape of x")
        expect_same_device(tensor, argument, x, "x")
    expect_nonnegative(eps, "eps")
    expect_nonnegative(alpha, "alpha")
    expect(norm in NORMS, "norm", f"one of {', '.join(NORMS)}", repr(norm))
    expect_flag(nonfinite, "nonfinite", x, "x")
    return torch.ops.robust_moe_kernels.pgd_step(
        x.detach(), grad.detach(), x0.detach(), float(eps), float(alpha), norm, impl, nonfinite
    )


def random_start(
    x0: Tensor,
    eps: float,
    seed: int,
    sample_index: Tensor | None = None,
    stream: int = 0,
    norm: str = "Linf",
    impl: str = AUTO,
) -> Tensor:
    """A uniformly random point of the eps-ball around each image, clamped to [0, 1].

    The noise of a pixel is a pure function of (seed, sample_index[b], stream, position of the pixel in its image),
    drawn by Philox4x32-10, so it does not depend on the batch, the device or the implementation. ``Linf``: U[-eps,
    eps) from 24 random bits. ``L2``: a normalised Gaussian vector times eps*U^(1/size).

    Args:
        x0: centre [B, ...], float32 or float64, in [0, 1].
        eps: radius, pixel units, >= 0.
        seed: any 64-bit integer.
        sample_index: int64 [B], the images' numbers in their data set; None: 0..B-1.
        stream: 32-bit number of an independent draw, such as the restart.
        norm: "Linf" or "L2".
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".

    Returns:
        The start, shape and dtype of x0, detached.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    expect_images(x0, "x0")
    expect_nonnegative(eps, "eps")
    expect(0 <= stream < 2**32, "stream", "an integer in [0, 2^32)", stream)
    expect(isinstance(seed, Integral) and -(2**63) <= seed < 2**64, "seed", "a 64-bit integer", seed)
    expect(norm in NORMS, "norm", f"one of {', '.join(NORMS)}", repr(norm))
    if sample_index is None:
        sample_index = torch.arange(x0.shape[0], device=x0.device)
    expect_tensor(sample_index, "sample_index")
    expect_dtype(sample_index, "sample_index", (torch.int64,))
    expect_shape(sample_index, "sample_index", (x0.shape[0],), "[B]")
    expect_same_device(sample_index, "sample_index", x0, "x0")
    signed = seed - 2**64 if seed >= 2**63 else seed  # a schema's int is signed
    return torch.ops.robust_moe_kernels.random_start(x0.detach(), sample_index, float(eps), signed, stream, norm, impl)


_STEP = Operands("x table [B, ...]; grad float [B, ...]; x0 x [B, ...]; nonfinite? bool []")
_START = Operands("x0 table [B, ...]; sample_index int64 [B]")

torch.library.define(
    "robust_moe_kernels::pgd_step",
    "(Tensor x, Tensor grad, Tensor x0, float eps, float alpha, str norm, str impl, Tensor(a!)? nonfinite=None)"
    " -> Tensor",
)


@torch.library.impl("robust_moe_kernels::pgd_step", "default")
def _pgd_step(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, alpha: float, norm: str, impl: str, nonfinite: Tensor | None = None
) -> Tensor:
    _STEP(x, grad, x0, nonfinite)
    expect(norm in NORMS, "norm", f"one of {', '.join(NORMS)}", repr(norm))
    layout = dense_format(x)
    x, grad, x0 = (tensor.contiguous(memory_format=layout) for tensor in (x, grad, x0))
    return ATTACK_STEP.choose(impl, x).pgd_step(x, grad, x0, eps, alpha, norm, nonfinite)


@torch.library.register_fake("robust_moe_kernels::pgd_step")
def _pgd_step_fake(
    x: Tensor, grad: Tensor, x0: Tensor, eps: float, alpha: float, norm: str, impl: str, nonfinite: Tensor | None = None
) -> Tensor:
    _STEP.expect_kinds(x, grad, x0, nonfinite)
    return torch.empty_like(x, memory_format=dense_format(x))


torch.library.define(
    "robust_moe_kernels::random_start",
    "(Tensor x0, Tensor sample_index, float eps, int seed, int stream, str norm, str impl) -> Tensor",
)


@torch.library.impl("robust_moe_kernels::random_start", "default")
def _random_start(x0: Tensor, sample_index: Tensor, eps: float, seed: int, stream: int, norm: str, impl: str) -> Tensor:
    _START(x0, sample_index)
    expect(0 <= stream < 2**32, "stream", "an integer in [0, 2^32)", stream)
    expect(norm in NORMS, "norm", f"one of {', '.join(NORMS)}", repr(norm))
    # A pixel's number is its place in the contiguous image, whatever the memory format.
    chosen = ATTACK_STEP.choose(impl, x0)
    out = chosen.random_start(x0.contiguous(), sample_index.contiguous(), eps, seed, stream, norm)
    return out.contiguous(memory_format=dense_format(x0))


@torch.library.register_fake("robust_moe_kernels::random_start")
def _random_start_fake(
    x0: Tensor, sample_index: Tensor, eps: float, seed: int, stream: int, norm: str, impl: str
) -> Tensor:
    _START.expect_kinds(x0, sample_index)
    return torch.empty_like(x0, memory_format=dense_format(x0))
