"""What a call's arguments are made into so that the call is (mostly) invalid: one argument at a time, whatever it is.

A new kind of fault is one entry of ``TENSORS``, ``NUMBERS`` or ``OTHERS``; a changed call may still be valid, as with
a tensor that only lies elsewhere in memory, and then has to give the reference's answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from draws import FLOATS, Draw
from torch import Tensor

__all__ = ["spoil"]

DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
INDICES = (-1, 1, 7, 2**31, 2**32 + 1, 2**62, -(2**63), 2**63 - 1)
NUMBERS_OF_FLOATS = (float("nan"), float("inf"), float("-inf"), 3e38, -1.0, 1e-45)


def _resized(d: Draw, tensor: Tensor) -> Tensor:
    """One dimension longer or shorter."""
    if tensor.dim() == 0:
        return tensor.expand(d.choice((1, 2)))
    dim = d.random.randrange(tensor.dim())
    size = d.choice((0, max(tensor.shape[dim] - 1, 0), tensor.shape[dim] + 1, 2 * tensor.shape[dim] + 1))
    out = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    both = min(size, tensor.shape[dim])
    out.narrow(dim, 0, both).copy_(tensor.narrow(dim, 0, both))
    return out


def _other_rank(d: Draw, tensor: Tensor) -> Tensor:
    ways: list[Callable[[], Tensor]] = [lambda: tensor[None], lambda: tensor[..., None], tensor.flatten]
    if tensor.numel() and tensor.dim():
        ways.append(lambda: tensor[0])
    return d.choice(ways)()


def _turned(d: Draw, tensor: Tensor) -> Tensor:
    """Two dimensions exchanged: another shape, or the same with other strides."""
    if tensor.dim() < 2:
        return tensor.flip(0) if tensor.dim() else tensor
    first, second = d.random.sample(range(tensor.dim()), 2)
    return tensor.transpose(first, second)


def _spread(d: Draw, tensor: Tensor) -> Tensor:
    """All elements in one place of memory."""
    return tensor.new_full((), 0.25 if tensor.is_floating_point() else 0).expand(tensor.shape)


def _one_element(d: Draw, tensor: Tensor) -> Tensor:
    """One number that is out of range."""
    tensor = tensor.clone()
    if tensor.numel() and tensor.dtype in (*FLOATS, torch.int64):
        value = d.choice(NUMBERS_OF_FLOATS if tensor.is_floating_point() else INDICES)
        tensor[d.place(tensor)] = value if tensor.dtype != torch.float16 else max(min(value, 6e4), -6e4)
    return tensor


def _shuffled(d: Draw, tensor: Tensor) -> Tensor:
    """Numbers that are in range and in a wrong order."""
    if tensor.dim() == 0 or not tensor.numel():
        return tensor
    return tensor[torch.randint(0, len(tensor), (len(tensor),), generator=d.generator)]


TENSORS: dict[str, Callable[[Draw, Tensor], Any]] = {
    "dtype": lambda d, t: t.to(d.choice(DTYPES)),
    "size": _resized,
    "rank": _other_rank,
    "strides": _turned,
    "layout": lambda d, t: d.laid_out(t),
    "expanded": _spread,
    "element": _one_element,
    "order": _shuffled,
    "device": lambda d, t: t.to("meta"),
    "sparse": lambda d, t: t.to_sparse() if t.dim() else t,
    "no tensor": lambda d, t: d.choice((None, 1.0, "x", [1, 2], t.tolist() if t.numel() < 99 else ())),
}
NUMBERS: dict[str, Callable[[Draw, Any], Any]] = {
    "off by one": lambda d, n: n + d.choice((-1, 1)),
    "size": lambda d, n: d.choice((0, -1, -(2**63), 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64)),
    "float": lambda d, n: d.choice((float("nan"), float("inf"), -0.5, 1.5, 1e30)),
    "no number": lambda d, n: d.choice((None, "2", [1], torch.tensor(2), 1j)),
}
OTHERS: tuple[Any, ...] = (None, 1, -1, "", "L3", True, 0.5, (), [], (1,), torch.zeros(1), torch.float64, torch.int32)


def spoil(d: Draw, arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments with one or two of them changed, and what was done: "name: kind"."""
    changed, notes = dict(arguments), []
    for _ in range(d.choice((1, 1, 1, 2))):
        name = d.choice(sorted(changed))
        changed[name], kind = _changed(d, changed[name])
        notes.append(f"{name}{kind}")
    return changed, ", ".join(notes)


def _changed(d: Draw, value: Any) -> tuple[Any, str]:
    if isinstance(value, tuple | list) and value and d.chance(0.9):
        place = d.random.randrange(len(value))  # a field of a Route or a Geometry, one number of a pair
        fields = list(value)
        fields[place], kind = _changed(d, fields[place])
        whole = type(value)(*fields) if hasattr(value, "_fields") else type(value)(fields)
        return whole, f".{value._fields[place]}{kind}" if hasattr(value, "_fields") else f"[{place}]{kind}"
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        kind = d.choice(sorted(TENSORS))
        return TENSORS[kind](d, value), f": {kind}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        kind = d.choice(sorted(NUMBERS))
        return NUMBERS[kind](d, value), f": {kind}"
    if value is None and d.chance(0.7):
        return d.choice((d.floats(d.size(9)), d.floats(d.size(5), d.size(5)), d.integers(0, 9, d.size(9)))), ": given"
    return d.choice(OTHERS), ": other"
