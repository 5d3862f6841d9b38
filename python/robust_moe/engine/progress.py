"""Progress on screen: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from robust_moe.attacks.pace import clock
from robust_moe.console import make_console

__all__ = ["Reporter"]

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


class _Bar(Progress):
    """A bar, and below it the lines that its reporter has."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        notes = [] if reporter.below else [TextColumn("{task.fields[note]}", markup=False)]
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(None if reporter.below else 40),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            *notes,
            console=reporter.console,
            transient=True,
            expand=reporter.below is not None,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self._reporter.below is not None and self.tasks:  # not before there is a bar
            console = self._reporter.console
            for line in self._reporter.below(console.width, console.options.ascii_only):
                yield Text(line, no_wrap=True)


class _Task:
    """One counted piece of work; a context manager, advanced by calling it."""

    def __init__(self, reporter: Reporter, name: str, total: int, done: int) -> None:
        self._reporter, self._name, self._total, self._start = reporter, name, total, done
        self._done, self._note = done, ""
        self._within = 0.0  # of the next batch, how many images the work done inside it comes to
        self._began = self._printed = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> _Task:
        if self._reporter.bars:
            self._bar = _Bar(self._reporter)
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._done, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, advance: int = 1, note: str | None = None) -> None:
        self._done += advance
        self._within = 0.0
        self._note = self._note if note is None else note
        self._show()

    def within(self, done: float) -> None:
        """Inside a batch that takes long: ``done`` of its pieces, a float, are what the work so far comes to."""
        self._within = done
        self._show()

    def _show(self) -> None:
        done = self._done + self._within
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self._note)
        elif self._due():
            self._printed = time.monotonic()
            text = f"{self._name}: {int(done)}/{self._total}"
            if done > self._start:
                left = (self._printed - self._began) / (done - self._start) * (self._total - done)
                text += f", ETA {clock(left)}"
            self._reporter.line(f"{text}  {self._note}".rstrip())

    def _due(self) -> bool:
        waited = time.monotonic() - self._printed > SECONDS_BETWEEN_LINES
        return self._reporter.enabled and self._done < self._total and waited


class Reporter:
    """What a run says on screen.

    Args:
        enabled: False: says nothing but warnings (tests; all processes but the first).
        console: where; None: standard output. A terminal without control characters (``TERM=dumb``) gets plain lines,
            and with ``NO_COLOR`` bars have no colours.
    """

    # lines below every bar on a terminal, in place of its note; given the most characters of one, and whether in ASCII
    below: Callable[[int, bool], list[str]] | None = None

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or make_console()

    @property
    def bars(self) -> bool:
        return self.enabled and self.console.is_terminal and not self.console.is_dumb_terminal

    def task(self, name: str, total: int, done: int = 0) -> _Task:
        """``with reporter.task("epoch 1/15", 90) as advance: ...; advance(1, note="loss 2.3")``."""
        return _Task(self, name, total, done)

    def line(self, text: str) -> None:
        if self.enabled:
            self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, emoji=False, soft_wrap=True)
