"""Jobs in processes of their own, several at a time, each after those it starts from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

from robust_moe.engine import Reporter, read_metrics
from robust_moe.reproduce.jobs import Job
from robust_moe.reproduce.runs import RUNS
from robust_moe.signals import StopSignals

__all__ = ["Outcome", "run_jobs"]

REFRESH = 5.0  # seconds between two looks at how far running jobs are
TRAINING = 0.8  # share of a job's time that is training; measuring follows


@dataclass
class Outcome:
    """How the jobs ended."""

    stopped: bool = False  # by a signal: the same jobs again go on
    failed: dict[str, str] = field(default_factory=dict)  # by name of the job, why


class Ended(NamedTuple):
    """How a worker ended."""

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

    def execute(self, job: Job, worker: Sequence[str]) -> Ended:
        """Run the job's worker to its end."""
        threads = job.config.run.threads
        env = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [*worker, str(job.write())]
        with open(job.log, "ab") as log:  # after what a killed one left
            said = log.tell()
            if self.stopping:
                return Ended(None, said)
            # its own session: Ctrl-C at the terminal reaches this process alone, which passes it on once
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env, start_new_session=True
            ) as process:
                self._running.add(process)
                if self.stopping:  # a signal came while it was being started
                    process.terminate()
                try:
                    return Ended(process.wait(), said)
                finally:
                    self._running.discard(process)


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    reporter: Reporter,
    worker: Sequence[str] = (sys.executable, "-m", "robust_moe.reproduce.worker"),
) -> Outcome:
    """Run what is not finished yet, ``workers`` at a time, the longest first.

    A job that fails stops only those that start from it. Every job leaves its measures, its log and its run folder in
    ``job.folder``. ``worker``: the command, without the job's file, see :mod:`robust_moe.reproduce.worker`.
    """
    outcome = Outcome()
    costs = {job.name: max(round(RUNS[job.run].cost), 1) for job in jobs}
    todo = sorted((job for job in jobs if job.finished() is None), key=lambda job: -costs[job.name])
    total = sum(costs.values())
    done = shown = total - sum(costs[job.name] for job in todo)
    running: dict[Future[Ended], Job] = {}
    task = reporter.task("study", total, shown)
    with ThreadPoolExecutor(workers) as pool, _Children() as children, task as advance:
        while True:
            waiting = {job.name for job in (*todo, *running.values())}
            for job in list(todo):
                parts = {part.name for part in job.parts.values()}
                if broken := parts & outcome.failed.keys():
                    outcome.failed[job.name] = f"needs {', '.join(sorted(broken))}"
                    todo.remove(job)
                elif len(running) < workers and not children.stopping and not parts & waiting:
                    todo.remove(job)
                    running[pool.submit(children.execute, job, worker)] = job
            if not running:
                if children.stopping or not todo:
                    break
                continue
            ended, _ = wait(running, timeout=REFRESH, return_when=FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                done += costs[job.name]
                _note(job, future, children.stopping, outcome, reporter)
            now = int(done + sum(costs[job.name] * TRAINING * _trained(job) for job in running.values()))
            if now > shown:
                advance(now - shown)
                shown = now
    outcome.stopped = children.stopping and any(job.finished() is None for job in jobs)
    return outcome


def _note(job: Job, ended: Future[Ended], stopping: bool, outcome: Outcome, reporter: Reporter) -> None:
    runs = f"{job.folder.parents[1]}{os.sep}"  # what fails is reported, and reports travel: no path of this machine
    try:
        status, said = ended.result()
    except OSError as error:
        outcome.failed[job.name] = f"cannot be started: {error}".replace(runs, "")
        reporter.warn(f"{job.name} failed: {error}")
        return
    found = job.finished()
    if found is not None:
        measures = found["measures"]
        shares = "  ".join(
            f"{name.upper().replace('_', '-')} {100 * measures[name]:.1f}"
            for name in ("sa", "ra", "ra_e", "ra_r")
            if name in measures
        )
        reporter.line(f"{job.name}: {shares}")
    elif not stopping:
        lines = job.log.read_bytes()[said:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        outcome.failed[job.name] = f"exit status {status}: {last} (log: {job.log})".replace(runs, "")
        reporter.warn(f"{job.name} failed: {last}")


def _trained(job: Job) -> float:
    """Share of a running job's epochs that are done."""
    return len(read_metrics(job.folder, "epoch")) / job.config.run.epochs if job.trained else 0.0
