"""What stands between the convolutions of routed residual blocks: batch norm per expert, ReLU, skip and weighted sum.

Raw operations, not differentiable by themselves: ``modules.routed_block`` composes them into a block and its gradient.
Maps are channels-last rows sorted by expert; scales and shifts are [E, C]. None waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect
from robust_moe_kernels.dispatch import Op
from robust_moe_kernels.layout import channels_last, channels_last_empty
from robust_moe_kernels.operands import expect_index, expect_offsets, expect_together
from robust_moe_kernels.ops.expert_block.checks import OPERANDS, checked_head, checked_norm

__all__ = [
    "EXPERT_BLOCK",
    "column_sums",
    "head_backward",
    "head_forward",
    "head_norm_backward",
    "norm_backward",
    "norm_finalise",
    "norm_finalise_backward",
    "scale_shift",
    "share_count",
    "sum_rows",
]

EXPERT_BLOCK = Op(__package__, cpu=("native", "reference"), cuda=("triton", "native", "reference"))


_SHARES = 64  # most shares of one expert's pixels
_PIXELS = 64  # fewest pixels of a share, on average
_PROGRAMS = 528  # summing programs wanted: four for each of an H200's 132 multiprocessors


def share_count(value: Tensor, offsets: Tensor) -> int:
    """Shares that ``column_sums`` of rows ``value`` is best divided into: enough programs for a GPU, one on a CPU."""
    experts, (rows, channels, height, width) = offsets.shape[0] - 1, value.shape
    if value.device.type == "cpu" or channels == 0:
        return 1
    programs = experts * -(-channels // (64 if channels <= 64 else 128))
    return max(1, min(_SHARES, _PROGRAMS // programs, rows * height * width // (experts * _PIXELS)))


_SCALE = "Tensor scale, Tensor shift"
_SKIP = "Tensor x, Tensor? skip_scale, Tensor? skip_shift"
_HEAD = f"Tensor z, {_SCALE}, {_SKIP}, Tensor order, Tensor inverse, Tensor offsets"
_SCHEMAS = {
    "column_sums": "(Tensor value, Tensor other, Tensor offsets, Tensor? scale, Tensor? shift, int shares, str impl)"
    " -> Tensor",
    "norm_finalise": "(Tensor shares, Tensor offsets, int pixels, Tensor weight, Tensor bias, Tensor running_mean,"
    " Tensor running_var, Tensor tracked, float eps, float momentum, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_finalise_backward": "(Tensor shares, Tensor offsets, int pixels, Tensor scale, Tensor mean, Tensor rstd,"
    " bool training, str impl) -> Tensor[]",
    "scale_shift": f"(Tensor z, Tensor offsets, {_SCALE}, bool relu, str impl) -> Tensor",
    "norm_backward": "(Tensor d, Tensor z, Tensor offsets, Tensor p, Tensor? q, Tensor? r, Tensor? scale,"
    " Tensor? shift, str impl) -> Tensor",
    "head_forward": f"({_HEAD}, Tensor weights, str impl) -> Tensor",
    "head_backward": f"(Tensor d_out, {_HEAD}, Tensor weights, str impl) -> (Tensor, Tensor)",
    "head_norm_backward": f"(Tensor d_out, {_HEAD}, Tensor weights, str impl) -> (Tensor, Tensor, Tensor)",
    "sum_rows": "(Tensor rows, Tensor other, Tensor inverse, int top_k, str impl) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"robust_moe_kernels::{_name}", _schema)

column_sums = torch.ops.robust_moe_kernels.column_sums
scale_shift = torch.ops.robust_moe_kernels.scale_shift
norm_backward = torch.ops.robust_moe_kernels.norm_backward
head_forward = torch.ops.robust_moe_kernels.head_forward
head_backward = torch.ops.robust_moe_kernels.head_backward
head_norm_backward = torch.ops.robust_moe_kernels.head_norm_backward
norm_finalise = torch.ops.robust_moe_kernels.norm_finalise
norm_finalise_backward = torch.ops.robust_moe_kernels.norm_finalise_backward
sum_rows = torch.ops.robust_moe_kernels.sum_rows


@torch.library.impl("robust_moe_kernels::column_sums", "default")
def _column_sums(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, shares: int, impl: str
) -> Tensor:
    """Per expert and channel, sums of value and of value*other; with scale and shift only where other*scale + shift > 0
    (the gradient through a ReLU after a batch norm of ``other``).

    [2, shares, E, C] float64, the sums being those over the shares, in order: which pixels are in which share is the
    implementation's choice. ``share_count`` says how many shares there should be.
    """
    sizes = OPERANDS["column_sums"](value, other, offsets, scale, shift)
    expect_together(scale, "scale", shift, "shift")
    expect(1 <= shares < 2**16, "shares", "1 <= shares < 2^16", shares)
    offsets = expect_offsets(offsets, sizes["R"])
    return EXPERT_BLOCK.choose(impl, value, other, scale, shift).column_sums(
        channels_last(value), channels_last(other), offsets, scale, shift, shares
    )


@torch.library.register_fake("robust_moe_kernels::column_sums")
def _column_sums_fake(
    value: Tensor, other: Tensor, offsets: Tensor, scale: Tensor | None, shift: Tensor | None, shares: int, impl: str
) -> Tensor:
    OPERANDS["column_sums"].expect_kinds(value, other, offsets, scale, shift)
    return value.new_empty((2, shares, offsets.shape[0] - 1, value.shape[1]), dtype=torch.float64)


@torch.library.impl("robust_moe_kernels::norm_finalise", "default")
def _norm_finalise(
    shares: Tensor, offsets: Tensor, pixels: int, weight: Tensor, bias: Tensor, running_mean: Tensor,
    running_var: Tensor, tracked: Tensor, eps: float, momentum: float, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A batch norm in training, from the sums of its input z and of z*z over rows of ``pixels`` pixels.

    Returns (scale, shift, mean, rstd, running mean, running variance, tracked), all [E, C] but the last [E]: the norm
    as z*scale + shift with its mean and inverse deviation, in float32 (float64 for a float64 norm) and computed in
    float64, and what this batch makes of the running statistics, whose own tensors are left alone. The variance is
    biased where it divides and unbiased where it is tracked. An expert without values leaves its statistics as they
    are; with a single value a channel it has inverse deviation 0 and leaves its running variance.
    """
    parameters = (weight, bias, running_mean, running_var)
    sizes = OPERANDS["norm_finalise"](shares, offsets, *parameters, tracked)
    offsets = checked_norm(offsets, pixels, sizes)
    dense = [tensor.contiguous() for tensor in (*parameters, tracked)]
    return EXPERT_BLOCK.choose(impl, *parameters).norm_finalise(
        shares.contiguous(), offsets, pixels, *dense, eps, momentum
    )


@torch.library.register_fake("robust_moe_kernels::norm_finalise")
def _norm_finalise_fake(
    shares: Tensor, offsets: Tensor, pixels: int, weight: Tensor, bias: Tensor, running_mean: Tensor,
    running_var: Tensor, tracked: Tensor, eps: float, momentum: float, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    OPERANDS["norm_finalise"].expect_kinds(shares, offsets, weight, bias, running_mean, running_var, tracked)
    kinds = [torch.promote_types(weight.dtype, torch.float32)] * 4 + [running_mean.dtype, running_var.dtype]
    return (*(weight.new_empty(weight.shape, dtype=kind) for kind in kinds), tracked.new_empty(tracked.shape))


@torch.library.impl("robust_moe_kernels::norm_finalise_backward", "default")
def _norm_finalise_backward(
    shares: Tensor, offsets: Tensor, pixels: int, scale: Tensor, mean: Tensor, rstd: Tensor, training: bool, impl: str
) -> list[Tensor]:
    """From the sums of the gradient d after a batch norm of z and of d*z: [gradient of its weight, of its bias], and in
    training also [q, r] of the gradient before the norm, scale*d + q*z + r; all [E, C] in the dtype of scale."""
    offsets = checked_norm(offsets, pixels, OPERANDS["norm_finalise_backward"](shares, offsets, scale, mean, rstd))
    tables = [table.contiguous() for table in (scale, mean, rstd)]
    return EXPERT_BLOCK.choose(impl, *tables).norm_finalise_backward(
        shares.contiguous(), offsets, pixels, *tables, training
    )


@torch.library.register_fake("robust_moe_kernels::norm_finalise_backward")
def _norm_finalise_backward_fake(
    shares: Tensor, offsets: Tensor, pixels: int, scale: Tensor, mean: Tensor, rstd: Tensor, training: bool, impl: str
) -> list[Tensor]:
    OPERANDS["norm_finalise_backward"].expect_kinds(shares, offsets, scale, mean, rstd)
    return [scale.new_empty(scale.shape) for _ in range(4 if training else 2)]


@torch.library.impl("robust_moe_kernels::scale_shift", "default")
def _scale_shift(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str) -> Tensor:
    """z*scale + shift, each row with its expert's [E, C]; then ReLU if asked."""
    sizes = OPERANDS["scale_shift"](z, offsets, scale, shift)
    offsets = expect_offsets(offsets, sizes["R"])
    return EXPERT_BLOCK.choose(impl, z, scale, shift).scale_shift(channels_last(z), offsets, scale, shift, relu)


@torch.library.register_fake("robust_moe_kernels::scale_shift")
def _scale_shift_fake(z: Tensor, offsets: Tensor, scale: Tensor, shift: Tensor, relu: bool, impl: str) -> Tensor:
    OPERANDS["scale_shift"].expect_kinds(z, offsets, scale, shift)
    return channels_last_empty(z, tuple(z.shape))


@torch.library.impl("robust_moe_kernels::norm_backward", "default")
def _norm_backward(
    d: Tensor, z: Tensor, offsets: Tensor, p: Tensor, q: Tensor | None, r: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    """p*d' + q*z + r, the gradient through a batch norm of z; d' is d where z*scale + shift > 0 (d itself without)."""
    sizes = OPERANDS["norm_backward"](d, z, offsets, p, q, r, scale, shift)
    expect_together(q, "q", r, "r")
    expect_together(scale, "scale", shift, "shift")
    offsets = expect_offsets(offsets, sizes["R"])
    return EXPERT_BLOCK.choose(impl, d, z, p, q, r, scale, shift).norm_backward(
        channels_last(d), channels_last(z), offsets, p, q, r, scale, shift
    )


@torch.library.register_fake("robust_moe_kernels::norm_backward")
def _norm_backward_fake(
    d: Tensor, z: Tensor, offsets: Tensor, p: Tensor, q: Tensor | None, r: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, impl: str,
) -> Tensor:  # fmt: skip
    OPERANDS["norm_backward"].expect_kinds(d, z, offsets, p, q, r, scale, shift)
    return channels_last_empty(z, tuple(z.shape))


@torch.library.impl("robust_moe_kernels::head_forward", "default")
def _head_forward(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> Tensor:  # fmt: skip
    """The end of a block, [B, C, H, W]: sum over a sample's k rows of weight * relu(z*scale + shift + skip).

    skip is the sample's map of x, or, with skip_scale and skip_shift, the row's own of x*skip_scale + skip_shift.
    """
    sizes = OPERANDS["head"](z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights)
    order, inverse, offsets = checked_head(x, skip_scale, skip_shift, order, inverse, offsets, sizes)
    chosen = EXPERT_BLOCK.choose(impl, z, scale, shift, x, skip_scale, skip_shift, weights)
    return chosen.head_forward(
        channels_last(z), scale, shift, channels_last(x), skip_scale, skip_shift, order, inverse, offsets, weights
    )


@torch.library.register_fake("robust_moe_kernels::head_forward")
def _head_forward_fake(
    z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None, skip_shift: Tensor | None,
    order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> Tensor:  # fmt: skip
    OPERANDS["head"].expect_kinds(z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights)
    return channels_last_empty(z, (weights.shape[0], *z.shape[1:]))


@torch.library.impl("robust_moe_kernels::head_backward", "default")
def _head_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient at the ReLU's input [R, C, H, W], gradient of the weights [B, k])."""
    sizes = OPERANDS["head_backward"](
        d_out, z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights
    )  # fmt: skip
    order, inverse, offsets = checked_head(x, skip_scale, skip_shift, order, inverse, offsets, sizes)
    chosen = EXPERT_BLOCK.choose(impl, d_out, z, scale, shift, x, skip_scale, skip_shift, weights)
    return chosen.head_backward(
        channels_last(d_out), channels_last(z), scale, shift, channels_last(x), skip_scale, skip_shift, order, inverse,
        offsets, weights,
    )  # fmt: skip


@torch.library.register_fake("robust_moe_kernels::head_backward")
def _head_backward_fake(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    OPERANDS["head_backward"].expect_kinds(
        d_out, z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights
    )  # fmt: skip
    return channels_last_empty(z, tuple(z.shape)), torch.empty_like(weights)


@torch.library.impl("robust_moe_kernels::head_norm_backward", "default")
def _head_norm_backward(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ``head_backward``, and on through the norms before the ReLU, which are in evaluation: (gradient of z, gradient
    of the skip's rows or, with skip_scale, of x, gradient of the weights [B, k])."""
    sizes = OPERANDS["head_backward"](
        d_out, z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights
    )  # fmt: skip
    order, inverse, offsets = checked_head(x, skip_scale, skip_shift, order, inverse, offsets, sizes)
    chosen = EXPERT_BLOCK.choose(impl, d_out, z, scale, shift, x, skip_scale, skip_shift, weights)
    return chosen.head_norm_backward(
        channels_last(d_out), channels_last(z), scale, shift, channels_last(x), skip_scale, skip_shift, order, inverse,
        offsets, weights,
    )  # fmt: skip


@torch.library.register_fake("robust_moe_kernels::head_norm_backward")
def _head_norm_backward_fake(
    d_out: Tensor, z: Tensor, scale: Tensor, shift: Tensor, x: Tensor, skip_scale: Tensor | None,
    skip_shift: Tensor | None, order: Tensor, inverse: Tensor, offsets: Tensor, weights: Tensor, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    OPERANDS["head_backward"].expect_kinds(
        d_out, z, scale, shift, x, skip_scale, skip_shift, order, inverse, offsets, weights
    )  # fmt: skip
    shape = tuple(z.shape)
    return channels_last_empty(z, shape), channels_last_empty(z, shape), torch.empty_like(weights)


@torch.library.impl("robust_moe_kernels::sum_rows", "default")
def _sum_rows(rows: Tensor, other: Tensor, inverse: Tensor, top_k: int, impl: str) -> Tensor:
    """[B, C, H, W]: the sum over a sample's k rows of rows + other, in slot order."""
    sizes = OPERANDS["sum_rows"](rows, other, inverse)
    ok = top_k >= 1 and sizes["R"] % top_k == 0
    expect(ok, "top_k", f"k >= 1 that divides R = {sizes['R']}", top_k)
    inverse = expect_index(inverse, "inverse", sizes["R"])
    chosen = EXPERT_BLOCK.choose(impl, rows, other)
    return chosen.sum_rows(channels_last(rows), channels_last(other), inverse, top_k)


@torch.library.register_fake("robust_moe_kernels::sum_rows")
def _sum_rows_fake(rows: Tensor, other: Tensor, inverse: Tensor, top_k: int, impl: str) -> Tensor:
    OPERANDS["sum_rows"].expect_kinds(rows, other, inverse)
    return channels_last_empty(rows, (inverse.shape[0] // top_k, *rows.shape[1:]))
