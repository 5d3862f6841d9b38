"""The same tensor of every expert as one tensor [E, ...].

Experts are ordinary modules with parameters of their own; the engine reads all experts' at once. So that it need not
copy them, they lie one after the other in one memory (:func:`lie_together`), which :func:`stacked` names as one tensor.
Where somebody has given an expert other memory since, a copy is made: the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from robust_moe_kernels.modules.interception import Snapshot

__all__ = ["Stack", "filters_memory", "guarded", "lie_together", "overwrite", "same", "stacked", "states", "unchanged"]

_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # not what tools put in their place, whose memory is theirs


def _tensors_by_name(modules: Iterable[nn.Module]) -> list[tuple[Tensor, ...]]:
    """For each parameter and buffer that all of the modules have: that of every module."""
    tables = [dict((*module.named_parameters(), *module.named_buffers())) for module in modules]
    return [tuple(table[name] for table in tables) for name in tables[0] if all(name in table for table in tables)]


@torch.no_grad()
def lie_together(modules: Sequence[nn.Module], contiguous: bool = False, anew: bool = False) -> None:
    """Give the modules' parameters and buffers memory one after the other, without changing a number.

    Filters that are contiguous stay so. If any are not, as ``model.to(memory_format=torch.channels_last)`` leaves them,
    the output channels of all come to lie innermost, the order in which the engine reads and writes filters;
    ``contiguous``: they become contiguous. Tensors that processes share stay where they are. ``anew``: all are copied,
    so that nothing keeps the memory that they had. Nothing is allocated where they lie so already.
    """
    groups = _tensors_by_name(modules)
    filters = [tensor for group in groups for tensor in group if tensor.dim() == 4]
    innermost = not contiguous and not all(tensor.is_contiguous() for tensor in filters)
    for group in groups:
        first, count = group[0], len(group)
        forms = {(type(t) in _PLAIN, t.shape, t.dtype, t.device, t.layout, t.is_inference()) for t in group}
        if forms != {(True, first.shape, first.dtype, first.device, torch.strided, False)}:
            continue
        if first.device.type == "cpu" and any(type(t) is not FakeTensor and t.is_shared() for t in group):
            continue
        last = innermost and first.dim() == 4
        if not anew and first.stride() == _strides(first.shape, last) and _step(group) == first.numel():
            continue
        for tensor, view in zip(group, filters_memory(first, count, last), strict=True):
            view.copy_(tensor)
            tensor.data = view


def filters_memory(like: Tensor, count: int, innermost: bool) -> Tensor:
    """Uninitialised [count, *like.shape]; ``innermost``: filters [O, I, kh, kw] as [kh, kw, I, O] in memory."""
    return like.new_empty_strided((count, *like.shape), (like.numel(), *_strides(like.shape, innermost)))


def _strides(shape: Sequence[int], innermost: bool) -> tuple[int, ...]:
    """Of one tensor in that memory: contiguous, or with the dimensions in the order that ``filters_memory`` says."""
    strides, step = [0] * len(shape), 1
    for dim in (0, 1, 3, 2) if innermost else reversed(range(len(shape))):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _step(tensors: Sequence[Tensor]) -> int | None:
    """How many elements after one tensor the next begins; None where they do not lie in one memory at equal steps."""
    first = tensors[0]
    shape, stride = first.shape, first.stride()
    if any(type(t) not in _PLAIN or t.stride() != stride or t.shape != shape for t in tensors):
        return None
    if len(tensors) == 1:
        return int(first.numel())
    if first.is_meta or isinstance(first, FakeTensor):  # no numbers, but a memory all the same
        places = [t.storage_offset() if _memory_of(t) == _memory_of(first) else -1 for t in tensors]
    else:
        size = first.element_size()
        places = [t.data_ptr() // size for t in tensors]
    step = int(places[1] - places[0])
    if step < first.numel() or step == 0 or any(place != places[0] + i * step for i, place in enumerate(places)):
        return None
    # Neighbours in memory may still be separate allocations: the first one's must hold them all.
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    end = first.storage_offset() + step * (len(tensors) - 1) + reach
    return step if end * first.element_size() <= first.untyped_storage().nbytes() else None


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Stack(NamedTuple):
    """A tensor of every expert, all of one form."""

    tensors: tuple[Tensor, ...]
    named: Tensor | None  # their memory as one tensor, without gradient; None where they do not lie together

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Self:
        with torch._C.DisableTorchFunction():  # or each question would pass through every mode of an attack
            step = None if torch.compiler.is_compiling() else _step(tensors)  # a graph cannot ask where tensors lie
            if step is None:
                return cls(tuple(tensors), None)
            first = tensors[0].detach()  # changes in place are counted with the first tensor
            size, stride = (len(tensors), *first.shape), (step, *first.stride())
            return cls(tuple(tensors), first.as_strided(size, stride, first.storage_offset()))

    def alike(self) -> bool:
        """Whether the tensors can be one."""
        return len({(t.shape, t.dtype, t.device) for t in self.tensors}) == 1

    def learns(self) -> bool:
        """Whether a gradient of any of them will be asked for."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def whole(self) -> Tensor:
        """As one tensor [E, ...], without gradient where they lie together."""
        return torch.stack(self.tensors) if self.named is None else self.named.detach()


def same(stacks: list[Stack], others: list[Stack]) -> bool:
    """Whether they are of the same tensors, and where all experts' lie together, in the same memory."""
    return stacks is others or all(
        all(a is b for a, b in zip(s.tensors, o.tensors, strict=True)) and _address(s.named) == _address(o.named)
        for s, o in zip(stacks, others, strict=True)
    )


def _address(tensor: Tensor | None) -> tuple[int, int] | int | None:
    """Where it lies; of a tensor without numbers, in whose memory."""
    if isinstance(tensor, FakeTensor):
        return _memory_of(tensor), int(tensor.storage_offset())
    return None if tensor is None else tensor.data_ptr()


def states(stacks: list[Stack]) -> list[Snapshot]:
    """Each tensor as it is now; of those that lie together ``named`` keeps the memory, which :func:`same` compares."""
    with torch._C.DisableTorchFunction():
        return [Snapshot(tensor, stack.named is not None) for stack in stacks for tensor in stack.tensors]


def unchanged(stacks: list[Stack], states: list[Snapshot]) -> bool:
    """Whether the tensors, the :func:`same` as then, are what :func:`states` found."""
    with torch._C.DisableTorchFunction():
        found = iter(states)
        return all(next(found).is_of(tensor) for stack in stacks for tensor in stack.tensors)


def stacked(stacks: Sequence[Stack], watched: Sequence[Stack] = ()) -> list[Tensor]:
    """Each as one tensor [E, ...], differentiable any number of times.

    ``watched``: of these, a change in place before the backward is an error there, as it is for an ordinary layer's
    weight; what else of them is saved for it counts the changes of the first expert alone.
    """
    if torch.compiler.is_compiling():
        return [torch.stack(stack.tensors) for stack in stacks]
    with torch._C.DisableTorchFunction():
        trained = [torch.is_grad_enabled() and stack.learns() for stack in stacks]
        fixed = iter([stack.whole() for stack, learns in zip(stacks, trained, strict=True) if not learns])
    learning = [stack for stack, learns in zip(stacks, trained, strict=True) if learns]
    flat = [tensor for stack in (*learning, *watched) for tensor in stack.tensors]
    found = iter(_Stacked.apply(learning, *flat) if learning else ())
    return [next(found if learns else fixed) for learns in trained]


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stacks: list[Stack], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.count = len(stacks[0].tensors)
        ctx.watched = len(tensors) - ctx.count * len(stacks)
        ctx.save_for_backward(*tensors[len(tensors) - ctx.watched :])
        return tuple(stack.whole() for stack in stacks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where one of them was changed in place since, as any layer's backward does
        parts: list[Tensor | None] = []
        for gradient in gradients:
            parts += [None] * ctx.count if gradient is None else gradient.unbind(0)
        return None, *parts, *[None] * ctx.watched


def guarded(x: Tensor, watched: Sequence[Stack]) -> Tensor:
    """x itself, whose gradient is refused where one of ``watched`` was changed in place since; for frozen stacks, which
    :func:`stacked` sees no backward of."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return _Guarded.apply(x, *(tensor for stack in watched for tensor in stack.tensors))


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * len(ctx.saved_tensors)


@torch.no_grad()
def overwrite(stacks: Sequence[Stack], values: Sequence[Tensor]) -> None:
    """Write ``values`` [E, ...] into the stacks' tensors."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for stack, value in zip(stacks, values, strict=True):
        if stack.named is None:
            targets += stack.tensors
            sources += value.unbind(0)
        else:
            targets.append(stack.named)
            sources.append(value)
    torch._foreach_copy_(targets, sources)
