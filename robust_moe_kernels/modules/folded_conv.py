"""A convolution with the batch norm in evaluation that follows it, as one convolution with other filters and a bias;
on the CPU with the addition of a skip and the ReLU in the same operation."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.layout import Geometry, pair_of
from robust_moe_kernels.modules import cudnn_relu
from robust_moe_kernels.modules.interception import Snapshot, is_batched
from robust_moe_kernels.ops.expert_block import EXPERT_BLOCK, head_forward, scale_shift
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV, conv_dgrad, conv_forward

__all__ = ["Call", "FoldedConv", "Norm", "fuses", "scales_and_shifts"]

# The grouped engine with one expert takes the 3x3 convolutions of stride 1 from this many channels on. Measured on one
# core with AVX-512, float32, 128 images, CPU time in ms, oneDNN / engine (the gradient to the input is alike):
# 32 channels at 16x16 2.6 / 4.4, 48 at 16x16 5.9 / 6.2, 64 at 16x16 9.1 / 7.4, 64 at 32x32 55 / 42, 128 at 16x16
# 37 / 24, 256 at 8x8 36 / 23, 512 at 4x4 40 / 22. With strides of 2 oneDNN is up to three times faster.
ENGINE_CHANNELS = 64

_DENSE = {True: torch.channels_last, False: torch.contiguous_format}


class Norm(NamedTuple):
    """A batch norm's numbers, each [C]."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def scales_and_shifts(pairs: list[tuple[Tensor | None, Norm]]) -> list[tuple[Tensor, Tensor]]:
    """For each convolution's bias and norm the scale s = weight / sqrt(variance + eps) and the shift
    bias of the norm + (bias - mean) * s, [C] float64. All at once: a network's norms take some 12 launches on a GPU,
    and not each of them."""
    if not pairs:
        return []

    def joined(values: list[Tensor | None], default: float) -> Tensor:
        like = [norm.mean for _, norm in pairs]
        filled = [torch.full_like(m, default) if v is None else v for v, m in zip(values, like, strict=True)]
        return torch.cat(filled).double()

    with torch.no_grad():
        mean = joined([norm.mean for _, norm in pairs], 0.0)
        variance = joined([norm.variance for _, norm in pairs], 0.0)
        epsilons = {norm.eps for _, norm in pairs}
        if len(epsilons) == 1:
            scale = (variance + epsilons.pop()).rsqrt()
        else:
            scale = torch.cat([torch.full_like(norm.mean, norm.eps, dtype=torch.float64) for _, norm in pairs])
            scale = (variance + scale).rsqrt()
        if any(norm.weight is not None for _, norm in pairs):
            scale = scale * joined([norm.weight for _, norm in pairs], 1.0)
        if any(bias is not None for bias, _ in pairs):
            mean = mean - joined([bias for bias, _ in pairs], 0.0)
        shift = -mean * scale
        if any(norm.bias is not None for _, norm in pairs):
            shift = shift + joined([norm.bias for _, norm in pairs], 0.0)
        sizes = [len(norm.mean) for _, norm in pairs]
        return list(zip(scale.split(sizes), shift.split(sizes), strict=True))


class FoldedConv:
    """``norm(conv2d(x, weight, bias))`` as a convolution of its own filters, for as long as none of the numbers that it
    was made of is replaced, changed in place or given other memory (:meth:`is_of`).

    Filters are weight * s for the norm's scale s, computed in float64 and rounded once, to what the convolution
    computes in (on a CPU half precision is rounded from float32). The sum of a convolution then differs from the
    unfolded one by that rounding, of the order of eps * sum |weight * x| * s.

    Args:
        weight, bias: the convolution's, [O, I / groups, kh, kw] and [O] or None.
        norm: its norm's.
        table: what :func:`scales_and_shifts` made of bias and norm; None: made here.
        rows: a dictionary that an attack's convolutions share (:meth:`rows`); None: one of its own.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        norm: Norm,
        table: tuple[Tensor, Tensor] | None = None,
        rows: dict[Any, Any] | None = None,
    ) -> None:
        self._numbers = _numbers(weight, bias, norm)
        self._snapshots = [Snapshot(tensor) for tensor in self._numbers]
        self._eps = norm.eps
        self._weight = weight
        self._scale, self._shift = scales_and_shifts([(bias, norm)])[0] if table is None else table
        self._made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._engine: Tensor | None = None
        self._tables: dict[tuple[FoldedConv | None, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._rows = {} if rows is None else rows

    def is_of(self, weight: Tensor, bias: Tensor | None, norm: Norm) -> bool:
        """Whether these are the numbers that this was made of, unchanged."""
        numbers = _numbers(weight, bias, norm)
        same = len(numbers) == len(self._numbers) and all(a is b for a, b in zip(numbers, self._numbers, strict=True))
        same = same and norm.eps == self._eps
        return same and all(then.is_of(now) for then, now in zip(self._snapshots, numbers, strict=True))

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Filters [O, I / groups, kh, kw], in the weight's memory format, and shift [O], in the dtype that the
        convolution computes in; made once.

        Half precision on a CPU, one core: the product in float64 took 23 to 56 ms for 512 x 512 x 3 x 3 filters, in
        float32 1 ms; and oneDNN takes 14.6 ms for filters whose output channels lie innermost, 8.7 ms for channels-last
        ones (32 maps of 4x4).
        """
        if dtype not in self._made:
            scale, memory = self._scale, torch.preserve_format
            if dtype.itemsize < 4 and self._weight.device.type == "cpu":
                scale = scale.float()
                memory = memory if self._weight.is_contiguous() else torch.channels_last
            with torch.no_grad():
                filters = torch.empty_like(self._weight, dtype=dtype, memory_format=memory)
                torch.mul(self._weight, scale[:, None, None, None], out=filters)
                self._made[dtype] = filters, self._shift.to(dtype)
        return self._made[dtype]

    def engine_filters(self) -> Tensor:
        """Float32 [1, O, I, kh, kw] with the output channels innermost in memory, as the engine likes them."""
        if self._engine is None:
            filters, _ = self.tensors(torch.float32)
            self._engine = filters.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)[None]
        return self._engine

    def table(self, skip: FoldedConv | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A scale of one and the shift, that of ``skip`` added, [1, O], as the routed blocks' kernels take them."""
        key = skip, dtype
        if key not in self._tables:
            shift = (self._shift if skip is None else self._shift + skip._shift).to(dtype)[None]
            self._tables[key] = torch.ones_like(shift), shift
        return self._tables[key]

    def unshifted(self, x: Tensor, call: Call, dtype: torch.dtype) -> Tensor | None:
        """The convolution without its shift, for a convolution whose kernel adds both (``skip``): a launch and a pass
        over the map less. None where no kernel does."""
        if fuses(x, dtype) != "kernel":
            return None
        return torch.conv2d(x.to(dtype), self.tensors(dtype)[0], None, *call)

    def rows(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the same kernels: all rows are the one expert's [0, B], in their order [B], with weights of one [B, 1] in
        the dtype that they want. Made once for an attack's batch size."""
        key = (len(z), z.device)
        if key not in self._rows:
            order = torch.arange(len(z), device=z.device)
            ones = torch.ones(len(z), 1, dtype=torch.float32, device=z.device)
            self._rows[key] = (torch.arange(2, device=z.device) * len(z), order, ones)
        return self._rows[key]

    def __call__(
        self,
        x: Tensor,
        other: Tensor | None,
        relu: bool,
        call: Call,
        dtype: torch.dtype,
        skip: FoldedConv | None = None,
    ) -> Tensor:
        """relu(conv(x) + other), in ``dtype``; without the addition or the ReLU where they are not asked for.

        skip: the convolution that ``other`` is of where ``other`` lacks its shift (:meth:`unshifted`), which is then
            added here.
        """
        how = fuses(x, dtype)
        if how:
            return _Fused.apply(x, other, self, call, relu, dtype, how, skip)
        filters, shift = self.tensors(dtype)
        out = torch.conv2d(x, filters, shift, *call)
        if other is not None:
            out = out.add_(other)  # in place: neither a convolution nor an addition saves its output
        return out.relu_() if relu else out


def fuses(x: Tensor, dtype: torch.dtype) -> str:
    """How shift, addition and ReLU are done within the convolution's autograd node: ``"in place"``, on the CPU;
    ``"kernel"``, on a GPU with Triton, by one kernel of the routed blocks' (on the whole, one launch and one pass over
    the map instead of three); ``""``: by PyTorch, each for itself."""
    if x.device.type == "cpu":
        return "in place" if x.dtype == dtype == torch.float32 else ""
    triton = x.device.type == "cuda" and EXPERT_BLOCK.why_not("triton", "cuda") is None
    return "kernel" if triton and dtype in (torch.float32, torch.bfloat16, torch.float16) else ""


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
        for pair in (stride, padding, dilation):
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(type(n) is int for n in pair):
                return None
        return cls(pair_of(stride), pair_of(padding), pair_of(dilation), groups)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation)

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        size = self.geometry.output_size(x.shape[2], x.shape[3], weight.shape[2:])
        return (x.shape[0], weight.shape[0], *size)


class _Fused(torch.autograd.Function):
    """Convolution, shift, addition and ReLU save one map, the ReLU's output, for the backward, which computes the
    gradients to x and other alone; differentiable any number of times."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        conv: FoldedConv,
        call: Call,
        relu: bool,
        dtype: torch.dtype,
        how: str,
        skip: FoldedConv | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.conv, ctx.call, ctx.how, ctx.kind, ctx.last = conv, call, how, x.dtype, _channels_last(x)
        if how == "kernel":
            # With the dtype the layout that the convolution answers in: left to the library, an image that is not
            # channels-last costs two copies of the output's gradient in the backward (6 % of a step on an H100).
            last = ctx.last or _channels_last(conv.tensors(dtype)[0])
            x = x.to(dtype, memory_format=_DENSE[last])
            out = _by_kernel(x, other, conv, call, relu, skip)
            ctx.save_for_backward(x, out if relu else None)
            return out
        filters, shift = conv.tensors(torch.float32)
        last = _channels_last(x) or _channels_last(filters)  # the format that conv2d would answer in
        rows = x.contiguous(memory_format=torch.channels_last)
        if _engine_takes(filters, call):
            out = conv_forward(rows, conv.engine_filters(), _whole(x), None, [], call.geometry, AUTO)
            out.add_(shift[:, None, None])
        else:
            out = torch.conv2d(rows, filters.contiguous(memory_format=torch.channels_last), shift, *call)
        if other is not None:
            out.add_(other)
        if relu:
            out.relu_()  # not oneDNN's own, within the convolution: it makes zero of NaN, which an attack has to see
        out = out.contiguous(memory_format=_DENSE[last])
        ctx.save_for_backward(x, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        conv, call = ctx.conv, ctx.call
        if d is None:
            return (None,) * 8
        if out is not None:
            d = torch.ops.aten.threshold_backward(d, out, 0)
        d_x = None
        if ctx.needs_input_grad[0]:
            filters, _ = conv.tensors(x.dtype)
            engine = ctx.how == "in place" and _engine_takes(filters, call)
            if engine and not torch.is_grad_enabled() and not is_batched(d):
                rows = d.contiguous(memory_format=torch.channels_last)
                d_x = conv_dgrad(
                    rows, conv.engine_filters(), _whole(x), [], x.shape[2], x.shape[3], call.geometry, AUTO
                )
                d_x = d_x.contiguous(memory_format=_DENSE[_channels_last(x)])
            else:
                d_x, _, _ = torch.ops.aten.convolution_backward(
                    d, x, filters, None, *call[:3], False, [0, 0], call.groups, [True, False, False]
                )
            # batched gradients have one dimension more than the format is made for
            d_x = d_x.to(ctx.kind) if is_batched(d) else d_x.to(ctx.kind, memory_format=_DENSE[ctx.last])
        return d_x, d if ctx.needs_input_grad[1] else None, *[None] * 6


def _by_kernel(
    x: Tensor, other: Tensor | None, conv: FoldedConv, call: Call, relu: bool, skip: FoldedConv | None
) -> Tensor:
    """The convolution, and what follows by one kernel where the map is channels-last, as those kernels want it."""
    filters, _ = conv.tensors(x.dtype)
    if relu and cudnn_relu.takes(x, filters, call.groups):
        return cudnn_relu.conv_relu(x, filters, other, conv.table(skip, x.dtype)[1][0], *call)
    one, shift = conv.table(skip)
    z = torch.conv2d(x, filters, None, *call)
    offsets, order, ones = conv.rows(z)
    if _channels_last(z) and other is None:
        return scale_shift(z, offsets, one, shift, relu, AUTO)
    if other is not None and relu and _channels_last(z) and _channels_last(other):
        return head_forward(z, one, shift, other, None, None, order, order, offsets, ones, AUTO)
    out = z.float().add_(shift[0, :, None, None])
    out = out if other is None else out.add_(other)
    return (out.relu_() if relu else out).to(z.dtype)


def _engine_takes(filters: Tensor, call: Call) -> bool:
    wide = min(filters.shape[:2]) >= ENGINE_CHANNELS
    plain = filters.shape[2:] == (3, 3) and call == ((1, 1), (1, 1), (1, 1), 1)
    return wide and plain and EXPERT_CONV.why_not("native", "cpu") is None


def _whole(x: Tensor) -> Tensor:
    """All rows are the one expert's."""
    return torch.tensor([0, x.shape[0]])


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
