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

__all__ = ["described", "fault_of_invalid", "fault_of_valid"]

REFUSALS = (ValueError, TypeError, ImplementationUnavailable, MemoryError)
BEYOND_THE_REFERENCE = ("can't allocate memory", "calculation overflowed", "numel: integer multiplication overflow")
LONGEST = 10.0  # seconds of the processor that the reference may take
PYTORCHS = (RuntimeError, IndexError, NotImplementedError)  # of its own operations, schemas and allocator


def fault_of_valid(call: Call, threads: int) -> str | None:
    """None, or how the native result is wrong."""
    try:
        expected, kept = _run(call, "reference")
        got, changed = _native(call, threads)
    except Exception as error:
        return f"{type(error).__name__} for a valid call: {str(error)[:200]}"
    return _difference(call, got, expected) or _difference(call, changed, kept, "argument")


def fault_of_invalid(call: Call, threads: int) -> tuple[str | None, bool]:
    """(None or what is wrong, whether the call was refused). It may be refused by a ValueError or a TypeError, or by
    the error that PyTorch gives the reference too; any answer has to be the reference's."""
    refusal: Exception | None = None
    try:
        got, changed = _native(call, threads)
    except REFUSALS:
        return None, True
    except Exception as error:
        refusal = error
    try:
        expected, kept = _reference(call)
    except Exception as error:
        if isinstance(error, MemoryError | TimeoutError) or any(words in str(error) for words in BEYOND_THE_REFERENCE):
            return None, refusal is not None
        if isinstance(refusal, PYTORCHS) and type(refusal) is type(error):
            return None, True
        its = f"{type(error).__name__}: {str(error)[:150]}"
        mine = "an answer" if refusal is None else _error(refusal)
        return f"{mine}, where the reference has {its}", refusal is not None
    if refusal is not None:
        return f"{_error(refusal)}, where the reference has an answer", True
    return _difference(call, got, expected) or _difference(call, changed, kept, "argument"), False


def _error(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:150]}"


def _native(call: Call, threads: int) -> tuple[Any, Any]:
    before, native.threads = native.threads, lambda: threads
    try:
        return _run(call, "native")
    finally:
        native.threads = before


def _reference(call: Call) -> tuple[Any, Any]:
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


def _run(call: Call, impl: str) -> tuple[Any, Any]:
    """The result, and the arguments as they are afterwards; the call's own are not touched."""
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
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return f"{what} {number} at {at} is {mine[at].item()}, the reference's {its[at].item()}"
    return None


def _equal(mine: Tensor, its: Tensor) -> Tensor:
    return (mine == its) | (mine.isnan() & its.isnan())


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
    if call.magnitude is not None or size is None:
        size = its.double().abs().nan_to_num(0, 0, 0).max() + (call.magnitude or 1.0)
    elif call.spread:
        size = size.max()
    kinds = {t.dtype for t in _leaves(call.arguments) if isinstance(t, Tensor) and t.is_floating_point()}
    exact = its.dtype == torch.float64 and kinds <= {torch.float64}
    unit = torch.finfo(torch.float64 if exact else torch.float32).eps
    return size * (unit * call.terms + 2 * torch.finfo(its.dtype).eps)


def _summary(value: Any) -> str:
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
