"""A limit on how long a piece of PyTorch work may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

__all__ = ["OutOfTime", "TimeLimit"]


class OutOfTime(BaseException):
    """The work took longer than it was given. No :class:`Exception`: code on the way, PyTorch's too, turns those into
    errors of its own."""


class TimeLimit(TorchFunctionMode):
    """``with TimeLimit(60.0): ...`` raises :class:`OutOfTime` after the first PyTorch call that ends beyond the limit.

    The call is done by then, and the error is raised once only: what puts things back on the way out (a model's mode,
    its flags) is not stopped. A single call is never interrupted, so the limit may be overrun by one.

    seconds: of wall-clock time; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        super().__init__()
        self.seconds = seconds
        self._end: float | None = None

    def __enter__(self) -> TimeLimit:
        self._end = None if self.seconds is None else time.monotonic() + self.seconds
        return super().__enter__()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if self._end is not None and time.monotonic() > self._end:
            self._end = None
            raise OutOfTime(f"more than {self.seconds:g} s")
        return result
