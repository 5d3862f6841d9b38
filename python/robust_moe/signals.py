"""SIGINT and SIGTERM, which ask to save and stop."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

__all__ = ["StopSignals"]

Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers


class StopSignals(ABC):
    """While active, the two signals go to :meth:`handle`. Outside of the main thread, where Python has no signals, they
    go where they went before."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    _before: dict[signal.Signals, Handler | None]  # None: one that Python did not install

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None cannot be put back
                signal.signal(number, handler)

    @abstractmethod
    def handle(self, number: int, frame: FrameType | None) -> None:
        """Called with the signal, in the middle of anything."""
