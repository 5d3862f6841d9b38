"""Experts with stacked parameters: every tensor of the replaced module with a leading dimension E.

Where the engine can compute them (see ``engine_computes``), all experts run in one grouped operation. Elsewhere rows
arrive sorted by expert with a list of counts and each expert runs on its own contiguous segment, whole. Either way: no
masks, no zeros, no work for an expert without rows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.layout import Geometry, dense_format, expert_of_row, pair_of
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV, expert_conv
from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import Route

__all__ = [
    "ExpertModule",
    "Experts",
    "StackedBatchNorm2d",
    "StackedConv2d",
    "engine_computes",
    "engine_dtype",
    "keep_rows",
    "keep_statistics",
]


def _stack(tensor: Tensor, num_experts: int) -> Tensor:
    return tensor.detach().expand(num_experts, *tensor.shape).clone()


def _output_innermost(weight: Tensor) -> Tensor:
    """Filters [E, O, I, kh, kw] laid out as [E, kh, kw, I, O]: the order in which the engine reads and writes them."""
    return _innermost_view(_innermost(weight).contiguous())


def keep_rows(module: nn.Module, rows: Sequence[int]) -> None:
    """Replace each parameter and buffer of the module, its submodules' apart, by its entries ``rows`` along the first
    dimension, in the same memory format."""
    for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        kept = value.detach()[list(rows)]
        kept = _output_innermost(kept) if kept.dim() == 5 else kept.contiguous(memory_format=dense_format(value))
        trained = isinstance(value, nn.Parameter)
        setattr(module, name, nn.Parameter(kept, value.requires_grad) if trained else kept)


def _innermost(weight: Tensor) -> Tensor:
    return weight.permute(0, 3, 4, 2, 1)


def _innermost_view(weight: Tensor) -> Tensor:
    return weight.permute(0, 4, 3, 1, 2)


_ENGINE = {
    "cpu": ("native", (torch.float32,)),
    "cuda": ("triton", (torch.float32, torch.float16, torch.bfloat16)),
}


@torch.compiler.assume_constant_result
def _runs(impl: str, device_type: str) -> bool:
    return EXPERT_CONV.why_not(impl, device_type) is None


def engine_dtype(x: Tensor) -> torch.dtype:
    """What the engine computes in: the dtype of x, inside autocast that of its convolutions."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def engine_computes(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether the grouped engine runs on this input: float32 on the CPU with the extension, outside autocast; float32,
    float16 and bfloat16 on a GPU with Triton, with parameters of the dtype of x or, inside autocast, in float32."""
    if x.device.type not in _ENGINE:
        return False
    impl, dtypes = _ENGINE[x.device.type]
    dtype = engine_dtype(x)
    allowed = (dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else (dtype,)
    return (
        dtype in dtypes and all(tensor.dtype in allowed for tensor in (x, *parameters)) and _runs(impl, x.device.type)
    )


class ExpertModule(Protocol):
    """A module that a :class:`~robust_moe_kernels.modules.MoELayer` sends samples to: :class:`Experts`, or whole
    networks."""

    in_channels: int  # of the maps that the experts take

    @property
    def num_experts(self) -> int:
        """E."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """At least one; their device and dtype are those of the input."""

    def one(self, expert: int, x: Tensor) -> Tensor:
        """All of x [B, C, H, W] through one expert."""

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        """Samples [B, C, H, W] through the experts they are routed to, summed with weights [B, k]."""

    def extract(self, expert: int) -> nn.Module:
        """One expert as an ordinary module, with its own copy of the parameters."""

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all other experts, in place."""


class Experts(nn.Module, ABC):
    """E copies of a module, run by segments. Subclasses say how one expert computes."""

    num_experts: int
    in_channels: int  # of the maps that the experts take

    def __init__(self, template: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        # The replaced module without its numbers, to rebuild single experts; in a tuple, so that it is no submodule.
        self._template = (copy.deepcopy(template).to("meta"),)

    @abstractmethod
    def unbind(self) -> list[Any]:
        """Each expert's parameters, as ``run`` takes them; unbound once a forward, so that gradients are stacked
        once."""

    @abstractmethod
    def run(self, x: Tensor, parameters: Any) -> Tensor:
        """One expert on its rows [n, C, H, W]."""

    def reset(self) -> None:
        """Initialise every expert's convolutions independently; normalisation keeps the replaced module's
        parameters."""
        for module in self.modules():
            if isinstance(module, StackedConv2d):
                module.reset()

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows [R, C, H, W] sorted by expert, ``counts[e]`` of them expert e's -> [R, C', H', W']."""
        segments = rows.split(counts)
        outputs = [
            self.run(segment, parameters)
            for segment, parameters in zip(segments, self.unbind(), strict=True)
            if segment.shape[0]
        ]
        if not outputs:  # an empty batch still has an output shape
            return self.one(0, rows)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        """Samples [B, C, H, W] through the experts they are routed to, summed with weights [B, k] -> [B, C', H', W'].

        Reads the segments' sizes on the host: on a GPU, the host waits for the gate.
        """
        return combine(self(dispatch(x, route), route.counts.tolist()), route, weights)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """All of x [B, C, H, W] through one expert."""
        return self.run(x, self.unbind()[expert])

    def extract(self, expert: int) -> nn.Module:
        """One expert as an ordinary module of the replaced type, with its own copy of the parameters."""
        module = copy.deepcopy(self._template[0])
        state = {
            name: value[expert].detach().clone(memory_format=torch.contiguous_format)
            for name, value in self.state_dict().items()
        }
        module.load_state_dict(state, assign=True)
        return module.train(self.training).requires_grad_(True)

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all other experts, in place: new parameters and buffers, with ``len(experts)`` as their leading
        dimension, in the order given. Optimisers that hold the old ones do not follow."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.num_experts = len(experts)
            keep_rows(module, experts)


class StackedConv2d(Experts):
    """E convolutions of one geometry. State: ``weight`` [E, O, I/groups, kh, kw], ``bias`` [E, O] or None.

    In memory the weight's output channels lie innermost, as the engine reads them: like a model in channels-last
    format, its parameters are dense but not contiguous. What insists on contiguous tensors (safetensors,
    parameters_to_vector, LBFGS, FSDP2) needs ``.contiguous()`` copies, and an optimiser's state must keep the
    parameters' layout, as torch.save does.
    """

    def __init__(self, conv: nn.Conv2d, num_experts: int) -> None:
        # A subclass with another forward, or a weight that is computed (weight norm), would lose that silently.
        plain = isinstance(conv, nn.Conv2d) and {"weight"} <= conv.state_dict().keys() <= {"weight", "bias"}
        if not plain or (type(conv).forward, type(conv)._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
            raise ValueError(f"conv: expected a plain torch.nn.Conv2d, got {type(conv).__name__}")
        super().__init__(conv, num_experts)
        if conv.padding_mode != "zeros":
            raise ValueError(f"conv: expected padding_mode 'zeros', got {conv.padding_mode!r}")
        self.weight = nn.Parameter(_output_innermost(_stack(conv.weight, num_experts)))
        self.bias = None if conv.bias is None else nn.Parameter(_stack(conv.bias, num_experts))
        self.in_channels = conv.in_channels
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # As a matrix: fn keeps the layout then, and .to(memory_format=torch.channels_last), which refuses five
        # dimensions, has nothing to change.
        def as_matrix(tensor: Tensor) -> Tensor:
            if tensor.dim() != 5:
                return fn(tensor)
            stored = _innermost(tensor).contiguous()
            return _innermost_view(fn(stored.flatten(0, 3)).unflatten(0, stored.shape[:4]))

        return super()._apply(as_matrix, recurse)

    def geometry(self) -> Geometry | None:
        """As the engine takes it, or ``None`` for what it does not compute (groups, odd
        "same")."""
        padding = self.padding
        if self.groups != 1:
            return None
        if isinstance(padding, str):
            high, wide = (d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[3:], strict=True))
            if padding == "same" and (high % 2 or wide % 2):
                return None
            padding = (high // 2, wide // 2) if padding == "same" else (0, 0)
        return Geometry(pair_of(self.stride), pair_of(padding), pair_of(self.dilation))

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        geometry = self.geometry()
        if geometry is None or not engine_computes(x, self.parameters()):
            return super().mix(x, route, weights)
        dtype = engine_dtype(x)
        rows = dispatch(x.to(dtype), route)
        rows = expert_conv(rows, self.weight.to(dtype), route.offsets, *geometry)
        if self.bias is not None:
            expert = expert_of_row(route.offsets, len(rows))
            rows = rows + self.bias.index_select(0, expert)[:, :, None, None]
        out = combine(rows, route, weights)
        return out.contiguous(memory_format=dense_format(x))

    def unbind(self) -> list[Any]:
        biases = [None] * self.num_experts if self.bias is None else self.bias.unbind(0)
        return list(zip(self.weight.unbind(0), biases, strict=True))

    def run(self, x: Tensor, parameters: tuple[Tensor, Tensor | None]) -> Tensor:
        return F.conv2d(x, *parameters, self.stride, self.padding, self.dilation, self.groups)

    def reset(self) -> None:
        """Draw every expert anew: He normal by fan-out, as ResNets are initialised; zero bias."""
        for weight in self.weight.data:
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class StackedBatchNorm2d(nn.Module):
    """E batch normalisations; each sees its own expert's rows only.

    In training, an expert without rows keeps its running statistics. An expert with a single value a channel (n*H*W =
    1) has variance 0: its output is its bias, no gradient flows to its input, its running mean moves and its running
    variance, whose unbiased estimate does not exist, stays.
    """

    running_mean: Tensor  # [E, C], as the next
    running_var: Tensor
    num_batches_tracked: Tensor  # [E]

    def __init__(self, norm: nn.BatchNorm2d, num_experts: int) -> None:
        super().__init__()
        if not norm.affine or not norm.track_running_stats or norm.momentum is None:
            raise ValueError(
                "norm: expected BatchNorm2d with affine=True, track_running_stats=True and a numeric momentum, got"
                f" affine={norm.affine}, track_running_stats={norm.track_running_stats}, momentum={norm.momentum}"
            )
        self.weight = nn.Parameter(_stack(norm.weight, num_experts))
        self.bias = nn.Parameter(_stack(norm.bias, num_experts))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, _stack(getattr(norm, name), num_experts))
        self.eps, self.momentum = norm.eps, norm.momentum

    def unbind(self) -> list[Any]:
        """Per-expert (index, weight, bias)."""
        return list(zip(range(self.weight.shape[0]), self.weight.unbind(0), self.bias.unbind(0), strict=True))

    def run(self, x: Tensor, parameters: tuple[int, Tensor, Tensor]) -> Tensor:
        """One expert's normalisation of its rows [n, C, H, W]."""
        expert, weight, bias = parameters
        if x.shape[0] == 0:
            return x
        # .data: all experts share one buffer, and a counted in-place change of one slice would invalidate what autograd
        # keeps of the others.
        mean, variance = self.running_mean.data[expert], self.running_var.data[expert]
        if self.training:
            self.num_batches_tracked[expert].add_(1)  # counted: by this a folded norm knows that its numbers moved
            if x.numel() == x.shape[1]:
                mean.lerp_(x.detach().flatten().to(mean.dtype), self.momentum)
                return bias.view(1, -1, 1, 1).expand_as(x).to(x.dtype)
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)


@torch.no_grad()
def keep_statistics(norms: Sequence[StackedBatchNorm2d], moved: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give norms the running means, running variances and numbers of batches that ``routed_block`` found for them.

    In two operations for all norms. ``.data`` as in ``run``, but for the numbers of batches, whose change is counted
    there too; copies, so that the buffers stay the tensors that others may hold.
    """
    means, variances, batches = zip(*moved, strict=True)
    buffers = [norm.running_mean.data for norm in norms] + [norm.running_var.data for norm in norms]
    torch._foreach_copy_(buffers, [*means, *variances])
    torch._foreach_copy_([norm.num_batches_tracked for norm in norms], list(batches))
