"""The loss that most attacks raise, of each sample by itself, in one launch each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.checks import FLOATS, expect, expect_dtype, expect_same_device, expect_shape, expect_tensor
from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.operands import Operands
from robust_moe_kernels.ops.attack_step import reference_impl
from robust_moe_kernels.ops.attack_step.op import ATTACK_STEP

__all__ = ["sample_cross_entropy"]


def sample_cross_entropy(logits: Tensor, y: Tensor, impl: str = AUTO) -> Tensor:
    """−log softmax(logits)_y of each sample: ``F.cross_entropy(logits, y, reduction="none")`` in float32 at least.

    PyTorch launches two kernels for it and three for its gradient, and two more that convert 16-bit logits; here it is
    one each, and the gradient is rounded once.

    Args:
        logits: [B, classes], any floating dtype.
        y: int64 [B], in [0, classes). Not read on the host: a label that is no class makes its sample's loss and
            gradient NaN.
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".

    Returns:
        [B], float32, or float64 for float64 logits. Differentiable in logits, any number of times.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    expect_tensor(logits, "logits")
    expect_dtype(logits, "logits", FLOATS)
    expect(logits.dim() == 2 and logits.shape[1] >= 1, "logits", "shape [B, classes], classes >= 1", list(logits.shape))
    expect_tensor(y, "y")
    expect_dtype(y, "y", (torch.int64,))
    expect_shape(y, "y", (logits.shape[0],), "[B]")
    expect_same_device(y, "y", logits, "logits")
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return reference_impl.cross_entropy(logits, y)  # the registered operation has gradients alone
    return torch.ops.robust_moe_kernels.sample_cross_entropy(logits, y, impl)


_FORWARD = "robust_moe_kernels::sample_cross_entropy"
_BACKWARD = "robust_moe_kernels::sample_cross_entropy_backward"
torch.library.define(_FORWARD, "(Tensor logits, Tensor y, str impl) -> Tensor")
torch.library.define(_BACKWARD, "(Tensor d_loss, Tensor logits, Tensor y, str impl) -> Tensor")


_LOGITS = Operands("logits float [B, K]; y int64 [B]")
_GRADIENT = Operands("logits float [B, K]; y int64 [B]; d_loss sum [B]")


@torch.library.impl(_FORWARD, "default")
def _forward(logits: Tensor, y: Tensor, impl: str) -> Tensor:
    _LOGITS(logits, y)
    expect(logits.shape[1] >= 1, "logits", "shape [B, classes], classes >= 1", list(logits.shape))
    return ATTACK_STEP.choose(impl, logits).cross_entropy(logits.contiguous(), y.contiguous())


@torch.library.register_fake(_FORWARD)
def _forward_fake(logits: Tensor, y: Tensor, impl: str) -> Tensor:
    _LOGITS.expect_kinds(logits, y)
    return logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.library.impl(_BACKWARD, "default")
def _backward(d_loss: Tensor, logits: Tensor, y: Tensor, impl: str) -> Tensor:
    """d_loss * (softmax(logits) - onehot(y)), in the dtype of logits. d_loss [B] may have any stride: one number that
    is expanded to the batch is not copied."""
    _GRADIENT(logits, y, d_loss)
    expect(logits.shape[1] >= 1, "logits", "shape [B, classes], classes >= 1", list(logits.shape))
    chosen = ATTACK_STEP.choose(impl, logits)
    return chosen.cross_entropy_backward(d_loss, logits.contiguous(), y.contiguous())


@torch.library.register_fake(_BACKWARD)
def _backward_fake(d_loss: Tensor, logits: Tensor, y: Tensor, impl: str) -> Tensor:
    _GRADIENT.expect_kinds(logits, y, d_loss)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, y, ctx.impl = inputs
    ctx.save_for_backward(logits, y)


def _autograd(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
    logits, y = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return torch.ops.robust_moe_kernels.sample_cross_entropy_backward(d_loss, logits, y, ctx.impl), None, None
    return reference_impl.cross_entropy_backward(d_loss, logits, y), None, None  # the gradient is to have gradients


def _twice(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("sample_cross_entropy_backward has no derivative: sample_cross_entropy has")


torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _twice)  # without it PyTorch warns and returns a wrong number
