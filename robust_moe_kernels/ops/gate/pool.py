"""Global average pool and a linear layer in one pass over the maps: the logits of the "GAP-FC" gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.checks import FLOATS, expect, expect_dtype, expect_same_device, expect_shape, expect_tensor
from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.layout import dense, dense_format
from robust_moe_kernels.operands import Operands
from robust_moe_kernels.ops.gate import reference_impl
from robust_moe_kernels.ops.gate.op import GATE
from robust_moe_kernels.second_derivatives import another_follows, plain_gradients

__all__ = ["pool_linear"]

_WEIGHTS = (torch.float32, torch.float64)


def pool_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str = AUTO) -> Tensor:
    """``linear(mean(x, (2, 3)), weight, bias)``, computed in the dtype of ``weight`` whatever that of x.

    Args:
        x: [B, C, H, W] with H, W >= 1, any floating dtype, contiguous or channels-last.
        weight: [E, C], float32 or float64.
        bias: [E] in the dtype of weight, or None.
        impl: "auto", "reference", "native" (CPU) or "triton".

    Returns:
        [B, E] in the dtype of weight. Differentiable in x, weight and bias.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    expect_tensor(x, "x")
    expect_dtype(x, "x", FLOATS)
    expect(x.dim() == 4 and min(x.shape[1:]) >= 1, "x", "shape [B, C, H, W] with C, H, W >= 1", list(x.shape))
    expect_tensor(weight, "weight")
    expect_dtype(weight, "weight", _WEIGHTS)
    ok = weight.dim() == 2 and weight.shape[1] == x.shape[1] and weight.shape[0] >= 1
    expect(ok, "weight", f"shape [E, {x.shape[1]}] with E >= 1", list(weight.shape))
    expect_same_device(weight, "weight", x, "x")
    if bias is not None:
        expect_tensor(bias, "bias")
        expect_dtype(bias, "bias", (weight.dtype,))
        expect_shape(bias, "bias", (weight.shape[0],), "[E]")
        expect_same_device(bias, "bias", x, "x")
    return torch.ops.robust_moe_kernels.pool_linear(x, weight, bias, impl)[0]


_FORWARD = "robust_moe_kernels::pool_linear"
_BACKWARD = "robust_moe_kernels::pool_linear_backward"
torch.library.define(_FORWARD, "(Tensor x, Tensor weight, Tensor? bias, str impl) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD,
    "(Tensor d_logits, Tensor weight, int height, int width, bool channels_last, ScalarType dtype, str impl) -> Tensor",
)


_MAPS = Operands("x float [B, C, H, W]; weight table [E, C]; bias? weight [E]")
_GRADIENT = Operands("d_logits table [B, E]; weight d_logits [E, C]")


@torch.library.impl(_FORWARD, "default")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    """(logits [B, E], means of the maps [B, C])."""
    _MAPS(x, weight, bias)
    expect(min(x.shape[1:]) >= 1, "x", "shape [B, C, H, W] with C, H, W >= 1", list(x.shape))
    bias = None if bias is None else bias.contiguous()
    return GATE.choose(impl, x).pool_linear(dense(x), weight.contiguous(), bias)


@torch.library.register_fake(_FORWARD)
def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> tuple[Tensor, Tensor]:
    _MAPS.expect_kinds(x, weight, bias)
    return weight.new_empty((x.shape[0], weight.shape[0])), weight.new_empty((x.shape[0], x.shape[1]))


@torch.library.impl(_BACKWARD, "default")
def _backward(
    d_logits: Tensor, weight: Tensor, height: int, width: int, channels_last: bool, dtype: torch.dtype, impl: str
) -> Tensor:
    """The gradient of x, in the dtype and memory format that x has."""
    _GRADIENT(d_logits, weight)
    expect(height >= 1 and width >= 1 and weight.shape[1] >= 1, "height", "C, H, W >= 1", [height, width])
    expect(dtype in FLOATS, "dtype", f"one of {FLOATS}", dtype)
    d_x = _backward_fake(d_logits, weight, height, width, channels_last, dtype, impl)
    GATE.choose(impl, weight).pool_linear_backward(d_logits.contiguous(), weight.contiguous(), d_x)
    return d_x


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    d_logits: Tensor, weight: Tensor, height: int, width: int, channels_last: bool, dtype: torch.dtype, impl: str
) -> Tensor:
    _GRADIENT.expect_kinds(d_logits, weight)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (d_logits.shape[0], weight.shape[1], height, width)
    return torch.empty(shape, dtype=dtype, device=weight.device, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.impl = inputs
    _, means = output
    ctx.size, ctx.dtype, ctx.has_bias = x.shape[2:], x.dtype, bias is not None
    ctx.channels_last = dense_format(x) == torch.channels_last
    trained = weight.requires_grad
    ctx.save_for_backward(weight, bias, means if trained else None, x if trained else None)
    ctx.mark_non_differentiable(means)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_logits: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if d_logits is None:
        return None, None, None, None
    weight, bias, means, x = ctx.saved_tensors
    if another_follows():
        if x is not None:
            return *plain_gradients(_plain, (x, weight, bias), d_logits), None
        d_means = (d_logits @ weight) / ctx.size.numel()
        return d_means.to(ctx.dtype)[:, :, None, None].expand(-1, -1, *ctx.size), None, None, None
    d_x = d_weight = d_bias = None
    if ctx.needs_input_grad[0]:
        like = (*ctx.size, ctx.channels_last, ctx.dtype, ctx.impl)
        d_x = torch.ops.robust_moe_kernels.pool_linear_backward(d_logits, weight, *like)
    if ctx.needs_input_grad[1]:
        d_weight = d_logits.t() @ means
    if ctx.has_bias and ctx.needs_input_grad[2]:
        d_bias = d_logits.sum(0)
    return d_x, d_weight, d_bias, None


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return reference_impl.pool_linear(x, weight, bias)[0]


def _twice(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("the operation pool_linear_backward has no derivative; pool_linear has any number of them")


torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _twice)  # without it PyTorch warns and returns a wrong number
