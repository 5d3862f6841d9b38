"""Steps of Auto-PGD (Croce and Hein, 2020, arXiv:2003.01690): gradient step, momentum and both projections in one pass
over the images, and the copies of what the attack remembers.

Not differentiable, as the other attack steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels.checks import (
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
from robust_moe_kernels.ops.attack_step import NORMS

__all__ = ["APGD", "apgd_step", "apgd_track"]

APGD = Op(
    __package__,
    cpu=("native", "reference"),
    cuda=("triton", "native", "reference"),
)


def _expect_like(x: Tensor, tensors: dict[str, Tensor]) -> None:
    for argument, tensor in tensors.items():
        expect_tensor(tensor, argument)
        expect_dtype(tensor, argument, (x.dtype,))
        expect_shape(tensor, argument, tuple(x.shape), "the shape of x")
        expect_same_device(tensor, argument, x, "x")


def _expect_per_sample(value: Tensor, argument: str, x: Tensor, dtype: torch.dtype) -> None:
    expect_tensor(value, argument)
    expect_dtype(value, argument, (dtype,))
    expect_shape(value, argument, (x.shape[0],), "[B]")
    expect_same_device(value, argument, x, "x")


def apgd_step(
    x: Tensor,
    previous: Tensor,
    grad: Tensor,
    x0: Tensor,
    eta: Tensor,
    eps: float,
    share: float = 0.75,
    norm: str = "Linf",
    impl: str = AUTO,
    *,
    nonfinite: Tensor | None = None,
) -> Tensor:
    """The next iterate of Auto-PGD (arXiv:2003.01690, eq. 2 and 3), P being the projection to the ball, then the box.

    z = P(x + eta*direction), result = P(x + share*(z - x) + (1 - share)*(x - previous)). ``Linf``: direction =
    sign(grad), the ball is [x0 - eps, x0 + eps]. ``L2``: direction = grad/(||grad|| + 1e-12), longer offsets from x0
    are shortened to eps. A zero or NaN gradient element adds nothing to its pixel under ``Linf``; a NaN anywhere makes
    the whole sample NaN under ``L2``.

    Args:
        x: iterate [B, ...], float32 or float64, in [0, 1].
        previous: the iterate before, as x; at the first step x itself.
        grad: gradient of the loss with respect to x, as x.
        x0: centre of the ball, as x.
        eta: step size of each sample [B], pixel units, dtype of x.
        eps: radius, pixel units, >= 0.
        share: of the gradient step, in [0, 1]; the rest is momentum. 1 at the first step, then 0.75.
        norm: "Linf" or "L2" (per sample, over all but the first dimension).
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".
        nonfinite: bool scalar on the device of x, or None: set to true in place where an element of grad is NaN or
            infinite, otherwise left as it is.

    Returns:
        The next iterate, shape and dtype of x, detached.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    expect_images(x, "x")
    _expect_like(x, {"previous": previous, "grad": grad, "x0": x0})
    _expect_per_sample(eta, "eta", x, x.dtype)
    expect_nonnegative(eps, "eps")
    expect(0 <= share <= 1, "share", "a number in [0, 1]", share)
    expect(norm in NORMS, "norm", f"one of {', '.join(NORMS)}", repr(norm))
    expect_flag(nonfinite, "nonfinite", x, "x")
    images = (tensor.detach() for tensor in (x, previous, grad, x0, eta))
    return torch.ops.robust_moe_kernels.apgd_step(*images, float(eps), float(share), norm, impl, nonfinite)


def apgd_track(
    x: Tensor,
    grad: Tensor,
    improved: Tensor,
    fooled: Tensor,
    x_best: Tensor,
    grad_best: Tensor,
    x_fooled: Tensor,
    impl: str = AUTO,
) -> None:
    """Remember iterates, in place: x_best, grad_best <- x, grad where ``improved``, x_fooled <- x where ``fooled``.

    Samples of neither kind cost no memory traffic.

    Args:
        x: iterate [B, ...], float32 or float64.
        grad: its gradient, as x.
        improved: bool [B], the samples whose loss is the best so far.
        fooled: bool [B], the samples that are misclassified now.
        x_best, grad_best, x_fooled: as x and contiguous in its memory format; written, so each has memory of its own.
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or layout.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    expect_images(x, "x")
    written = {"x_best": x_best, "grad_best": grad_best, "x_fooled": x_fooled}
    _expect_like(x, {"grad": grad, **written})
    _expect_per_sample(improved, "improved", x, torch.bool)
    _expect_per_sample(fooled, "fooled", x, torch.bool)
    torch.ops.robust_moe_kernels.apgd_track(x.detach(), grad.detach(), improved, fooled, *written.values(), impl)


_STEP = Operands("x table [B, ...]; previous x [B, ...]; grad x [B, ...]; x0 x [B, ...]; eta x [B]; nonfinite? bool []")
_TRACK = Operands(
    "x table [B, ...]; grad x [B, ...]; improved bool [B]; fooled bool [B]; x_best x [B, ...]; grad_best x [B, ...];"
    " x_fooled x [B, ...]"
)

torch.library.define(
    "robust_moe_kernels::apgd_step",
    "(Tensor x, Tensor previous, Tensor grad, Tensor x0, Tensor eta, float eps, float share, str norm, str impl,"
    " Tensor(a!)? nonfinite=None) -> Tensor",
)


@torch.library.impl("robust_moe_kernels::apgd_step", "default")
def _apgd_step(
    x: Tensor, previous: Tensor, grad: Tensor, x0: Tensor, eta: Tensor, eps: float, share: float, norm: str, impl: str,
    nonfinite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _STEP(x, previous, grad, x0, eta, nonfinite)
    expect(norm in NORMS, "norm", f"one of {', '.join(NORMS)}", repr(norm))
    layout = dense_format(x)
    x, previous, grad, x0 = (tensor.contiguous(memory_format=layout) for tensor in (x, previous, grad, x0))
    chosen = APGD.choose(impl, x)
    return chosen.apgd_step(x, previous, grad, x0, eta.contiguous(), eps, share, norm, nonfinite)


@torch.library.register_fake("robust_moe_kernels::apgd_step")
def _apgd_step_fake(
    x: Tensor, previous: Tensor, grad: Tensor, x0: Tensor, eta: Tensor, eps: float, share: float, norm: str, impl: str,
    nonfinite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _STEP.expect_kinds(x, previous, grad, x0, eta, nonfinite)
    return torch.empty_like(x, memory_format=dense_format(x))


torch.library.define(
    "robust_moe_kernels::apgd_track",
    "(Tensor x, Tensor grad, Tensor improved, Tensor fooled, Tensor(a!) x_best, Tensor(b!) grad_best,"
    " Tensor(c!) x_fooled, str impl) -> ()",
)


def _expect_apart(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` where a contiguous tensor that is written has memory in common with another one."""
    places = {
        name: (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for name, tensor in (written | read).items()
    }
    for name in written:
        first, last = places[name]
        for other, (begin, end) in places.items():
            ok = other == name or begin >= last or end <= first
            expect(ok, name, "memory of its own", f"memory that {other} has a part in")


@torch.library.impl("robust_moe_kernels::apgd_track", "default")
def _apgd_track(
    x: Tensor,
    grad: Tensor,
    improved: Tensor,
    fooled: Tensor,
    x_best: Tensor,
    grad_best: Tensor,
    x_fooled: Tensor,
    impl: str,
) -> None:
    _TRACK(x, grad, improved, fooled, x_best, grad_best, x_fooled)
    layout = dense_format(x)
    for argument, tensor in (("x_best", x_best), ("grad_best", grad_best), ("x_fooled", x_fooled)):
        name = "channels-last" if layout == torch.channels_last else "contiguous"
        expect(tensor.is_contiguous(memory_format=layout), argument, f"a {name} tensor", f"strides {tensor.stride()}")
    x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    rows = improved.contiguous(), fooled.contiguous()
    _expect_apart({"x_best": x_best, "grad_best": grad_best, "x_fooled": x_fooled}, {"x": x, "grad": grad})
    APGD.choose(impl, x).apgd_track(x, grad, *rows, x_best, grad_best, x_fooled)


@torch.library.register_fake("robust_moe_kernels::apgd_track")
def _apgd_track_fake(
    x: Tensor,
    grad: Tensor,
    improved: Tensor,
    fooled: Tensor,
    x_best: Tensor,
    grad_best: Tensor,
    x_fooled: Tensor,
    impl: str,
) -> None:
    _TRACK.expect_kinds(x, grad, improved, fooled, x_best, grad_best, x_fooled)
