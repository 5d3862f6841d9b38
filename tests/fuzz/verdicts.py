"""A call by the native code beside the same call by the reference, and what is wrong with it in a sentence."""

from __future__ import annotations

import copy
import signal
from typing import Any

import torch
from calls import Call
from torch import Tensor

from robust_moe_kernels import native
from robust_moe_kernels.dispatch import ImplementationUnavailable

__all__ = ["Answer", "answered", "described", "fault_of"]

REFUSALS = (ValueError, TypeError, ImplementationUnavailable, MemoryError)
PYTORCHS = (RuntimeError, IndexError, NotImplementedError)  # of its own operations, schemas and allocator
BEYOND_THE_REFERENCE = (
    "can't allocate memory",
    "calculation overflowed",
    "larger than max_size()",
    "numel: integer multiplication overflow",
    "cannot be converted to type float without overflow",
)
LONGEST = 10.0  # seconds of the processor that the reference may take
HUGE = 1e30  # where float32 is near its end

Answer = tuple[Any, Any]  # (the result, the arguments after the call, which may have changed them)


def answered(call: Call, threads: int) -> Answer | Exception:
    """What the native code makes of a call."""
    before, native.threads = native.threads, lambda: threads
    try:
        return _run(call, "native")
    except Exception as error:
        return error
    finally:
        native.threads = before


def fault_of(call: Call, valid: bool, answer: Answer | Exception) -> str | None:
    """None, or what is wrong with the answer: to a valid call it is the reference's; an invalid one may be refused by a
    ValueError or a TypeError, or by the error that PyTorch gives the reference too."""
    if isinstance(answer, REFUSALS) and not valid:
        return None
    try:
        expected, kept = _reference(call)
    except Exception as error:
        beyond = isinstance(error, MemoryError | TimeoutError) or any(w in str(error) for w in BEYOND_THE_REFERENCE)
        alike = isinstance(answer, PYTORCHS) and type(answer) is type(error)
        if not valid and (beyond or alike):
            return None
        mine = _summary(answer) if isinstance(answer, Exception) else "an answer"
        return f"{mine}, where the reference has {_summary(error)}"
    if isinstance(answer, Exception):
        return f"{_summary(answer)}, where the reference has an answer"
    got, changed = answer
    if call.derived and not valid:
        return None
    return _difference(call, got, expected) or _difference(call, changed, kept, "argument")


def _reference(call: Call) -> Answer:
    """By the reference, whose loops may be too long for a size that is out of range."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        return _run(call, "reference")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _run(call: Call, impl: str) -> Answer:
    """With arguments of its own: the call's are not touched."""
    arguments = copy.deepcopy(call.arguments)
    return call.function(**arguments, impl=impl), arguments


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for name in sorted(value) for leaf in _leaves(value[name])]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _difference(call: Call, got: Any, expected: Any, what: str = "result") -> str | None:
    pairs = list(zip(_leaves(got), _leaves(expected), strict=True))
    sizes: list[Any] = [None] * len(pairs)
    if what == "result" and call.terms and call.magnitude is None:
        sizes = _sizes(call) or sizes
    for number, ((mine, its), size) in enumerate(zip(pairs, sizes, strict=True)):
        if not isinstance(its, Tensor) or its.layout != torch.strided or its.device.type != "cpu":
            continue
        if not isinstance(mine, Tensor) or (mine.shape, mine.dtype) != (its.shape, its.dtype):
            return f"{what} {number}: {_summary(mine)}, the reference's {_summary(its)}"
        if its.numel() == 0:
            continue
        wrong = ~_equal(mine, its)
        if what == "result" and its.is_floating_point() and call.terms:
            wrong &= ~((mine.double() - its.double()).abs() <= _allowed(call, its, size))
            wrong &= ~_beyond(call, mine, its)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return f"{what} {number} at {at} is {mine[at].item()}, the reference's {its[at].item()}"
    return None


def _equal(mine: Tensor, its: Tensor) -> Tensor:
    return (mine == its) | (mine.isnan() & its.isnan())


def _beyond(call: Call, mine: Tensor, its: Tensor) -> Tensor:
    """Where float32 overflowed in the one and not in the other; and, of a convolution, where the reference multiplied
    a number that is not finite by the zeros around a map, which the native code does not visit."""
    return ~its.isfinite() & (~mine.isfinite() | (mine.abs() > HUGE) | call.spread)


def _sizes(call: Call) -> list[Any] | None:
    """The reference's results for the sizes of the arguments, in double precision."""

    def size(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double().abs()
        if isinstance(value, torch.dtype):
            return torch.float64
        if type(value) is tuple or type(value) is list:
            return type(value)(map(size, value))
        return value

    try:
        arguments = {name: size(value) for name, value in call.arguments.items()}
        return _leaves(call.function(**arguments, impl="reference"))
    except Exception:  # an invalid call
        return None


def _allowed(call: Call, its: Tensor, size: Tensor | None) -> Tensor:
    """The error bound: of the arithmetic, float32's or for float64 results its own, and of one rounding."""
    its_size = its.double().abs().nan_to_num(0, 0, 0)
    if call.magnitude is not None:
        size = its_size + call.magnitude
    elif size is None:
        size = its_size.max() + 1.0
    else:
        size = size.nan_to_num(0, 0, 0)
        size = size.max() if call.spread else size
    kinds = {t.dtype for t in _leaves(call.arguments) if isinstance(t, Tensor) and t.is_floating_point()}
    exact = its.dtype == torch.float64 and kinds <= {torch.float64}
    unit = torch.finfo(torch.float64 if exact else torch.float32).eps
    own = torch.finfo(its.dtype)
    least = 0.0 if exact else torch.finfo(torch.float32).tiny
    return size * unit * call.terms + 2 * own.eps * (its_size + own.tiny) + least


def _summary(value: Any) -> str:
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {str(value)[:150]}"
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.layout != torch.strided:
        return f"{text} {value.layout}"
    where = f"+{value.storage_offset()}" if value.storage_offset() else ""
    gaps = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return text + gaps + where + ("" if value.device.type == "cpu" else f" on {value.device}")


def described(call: Call) -> str:
    """The call in a line, tensors by dtype, shape, strides and offset."""

    def text(value: Any) -> str:
        if hasattr(value, "_fields"):
            return f"{type(value).__name__}({', '.join(map(text, value))})"
        if isinstance(value, tuple | list):
            return f"[{', '.join(map(text, value))}]"
        small = isinstance(value, Tensor) and value.dtype == torch.int64 and value.numel() <= 6
        small = small and value.device.type == "cpu" and value.layout == torch.strided
        return _summary(value) + (f" {value.tolist()}" if small else "")

    name = getattr(call.function, "__name__", str(call.function))
    return f"{name}({', '.join(f'{key}={text(value)}' for key, value in call.arguments.items())})"
