"""A study from its name to its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_moe.config import ConfigError, choose
from robust_moe.content import LARGEST
from robust_moe.engine import Reporter
from robust_moe.engine.experiment import resolve_device
from robust_moe.outputs import clear_outputs, expect_folder, expect_outputs
from robust_moe.reproduce.jobs import Job, expect_overrides, job_outputs, lasting, make_jobs
from robust_moe.reproduce.preparation import (
    StudyError,
    alone_in,
    data_digest,
    describe,
    expect_runnable,
    load_data,
    remove,
    variant,
)
from robust_moe.reproduce.results import StudyResult, report_outputs, results_of, with_means, write_report
from robust_moe.reproduce.runner import run_jobs
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.scales import SCALES
from robust_moe.reproduce.studies import PARTS, STUDIES
from robust_moe.workers import default_workers

__all__ = ["reproduce"]

SEEDS = 3


def reproduce(
    study: str,
    scale: str = "cpu",
    *,
    overrides: Sequence[str] = (),
    seeds: int = SEEDS,
    first_seed: int = 0,
    workers: int | None = None,
    runs: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    reporter: Reporter | None = None,
) -> StudyResult:
    """Train and measure the runs of a study over several seeds, and report which of its claims held.

    Runs that are finished are not repeated, also not those of another study; one that was killed goes on. In ``out``:
    study.json (settings, software and hardware, every seed's numbers, claims with verdicts), figures, summary.md.

    Args:
        study: a key of :data:`STUDIES`.
        scale: a key of :data:`SCALES`.
        overrides: key=value on top of the scale's settings, for all runs, e.g. ``["data.root=data/cifar10"]``; not
            those by which runs differ. ``run.epochs`` is for the runs that have no number of their own.
        seeds: how many, one after the other.
        first_seed: the first of them. Seeds of one study that were computed apart are put together by
            :func:`~robust_moe.reproduce.again.merge_studies`.
        workers: runs at a time; None: one a CPU core on a CPU, one on a GPU.
        runs: folder of the run folders; None: ``runs/study-SCALE``, with overrides another for each set of them.
        out: folder of the report; None: ``report-STUDY`` in ``runs``, ``report-STUDY-from-SEED`` where the first seed
            is another than 0.
        resume: False: remove what these runs have left there, and what was made from them, and start anew.

    Raises:
        ConfigError, DataError: a name or setting that cannot be run, or a file in the place of one that would be
            written; nothing has been started then.
        CheckpointError: nor then: a run was begun with other settings, or its checkpoint is damaged.
        StudyError: another study works in ``runs``, nothing has been started; or runs failed, which is raised after
            the others are reported.
    """
    began = time.perf_counter()
    reporter = reporter or Reporter()
    parts = choose(STUDIES, study, "study")
    size = choose(SCALES, scale, "scale")
    for name, count in (("seeds", seeds), ("jobs", workers)):
        if count is not None and count < 1:
            raise ConfigError(f"{name}: expected a count >= 1, got {count}")
    if not 0 <= first_seed <= LARGEST - seeds:
        raise ConfigError(f"first-seed: expected a whole number in 0..{LARGEST - seeds}, got {first_seed}")
    chosen = range(first_seed, first_seed + seeds)
    folder = expect_folder("runs", f"runs/study-{scale}{variant(lasting(overrides))}" if runs is None else runs)
    report = f"report-{study}{f'-from-{first_seed}' * bool(first_seed)}"
    target = folder / report if out is None else expect_folder("out", out)
    outputs = report_outputs(parts, target)
    expect_outputs("out", outputs)
    names = list(dict.fromkeys(run for part in parts for run in PARTS[part].runs))
    notes = expect_overrides(names, overrides)
    splits = load_data([*size.settings, *overrides])
    content = data_digest(splits)
    jobs = make_jobs(names, size, chosen, folder, overrides, content)
    expect_runnable(jobs, splits)
    for job in jobs:
        expect_outputs("runs", job_outputs(job.folder))
    for note in notes:
        reporter.line(note)
    run = jobs[0].config.run
    workers = workers or default_workers(run.accelerator, run.threads)
    described: dict[str, Any] = {"name": scale, **dataclasses.asdict(size), "settings": list(size.settings)}
    described["families"] = {name: list(settings) for name, settings in size.families.items()}
    asked: dict[str, Any] = {
        "study": study,
        "scale": described,
        "overrides": lasting(overrides),
        "seeds": list(chosen),
    }
    asked |= {"jobs": workers, "data": {**describe(splits), "sha256": content}}
    with alone_in(folder):
        clear_outputs(outputs, anew=not resume)
        if not resume:
            remove(jobs, folder)
        for job in jobs:
            job.expect_startable()
        outcome = run_jobs(jobs, workers, reporter)
        device = resolve_device(jobs[0].config.run.accelerator)
        results = results_of(parts, _runs(jobs), asked, outcome.failed, device)
        results["seconds"]["this_call"] = round(time.perf_counter() - began, 3)
        path = write_report(results, target)
    if len(results["commits"]) > 1:
        reporter.warn(f"the runs are of several commits: {', '.join(map(str, results['commits']))}")
    if outcome.failed:
        first, why = next(iter(outcome.failed.items()))
        more = f" (and {len(outcome.failed) - 1} more)" if len(outcome.failed) > 1 else ""
        raise StudyError(
            f"{len(outcome.failed)} of {len(jobs)} runs failed; {first}: {why}{more}; the rest is in {path}"
        )
    return StudyResult(results, path, not outcome.stopped)


def _runs(jobs: Sequence[Job]) -> dict[str, Any]:
    """What the jobs that are finished have measured, by run, as study.json has it."""
    done = {(job.run, job.seed): found for job in jobs if (found := job.finished()) is not None}
    runs = {}
    for name in dict.fromkeys(job.run for job in jobs):
        run = RUNS[name]
        seeds = {str(seed): found for (of, seed), found in done.items() if of == name}
        runs[name] = with_means({"title": run.title, "settings": list(run.settings), "parts": run.parts}, seeds)
    return runs
