"""Experts: E ordinary modules of one form, which the grouped engine runs together where it can.

The engine reads the modules' parameters and computes what they would (see ``engine_computes``). Where it cannot, or
where a tool has changed a module so that its parameters no longer say what it does (a hook, a parametrisation, a layer
of another class), rows arrive sorted by expert with a list of counts and each module runs on its own contiguous
segment, whole. Either way: no masks, no zeros, no work for an expert without rows.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from robust_moe_kernels.layout import Geometry, dense_format, expert_of_row, pair_of
from robust_moe_kernels.modules.casts import CastFilters, converted
from robust_moe_kernels.modules.expert_norms import ExpertBatchNorm2d, copied, copies, kind_of, original
from robust_moe_kernels.modules.interception import has_hooks
from robust_moe_kernels.modules.reading import Reading, own_computation
from robust_moe_kernels.modules.stacks import Stack, filters_memory, guarded, lie_together, stacked, states
from robust_moe_kernels.modules.walk import modules_of
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV, expert_conv
from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import Route

__all__ = [
    "ConvExperts",
    "ExpertBatchNorm2d",
    "Experts",
    "by_expert",
    "engine_computes",
    "engine_dtype",
    "expect_plain_conv",
    "geometry_of",
]

_ENGINE = {
    "cpu": ("native", (torch.float32, torch.float16, torch.bfloat16)),
    "cuda": ("triton", (torch.float32, torch.float16, torch.bfloat16)),
}


def _runs(impl: str, device_type: str) -> bool:
    return EXPERT_CONV.why_not(impl, device_type) is None


# All that torch.compiler.assume_constant_result does, but for importing torch._dynamo, which took a third of the time
# in which a command starts
_runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def engine_dtype(x: Tensor) -> torch.dtype:
    """What the engine computes in: the dtype of x, inside autocast that of its convolutions."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def engine_computes(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether the grouped engine runs on this input: float32, float16 and bfloat16, on the CPU with the extension and
    on a GPU with Triton, with parameters of the dtype of x or, inside autocast, in float32."""
    if x.device.type not in _ENGINE:
        return False
    impl, dtypes = _ENGINE[x.device.type]
    dtype = engine_dtype(x)
    allowed = (dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else (dtype,)
    return (
        dtype in dtypes and all(tensor.dtype in allowed for tensor in (x, *parameters)) and _runs(impl, x.device.type)
    )


class Experts(nn.ModuleList, ABC):
    """E modules of one form under the names 0..E-1. Subclasses say which modules the engine can read.

    Args:
        modules: at least one, alike, as ``of`` of a subclass makes them; kept, and given memory next to each other
            where the engine reads it.
    """

    together: ClassVar[bool] = True  # whether the experts' tensors lie in one memory, as the engine reads them
    known: ClassVar[bool] = True  # whether ``batch_independent`` knows all that may draw or mix rows in training

    over_ranks = False  # whether every expert runs in training, for norms of all ranks (``batch_over_ranks``)

    # During an attack, what a forward has cast, one entry or none; see ``attack_mode``.
    held: list[CastFilters] | None = None

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__(modules)
        self._kinds = [kind_of(module) for module in modules_of(self[0])]
        self._warned = False  # that they run as modules
        # "reading": of the last forward. In a dict: an attribute that is None at times would count as a change of the
        # model's form, after which an attack learns anew which norms may be folded.
        self._kept: dict[str, Reading[Any]] = {}
        self._lie_together()

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self)

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Channels of the maps, or width of the tokens, that the experts take."""

    @abstractmethod
    def read(self, members: list[list[Any]]) -> Any:
        """What ``on_engine`` needs of the experts' modules; None where the engine does not compute such experts.
        ``members``: each expert's modules, itself first, in the order of ``modules()``."""

    @abstractmethod
    def on_engine(
        self, content: Any, x: Tensor, route: Route, weights: Tensor, computed: int | None = None
    ) -> Tensor | None:
        """``mix`` on the engine, of what ``read`` returned; None where the engine does not compute such input."""

    def cast(self, filters: list[Stack], stacks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The filters, whose tensors ``stacks`` are, in the engine's dtype. During an attack frozen filters are cast
        once, and again only where they were replaced or changed."""
        if all(stack.dtype == dtype for stack in stacks):
            return stacks
        if torch.compiler.is_compiling():
            return [stack.to(dtype) for stack in stacks]
        if self.held is None or any(stack.requires_grad for stack in stacks):
            return converted(stacks, dtype)
        if not self.held or not self.held[0].is_of(filters, dtype):
            self.held[:] = [CastFilters(converted(stacks, dtype), filters, states(filters))]
        return self.held[0].values

    def content(self) -> Any:
        """What ``read`` returns of the experts of today; or, as text, why each must run by itself."""
        if torch.compiler.is_compiling():
            members = self._members()
            return members if isinstance(members, str) else self.read(members)
        found = self._kept.get("reading")
        if found is None or not found.holds():
            self._kept.clear()
            members = self._members()
            if isinstance(members, str):
                return members
            found = Reading(self, members, self.read(members))
            if found.keeps:
                self._kept["reading"] = found
        return found.content

    def _members(self) -> list[list[nn.Module]] | str:
        """Each expert's modules; or why their parameters do not say what they compute, so that each must run by
        itself."""
        found = [modules_of(expert) for expert in self]
        for expert, modules in enumerate(found):
            kinds = [kind_of(module) for module in modules]
            if kinds != self._kinds:
                names = sorted({kind.__name__ for kind in kinds} - {kind.__name__ for kind in self._kinds})
                return f"expert {expert} has other layers than it was built of ({', '.join(names) or 'fewer'})"
            for module in modules:
                if has_hooks(module):
                    return f"{type(module).__name__} of expert {expert} has hooks"
                if (own := own_computation(module)) is not None:
                    return f"{type(module).__name__} of expert {expert} has a {own} of its own"
        return found

    def reset(self) -> None:
        """Initialise every expert independently, as networks of its kind are: see ``draw``."""
        for part in (part for parts in zip(*map(modules_of, self), strict=True) for part in parts):
            self.draw(part)

    def draw(self, part: nn.Module) -> None:
        """Initialise one module of an expert. A convolution: He normal by fan-out as ResNets are initialised, with zero
        bias; normalisation keeps its parameters."""
        if isinstance(part, nn.Conv2d):
            # Drawn in the engine's order whatever the format: a seed gives the same experts.
            drawn = filters_memory(part.weight.detach(), 1, innermost=True)[0]
            nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu")
            part.weight.data.copy_(drawn)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def mix(self, x: Tensor, route: Route, weights: Tensor, computed: int | None = None) -> Tensor:
        """Samples [B, ...] through the experts they are routed to, summed with weights [B, k].

        ``computed``: a bound on the pairs that are not behind ``route.offsets[E]``, where the host knows one below all.
        Off the engine this reads the segments' sizes on the host: on a GPU, the host waits for the gate.
        """
        content = self.content()
        if isinstance(content, str):
            self._warn(content)
        elif content is not None and (out := self.on_engine(content, x, route, weights, computed)) is not None:
            return out
        out = combine(self.segments(dispatch(x, route), route.counts.tolist()), route, weights)
        return out.contiguous(memory_format=dense_format(x))

    def _warn(self, reason: str) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"{reason}: the experts of this layer run one by one, as modules, which on a GPU takes several times as"
                " long as together",
                stacklevel=4,
            )

    def segments(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Rows [R, ...] sorted by expert, ``counts[e]`` of them expert e's, each through its own. Rows behind these are
        no expert's, and 0.

        With gradients an expert without rows runs on none: its parameters' gradient is 0 then, as the engine's is.
        Frozen ones, as in an attack, have none, and do not run.
        """
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        taken = sum(counts)
        every = learns or taken == 0 or (self.over_ranks and self.training)
        pairs = zip(self, rows[:taken].split(counts), strict=True)
        parts = [expert(segment) for expert, segment in pairs if every or len(segment)]
        if taken < len(rows):
            parts.append(parts[0].new_zeros(len(rows) - taken, *parts[0].shape[1:]))
        return torch.cat(parts)

    def blend(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Outputs [B, n, ...] summed with weights [B, n], in float32 at least; dtype of the outputs."""
        kind = torch.promote_types(outputs.dtype, torch.float32)
        weights = weights.to(kind).reshape(*weights.shape, *[1] * (outputs.dim() - 2))
        return (outputs.to(kind) * weights).sum(1).to(outputs.dtype)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """All of x [B, C, H, W] through one expert."""
        return self[expert](x)

    def extract(self, expert: int) -> nn.Module:
        """One expert as an ordinary module of the replaced type, with its own copy of the parameters."""
        module = original(copied(self[expert]))
        for each in module.modules():
            for value in (*each._parameters.values(), *each._buffers.values()):
                if value is not None:
                    value.data = value.data.clone(memory_format=torch.contiguous_format)
        return module.requires_grad_(True)

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all other experts, in place; those that stay are in the order given, in new memory."""
        kept = [self[expert] for expert in experts]
        self._modules.clear()
        self._modules.update({str(number): module for number, module in enumerate(kept)})
        self._kept.clear()
        self._lie_together(anew=True)

    def __getitem__(self, index: Any) -> Any:
        # Of a slice no layer is made: its memory would be laid out anew, and the experts be moved.
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        self._kept.clear()  # it would keep the old memory
        self.held = None if self.held is None else []
        innermost = any(p.dim() == 4 and not p.is_contiguous() for p in self.parameters())
        super()._apply(fn, recurse)
        contiguous = False
        if innermost:  # .to(memory_format=torch.contiguous_format) takes such filters for contiguous
            channels_last = torch.zeros(1, 2, 2, 2, device="cpu").contiguous(memory_format=torch.channels_last)
            contiguous = fn(channels_last).is_contiguous()
        self._lie_together(contiguous)
        return self

    def _lie_together(self, contiguous: bool = False, anew: bool = False) -> None:
        if self.together:
            lie_together(list(self), contiguous, anew)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lie_together()  # a copy's parameters were copied one by one

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _take_apart(state_dict, prefix, len(self))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def by_expert(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` with the names of today: of states from earlier versions, which have the experts of a layer in one
    tensor [E, ...] under the names without their numbers, each such tensor is taken apart. ``load_state_dict`` does so
    by itself; this is for comparing a state's names with the model's. A tensor of another number of experts is kept
    whole, and so not loaded."""
    found = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):  # one layer may have several names
        if isinstance(module, Experts):
            _take_apart(found, f"{name}." if name else "", len(module))
    return found


def _take_apart(state: dict[str, Any], prefix: str, count: int) -> None:
    """``by_expert`` of one layer's experts, in place; names of other modules do not start with ``prefix``."""
    for key in [key for key in state if key.startswith(prefix)]:
        name, whole = key.removeprefix(prefix), state[key]
        if isinstance(whole, Tensor) and whole.dim() > 0 and len(whole) == count and not name[:1].isdecimal():
            parts = {f"{prefix}{number}.{name}": value for number, value in enumerate(whole)}
            if not parts.keys() & state.keys():
                del state[key]
                state.update(parts)


class ConvExperts(Experts):
    """E convolutions of one geometry. State: ``{e}.weight`` [O, I/groups, kh, kw], ``{e}.bias`` [O] or none."""

    @classmethod
    def of(cls, conv: nn.Conv2d, num_experts: int) -> Self:
        """Copies of a convolution. Raises ValueError for one of another kind."""
        expect_plain_conv(conv, "conv")
        return cls(copies(conv, num_experts))

    @property
    def in_channels(self) -> int:
        first: Any = self[0]
        return first.in_channels

    def read(self, members: list[list[Any]]) -> tuple[Geometry, list[Stack]] | None:
        convs: list[Any] = [conv for (conv,) in members]
        geometry = geometry_of(convs)
        names = ("weight",) if convs[0].bias is None else ("weight", "bias")
        if geometry is None:
            return None
        stacks = [Stack.of([getattr(conv, name) for conv in convs]) for name in names]
        return (geometry, stacks) if all(stack.alike() for stack in stacks) else None

    def on_engine(
        self, content: tuple[Geometry, list[Stack]], x: Tensor, route: Route, weights: Tensor, computed: Any = None
    ) -> Tensor | None:
        geometry, stacks = content
        if not engine_computes(x, (stack.tensors[0] for stack in stacks)):
            return None
        dtype = engine_dtype(x)
        weight, *bias = stacked(stacks, stacks[:1])
        (weight,) = self.cast(stacks[:1], [weight], dtype)
        x = guarded(x, stacks[:1])
        rows = expert_conv(dispatch(x.to(dtype), route), weight, route.offsets, *geometry)
        if bias:
            expert = expert_of_row(route.offsets, len(rows))
            rows = rows + bias[0].to(dtype).index_select(0, expert)[:, :, None, None]
        out = combine(rows, route, weights)
        return out.contiguous(memory_format=dense_format(x))


def expect_plain_conv(conv: nn.Module, argument: str) -> None:
    """Raise ValueError for a convolution that computes something else than its weight says: a subclass with another
    forward, a weight that is computed (weight norm), other padding than zeros."""
    plain = isinstance(conv, nn.Conv2d) and {"weight"} <= conv.state_dict().keys() <= {"weight", "bias"}
    methods = ("forward", "_conv_forward")
    if not plain or any(getattr(type(conv), name) != getattr(nn.Conv2d, name) for name in methods):
        raise ValueError(f"{argument}: expected a plain torch.nn.Conv2d, got {type(conv).__name__}")
    if conv.padding_mode != "zeros":
        raise ValueError(f"{argument}: expected padding_mode 'zeros', got {conv.padding_mode!r}")


def geometry_of(convs: Sequence[nn.Conv2d]) -> Geometry | None:
    """The geometry that convolutions have in common, as the engine takes it; ``None`` for what it does not compute
    (groups, odd "same", one that differs)."""
    forms = {(c.stride, c.padding, c.dilation, c.groups, c.padding_mode, c.bias is None) for c in convs}
    if len(forms) != 1:
        return None
    stride, padding, dilation, groups, mode, _ = forms.pop()
    if groups != 1 or mode != "zeros":
        return None
    if isinstance(padding, str):
        high, wide = (d * (k - 1) for d, k in zip(dilation, convs[0].weight.shape[2:], strict=True))
        if padding == "same" and (high % 2 or wide % 2):
            return None
        padding = (high // 2, wide // 2) if padding == "same" else (0, 0)
    return Geometry(pair_of(stride), pair_of(padding), pair_of(dilation))
