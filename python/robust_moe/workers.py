"""Work in processes of their own, several at a time, each after what it starts from."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from robust_moe.engine.experiment import resolve_device
from robust_moe.engine.progress import Reporter
from robust_moe.signals import StopSignals

__all__ = ["Outcome", "Work", "cpu_cores", "default_workers", "run_side_by_side", "stop_with_parent"]

REFRESH = 5.0  # seconds between two looks at how far running processes are


class Work(ABC):
    """A piece of work for one process."""

    name: str  # no other piece has it
    log: Path  # what its process prints is added to this file
    threads: int | None  # CPU threads of its process; None: PyTorch's choice
    cost: int  # >= 1, in any unit: orders the queue and weighs the time left
    needs: frozenset[str] = frozenset()  # names of what has to be finished first

    @abstractmethod
    def command(self) -> Sequence[str]:
        """The command, whose files are written now. Raises OSError where it cannot be started."""

    @abstractmethod
    def finished(self) -> str | None:
        """What it found, in a few words; None: it is not finished."""

    @abstractmethod
    def progress(self) -> float:
        """Share of it that is done, while it runs."""


@dataclass
class Outcome:
    """How the work ended."""

    stopped: bool = False  # by a signal: the same again goes on
    failed: dict[str, str] = field(default_factory=dict)  # by name, why


class _Ended(NamedTuple):
    """How a process ended."""

    status: int | None  # None: not started, as all is stopping
    said: int  # where its own part of the log begins, in bytes


class _Children(StopSignals):
    """The processes that run. While active, a first SIGINT or SIGTERM asks them to save and stop, a second kills
    them."""

    def __init__(self) -> None:
        self.stopping = False
        self._running: set[subprocess.Popen[bytes]] = set()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._running:  # something went wrong here: they save and stop
            self.stopping = True
            for process in tuple(self._running):
                process.terminate()

    def handle(self, number: int, frame: FrameType | None) -> None:
        again, self.stopping = self.stopping, True
        for process in tuple(self._running):
            process.kill() if again else process.terminate()

    def execute(self, work: Work) -> _Ended:
        """Run the work's process to its end."""
        env = os.environ if work.threads is None else {**os.environ, "OMP_NUM_THREADS": str(work.threads)}
        command = work.command()
        with open(work.log, "ab") as log:  # after what a killed one left
            said = log.tell()
            if self.stopping:
                return _Ended(None, said)
            # its own session: Ctrl-C at the terminal reaches this process alone, which passes it on once
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
            ) as process:
                self._running.add(process)
                if self.stopping:  # a signal came while it was being started
                    process.terminate()
                try:
                    return _Ended(process.wait(), said)
                finally:
                    self._running.discard(process)


def run_side_by_side(what: str, works: Sequence[Work], workers: int, reporter: Reporter) -> Outcome:
    """Run what is not finished yet, ``workers`` at a time, the longest first.

    What fails is said in a sentence and stops only what needs it. ``what``: the whole, as the progress on screen has
    it.
    """
    outcome = Outcome()
    todo = sorted((work for work in works if work.finished() is None), key=lambda work: -work.cost)
    total = sum(work.cost for work in works)
    done = shown = total - sum(work.cost for work in todo)
    running: dict[Future[_Ended], Work] = {}
    task = reporter.task(what, total, shown)
    with ThreadPoolExecutor(workers) as pool, _Children() as children, task as advance:
        while True:
            waiting = {work.name for work in (*todo, *running.values())}
            for work in list(todo):
                if broken := work.needs & outcome.failed.keys():
                    outcome.failed[work.name] = f"needs {', '.join(sorted(broken))}"
                    todo.remove(work)
                elif len(running) < workers and not children.stopping and not work.needs & waiting:
                    todo.remove(work)
                    running[pool.submit(children.execute, work)] = work
            if not running:
                if children.stopping or not todo:
                    break
                continue
            ended, _ = wait(running, timeout=REFRESH, return_when=FIRST_COMPLETED)
            for future in ended:
                work = running.pop(future)
                done += work.cost
                _note(work, future, children.stopping, outcome, reporter)
            now = int(done + sum(work.cost * work.progress() for work in running.values()))
            if now > shown:
                advance(now - shown)
                shown = now
    outcome.stopped = children.stopping and any(work.finished() is None for work in works)
    return outcome


def _note(work: Work, ended: Future[_Ended], stopping: bool, outcome: Outcome, reporter: Reporter) -> None:
    try:
        status, said = ended.result()
    except OSError as error:
        outcome.failed[work.name] = f"cannot be started: {error}"
        reporter.warn(f"{work.name} failed: {error}")
        return
    found = work.finished()
    if found is not None:
        reporter.line(f"{work.name}: {found}")
    elif not stopping:
        lines = work.log.read_bytes()[said:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        outcome.failed[work.name] = f"exit status {status}: {last} (log: {work.log})"
        reporter.warn(f"{work.name} failed: {last}")


def stop_with_parent() -> None:
    """Ask this process, one that :func:`run_side_by_side` started, to stop when its standard input ends: that is a pipe
    of the process that started it, which so leaves none behind."""

    def wait_for_end() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a waiting thread would hold at the interpreter's end
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_end, daemon=True).start()


def cpu_cores() -> int:
    """Cores of the CPU that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(accelerator: str, threads: int | None) -> int:
    """Trainings at a time: as many as the CPU's cores suffice for; on a GPU one.

    Args:
        accelerator, threads: of each, ``run.accelerator`` and ``run.threads``.
    """
    if resolve_device(accelerator).type != "cpu":
        return 1
    return max(cpu_cores() // (threads or cpu_cores()), 1)
