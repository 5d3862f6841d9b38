"""The jobs of a study, several at a time, each after those it starts from."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from robust_moe.engine import Reporter, read_metrics
from robust_moe.reproduce.jobs import Job
from robust_moe.reproduce.runs import RUNS
from robust_moe.workers import Outcome, Work, run_side_by_side

__all__ = ["run_jobs"]

TRAINING = 0.8  # share of a job's time that is training; measuring follows


class _JobWork(Work):
    """A job in the process of the command ``worker``, which is given the job's file."""

    def __init__(self, job: Job, worker: Sequence[str]) -> None:
        self.job, self.worker = job, worker
        self.name, self.log, self.threads = job.name, job.log, job.config.run.threads
        self.cost = max(round(RUNS[job.run].cost), 1)
        self.needs = frozenset(part.name for part in job.parts.values())

    def command(self) -> Sequence[str]:
        return [*self.worker, str(self.job.write())]

    def finished(self) -> str | None:
        found = self.job.finished()
        if found is None:
            return None
        return "  ".join(
            f"{name.upper().replace('_', '-')} {100 * found['measures'][name]:.1f}"
            for name in ("sa", "ra", "ra_e", "ra_r")
            if name in found["measures"]
        )

    def progress(self) -> float:
        job = self.job
        return TRAINING * len(read_metrics(job.folder, "epoch")) / job.config.run.epochs if job.trained else 0.0


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
    outcome = run_side_by_side("study", [_JobWork(job, worker) for job in jobs], workers, reporter)
    for job in jobs:  # what fails is reported, and reports travel: no path of this machine
        if job.name in outcome.failed:
            outcome.failed[job.name] = outcome.failed[job.name].replace(f"{job.folder.parents[1]}{os.sep}", "")
    return outcome
