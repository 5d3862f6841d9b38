"""A variant that is timed in a process of its own: what another one asks of its process, such as to keep freed memory,
it does not profit from."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from robust_moe.benchmarks.harness import peak_bytes

__all__ = ["OwnProcess", "own_process", "own_worker"]

Step = Callable[[int], object]


class OwnProcess:
    """The caller's end: runs the step, or measures its memory, and waits for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _ask(self, what: str, number: int) -> Any:
        self._connection.send((what, number))
        return self._connection.recv()  # EOFError where the process has ended; it has printed why

    def __call__(self, number: int) -> Any:
        """What the step returns, plain types."""
        return self._ask("run", number)

    def peak_bytes(self, number: int) -> int:
        """As the harness's."""
        return self._ask("peak", number)


def _answer(connection: Connection, step: Step) -> None:
    """Run ``step`` as often as the caller asks."""
    while (request := connection.recv()) is not None:
        what, number = request
        if what == "peak":
            connection.send(peak_bytes(partial(step, number), torch.device("cpu")))
        else:
            connection.send(step(number))


def _serve(connection: Connection, threads: int, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    work(partial(_answer, connection), *arguments)


def _make_and_answer(answer: Callable[[Step], None], make: Callable[..., Step], *arguments: Any) -> None:
    answer(make(*arguments))


@contextmanager
def own_worker(work: Callable[..., object], *arguments: Any) -> Iterator[OwnProcess]:
    """``work(answer, *arguments)``, a function of a module, in a fresh process of as many threads. Somewhere inside, it
    calls ``answer(step)``, which returns when the block is left."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # no daemon: a loader inside may have processes of its own
    process = context.Process(target=_serve, args=(theirs, torch.get_num_threads(), work, arguments))
    process.start()
    theirs.close()
    try:
        yield OwnProcess(ours)
        ours.send(None)
    finally:
        ours.close()  # the end of the process, too, where the block is left by an error
        process.join()


@contextmanager
def own_process(make: Callable[..., Step], *arguments: Any) -> Iterator[OwnProcess]:
    """The CPU step that ``make(*arguments)``, a function of a module, makes in a fresh process of as many threads."""
    with own_worker(_make_and_answer, make, *arguments) as process:
        yield process
