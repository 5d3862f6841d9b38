"""How far the reading of data is, shown by whoever has a screen: this package knows of none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

__all__ = ["Task", "silent"]

Task = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""(what, how many) -> a ``with`` block whose value is called with how many more are done, as
:meth:`robust_moe.engine.Reporter.task`."""


@contextmanager
def silent(what: str, count: int) -> Iterator[Callable[[int], object]]:
    """The :data:`Task` that shows nothing."""
    yield lambda done: None
