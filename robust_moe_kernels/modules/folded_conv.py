"""A convolution with the batch norm in evaluation that follows it, as one convolution with other filters and a bias;
on the CPU with the addition of a skip and the ReLU in the same operation."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV, conv_dgrad, conv_forward

__all__ = ["FoldedConv", "Norm"]

# The grouped engine with one expert takes the 3x3 convolutions of stride 1 from this many channels on. Measured on one
# core with AVX-512, float32, 128 images, oneDNN / engine in ms, forward (the gradient to the input is alike):
# 64 channels at 32x32 43 / 32, 128 at 16x16 37 / 24, 256 at 8x8 36 / 23, 512 at 4x4 40 / 22; below, see the tests.
ENGINE_CHANNELS = 32

_DENSE = {True: torch.channels_last, False: torch.contiguous_format}


class Norm(NamedTuple):
    """A batch norm's numbers, each [C]."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class FoldedConv:
    """``norm(conv2d(x, weight, bias))`` as a convolution of its own filters, for as long as none of the numbers that it
    was made of is replaced or changed in place (:meth:`is_of`).

    filters: [O, I / groups, kh, kw], weight * s for the norm's scale s = norm.weight / sqrt(variance + eps); computed
        in float64 and rounded once, to float32 or the weight's dtype, whichever is wider. The sum of a convolution then
        differs from the unfolded one by the rounding of the filters, of the order of eps * sum |weight * x| * s.
    shift: [O], norm.bias + (bias - mean) * s, likewise.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, norm: Norm) -> None:
        self._numbers = _numbers(weight, bias, norm)
        self._versions = [tensor._version for tensor in self._numbers]
        self._eps = norm.eps
        with torch.no_grad():
            scale = (norm.variance.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight.double()
            shift = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
            shift = shift * scale
            if norm.bias is not None:
                shift = shift + norm.bias.double()
            kind = torch.promote_types(weight.dtype, torch.float32)
            self.filters = (weight.double() * scale[:, None, None, None]).to(kind)  # keeps the weight's memory format
            self.shift = shift.to(kind)
        self._cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._engine: Tensor | None = None

    def is_of(self, weight: Tensor, bias: Tensor | None, norm: Norm) -> bool:
        """Whether these are the numbers that this was made of, unchanged."""
        numbers = _numbers(weight, bias, norm)
        same = len(numbers) == len(self._numbers) and all(a is b for a, b in zip(numbers, self._numbers, strict=True))
        return same and norm.eps == self._eps and [tensor._version for tensor in numbers] == self._versions

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Filters and shift in the dtype that the convolution computes in; cast once."""
        if dtype not in self._cast:
            self._cast[dtype] = (self.filters.to(dtype), self.shift.to(dtype))
        return self._cast[dtype]

    def engine_filters(self) -> Tensor:
        """[1, O, I, kh, kw] with the output channels innermost in memory, as the engine likes them."""
        if self._engine is None:
            self._engine = self.filters.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)[None]
        return self._engine

    def __call__(self, x: Tensor, other: Tensor | None, relu: bool, call: Call, dtype: torch.dtype) -> Tensor:
        """relu(conv(x) + other), in ``dtype``; without the addition or the ReLU where they are not asked for."""
        if x.device.type == "cpu" and x.dtype == dtype == torch.float32 and (other is None or _alike(other, dtype)):
            return _Fused.apply(x, other, self, call, relu)
        out = torch.conv2d(x, *self.cast(dtype), *call)
        if other is not None:
            out = out.add_(other)  # in place: neither a convolution nor an addition saves its output
        return out.relu_() if relu else out


def _alike(other: Tensor, dtype: torch.dtype) -> bool:
    return other.dtype == dtype and other.device.type == "cpu"


def _numbers(weight: Tensor, bias: Tensor | None, norm: Norm) -> list[Tensor]:
    return [tensor for tensor in (weight, bias, *norm[:4]) if tensor is not None]


class Call(NamedTuple):
    """What a convolution is called with besides its tensors."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, stride: Any, padding: Any, dilation: Any, groups: Any) -> Self | None:
        """``None`` for a form that is not two integers each, such as padding by name."""
        pairs = [tuple(pair) if isinstance(pair, tuple | list) else pair for pair in (stride, padding, dilation)]
        if not all(isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in pairs):
            return None
        return cls(*pairs, groups)

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        size = Geometry(*self[:3]).output_size(x.shape[2], x.shape[3], tuple(weight.shape[2:]))
        return (x.shape[0], weight.shape[0], *size)


class _Fused(torch.autograd.Function):
    """On the CPU, in float32: convolution, shift, addition and ReLU leave one map in memory and save one (the ReLU's
    output) for the backward, which computes the gradients to x and other alone; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, conv: FoldedConv, call: Call, relu: bool) -> Tensor:
        ctx.conv, ctx.call, ctx.relu = conv, call, relu
        last = _channels_last(x) or _channels_last(conv.filters)  # the format that conv2d would answer in
        rows = x.contiguous(memory_format=torch.channels_last)
        if _engine_takes(conv.filters, call):
            out = conv_forward(rows, conv.engine_filters(), _whole(x), None, [], _geometry(call), AUTO)
            out.add_(conv.shift[:, None, None])
        else:
            out = torch.conv2d(rows, conv.filters.contiguous(memory_format=torch.channels_last), conv.shift, *call)
        if other is not None:
            out.add_(other)
        if relu:
            out.relu_()  # not oneDNN's own, within the convolution: it makes zero of NaN, which an attack has to see
        out = out.contiguous(memory_format=_DENSE[last])
        ctx.save_for_backward(x, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        if out is not None:
            d = torch.ops.aten.threshold_backward(d, out, 0)
        d_x = None
        if ctx.needs_input_grad[0]:
            filters, call = ctx.conv.filters, ctx.call
            if _engine_takes(filters, call) and not torch.is_grad_enabled():
                rows = d.contiguous(memory_format=torch.channels_last)
                d_x = conv_dgrad(rows, ctx.conv.engine_filters(), _whole(x), [], *x.shape[2:], _geometry(call), AUTO)
                d_x = d_x.contiguous(memory_format=_DENSE[_channels_last(x)])
            else:
                d_x, _, _ = torch.ops.aten.convolution_backward(
                    d, x, filters, None, *call[:3], False, [0, 0], call.groups, [True, False, False]
                )
        return d_x, d if ctx.needs_input_grad[1] else None, None, None, None


def _engine_takes(filters: Tensor, call: Call) -> bool:
    wide = min(filters.shape[:2]) >= ENGINE_CHANNELS
    plain = filters.shape[2:] == (3, 3) and call == ((1, 1), (1, 1), (1, 1), 1)
    return wide and plain and EXPERT_CONV.why_not("native", "cpu") is None


def _whole(x: Tensor) -> Tensor:
    """All rows are the one expert's."""
    return torch.tensor([0, x.shape[0]])


def _geometry(call: Call) -> list[int]:
    return [*call.stride, *call.padding, *call.dilation]


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
