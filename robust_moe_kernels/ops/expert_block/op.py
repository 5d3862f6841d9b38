"""What stands between the convolutions of routed residual blocks: batch norm per expert, ReLU, skip and weighted sum.

Raw operations, not differentiable by themselves: ``modules.routed_block`` composes them into a block and its gradient.
Maps are channels-last rows sorted by expert; scales and shifts are [E, C]. None waits for the device.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from robust_moe_kernels.dispatch import AUTO, ImplementationUnavailable, Op
from robust_moe_kernels.layout import channels_last, channels_last_empty

__all__ = ["EXPERT_BLOCK", "column_sums", "head_backward", "head_forward", "norm_backward", "scale_shift"]

EXPERT_BLOCK = Op(__package__, cpu=("native", "reference"), cuda=("triton", "reference"))


def _choose(impl: str, *operands: Tensor | None) -> ModuleType:
    """The implementation for these operands: the first of the device's that can compute them, or the named one."""
    tensors = [tensor for tensor in operands if tensor is not None]
    device = tensors[0].device.type
    module = EXPERT_BLOCK.choose(impl, device)
    reason = module.why_not_case(*tensors)
    if reason is None:
        return module
    if impl != AUTO:
        raise ImplementationUnavailable(f"expert_block: impl={impl!r} cannot run: {reason}")
    return EXPERT_BLOCK.choose("reference", device)


_SCALE = "Tensor scale, Tensor shift"
_SKIP = "Tensor x, Tensor? skip_scale, Tensor? skip_shift"
_HEAD = f"Tensor z, {_SCALE}, {_SKIP}, Tensor order, Tensor inverse, Tensor offsets"
_SCHEMAS = {
    "column_sums": "(Tensor value, Tensor other, Tensor offsets, Tensor? scale, Tensor? shift, str impl)"
    " -> (Tensor, Tensor)",
    "scale_shift": f"(Tensor z, Tensor offsets, {_SCALE}, bool relu, str impl) -> Tensor",
    "norm_backward": "(Tensor d, Tensor z, Tensor offsets, Tensor p, Tensor? q, Tensor? r, Tensor? scale,"
    " Tensor? shift, str impl) -> Tensor",
    "head_forward": f"({_HEAD}, Tensor weights, str impl) -> Tensor",
    "head_backward": f"(Tensor d_out, {_HEAD}, Tensor weights, str impl) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"robust_moe_kernels::{_name}", _schema)

column_sums = torch.ops.robust_moe_kernels.column_sums
scale_shift = torch.ops.robust_moe_kernels.scale_shift
norm_backward = torch.ops.robust_moe_kernels.norm_backward
head_forward = torch.ops.robust_moe_kernels.head_forward
head_backward = torch.ops.robust_moe_kernels.head_backward


@torch.library.impl("robust_moe_kernels::column_sums", "default")
def _column_sums(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """Per expert and channel, sums [E, C] float64 of value and value*other; with scale and shift only where
    other*scale + shift > 0 (the gradient through a ReLU after a batch norm of ``other``)."""
    return _choose(impl, value, other, scale, shift).column_sums(
        channels_last(value), channels_last(other), offsets, scale, shift
    )


@torch.library.register_fake("robust_moe_kernels::column_sums")
def _column_sums_fake(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, value.shape[1])
    return value.new_empty(shape, dtype=torch.float64), value.new_empty(shape, dtype=torch.float64)


@torch.library.impl("robust_moe_kernels::scale_shift", "default")
def _scale_shift(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str) -> Tensor:
    """z*scale + shift, each row with its expert's [E, C]; then ReLU if asked."""
    return _choose(impl, z, scale, shift).scale_shift(channels_last(z), offsets, scale, shift, relu)


@torch.library.register_fake("robust_moe_kernels::scale_shift")
def _scale_shift_fake(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str) -> Tensor:
    return channels_last_empty(z, tuple(z.shape))


@torch.library.impl("robust_moe_kernels::norm_backward", "default")
def _norm_backward(
    d: Tensor, z: Tensor, offsets: Tensor, p: Tensor, q: Tensor | None, r: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    """p*d' + q*z + r, the gradient through a batch norm of z; d' is d where z*scale + shift > 0 (d itself without)."""
    return _choose(impl, d, z, p, q, r, scale, shift).norm_backward(
        channels_last(d), channels_last(z), offsets, p, q, r, scale, shift
    )


@torch.library.register_fake("robust_moe_kernels::norm_backward")
def _norm_backward_fake(
    d: Tensor, z: Tensor, offsets: Tensor, p: Tensor, q: Tensor | None, r: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    return channels_last_empty(z, tuple(z.shape))


@torch.library.impl("robust_moe_kernels::head_forward", "default")
def _head_forward(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> Tensor:  # fmt: skip
    """The end of a block, [B, C, H, W]: sum over a sample's k rows of weight * relu(z*scale + shift + skip).

    skip is the sample's map of x, or, with skip_scale and skip_shift, the row's own of x*skip_scale + skip_shift.
    """
    chosen = _choose(impl, z, scale, shift, x, skip_scale, skip_shift, weights)
    return chosen.head_forward(
        channels_last(z), scale, shift, channels_last(x), skip_scale, skip_shift, order, inverse, offsets, weights
    )


@torch.library.register_fake("robust_moe_kernels::head_forward")
def _head_forward_fake(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> Tensor:  # fmt: skip
    return channels_last_empty(z, (weights.shape[0], *z.shape[1:]))


@torch.library.impl("robust_moe_kernels::head_backward", "default")
def _head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient at the ReLU's input [R, C, H, W], gradient of the weights [B, k])."""
    chosen = _choose(impl, d_out, z, scale, shift, x, skip_scale, skip_shift, weights)
    return chosen.head_backward(
        channels_last(d_out), channels_last(z), scale, shift, channels_last(x), skip_scale, skip_shift, order, inverse,
        offsets, weights,
    )  # fmt: skip


@torch.library.register_fake("robust_moe_kernels::head_backward")
def _head_backward_fake(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return channels_last_empty(z, tuple(z.shape)), torch.empty_like(weights)
