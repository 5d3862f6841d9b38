"""A study from its name to its report."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_moe.config import ConfigError, choose
from robust_moe.data import load_splits
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import resolve_device
from robust_moe.files import replace_file
from robust_moe.provenance import provenance
from robust_moe.reproduce.claims import RULE, Spread, check
from robust_moe.reproduce.figures import draw_part
from robust_moe.reproduce.jobs import Job, make_jobs, write_json
from robust_moe.reproduce.runner import Outcome, run_jobs
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.scales import SCALES
from robust_moe.reproduce.studies import PARTS, STUDIES
from robust_moe.reproduce.summary import summary

__all__ = ["StudyError", "StudyResult", "reproduce"]

FORMAT = 1  # of study.json
SEEDS = 3


class StudyError(ValueError):
    """Runs of a study that failed; the rest is reported."""


@dataclass(frozen=True)
class StudyResult:
    """What :func:`reproduce` leaves."""

    results: dict[str, Any]  # the content of ``path``
    path: Path  # study.json, with figures and summary.md beside it
    finished: bool  # False: stopped by a signal; the same call goes on


def reproduce(
    study: str,
    scale: str = "cpu",
    *,
    data_root: str | Path | None = None,
    overrides: Sequence[str] = (),
    seeds: int = SEEDS,
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
        data_root: ``data.root`` of all runs.
        overrides: key=value on top of the scale's settings, for all runs, e.g. ``["data.name=cifar10"]``.
        seeds: how many; the first is 0.
        workers: runs at a time; None: one a CPU core on a CPU, one on a GPU.
        runs: folder of the run folders; None: ``runs/study-SCALE``.
        out: folder of the report; None: ``report`` in ``runs``.
        resume: False: remove what these runs have left there, and start anew.

    Raises:
        ConfigError, DataError: a name or setting that cannot be run; nothing has been started then.
        StudyError: runs that failed; raised after the others are reported.
    """
    began = time.perf_counter()
    reporter = reporter or Reporter()
    parts = choose(STUDIES, study, "study")
    size = choose(SCALES, scale, "scale")
    for name, count in (("seeds", seeds), ("jobs", workers)):
        if count is not None and count < 1:
            raise ConfigError(f"{name}: expected a count >= 1, got {count}")
    folder = Path(runs or f"runs/study-{scale}")
    root = [] if data_root is None else [f"data.root={data_root}"]
    names = list(dict.fromkeys(run for part in parts for run in PARTS[part].runs))
    jobs = make_jobs(names, size, range(seeds), folder, [*root, *overrides])
    data = _check(jobs)
    if not resume:
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)
    workers = workers or _default_workers(jobs[0])
    outcome = run_jobs(jobs, workers, reporter)
    target = Path(out) if out is not None else folder / "report"
    described = {"name": scale, **dataclasses.asdict(size), "settings": list(size.settings)}
    settings = {"study": study, "scale": described, "overrides": list(overrides)}
    results = _results(parts, jobs, outcome, {**settings, "seeds": list(range(seeds)), "jobs": workers, "data": data})
    results["seconds"]["this_call"] = round(time.perf_counter() - began, 3)
    path = _write(results, jobs, target)
    if outcome.failed:
        first, why = next(iter(outcome.failed.items()))
        more = f" (and {len(outcome.failed) - 1} more)" if len(outcome.failed) > 1 else ""
        raise StudyError(
            f"{len(outcome.failed)} of {len(jobs)} runs failed; {first}: {why}{more}; the rest is in {path}"
        )
    return StudyResult(results, path, not outcome.stopped)


def _check(jobs: Sequence[Job]) -> dict[str, Any]:
    """Refuse what no run could do before any is started; describes the data."""
    for job in jobs:
        resolve_device(job.config.run.accelerator)
        Trainer(job.config, Reporter(enabled=False))
    splits = load_splits(jobs[0].config.data, jobs[0].seed)
    counts = {name: len(getattr(splits, name)) for name in ("train", "val", "test")}
    return {"name": splits.test.name, "shape": list(splits.test.images.shape[1:]), **counts}


def _default_workers(job: Job) -> int:
    if resolve_device(job.config.run.accelerator).type != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // (job.config.run.threads or cores), 1)


def _results(parts: Sequence[str], jobs: Sequence[Job], outcome: Outcome, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of study.json."""
    done = {(job.run, job.seed): found for job in jobs if (found := job.finished()) is not None}
    by_seed: dict[int, dict[str, Any]] = {seed: {} for seed in settings["seeds"]}
    for (run, seed), found in done.items():
        by_seed[seed][run] = found["measures"]
    runs = {}
    for run in dict.fromkeys(job.run for job in jobs):
        seeds = {seed: found for (name, seed), found in done.items() if name == run}
        runs[run] = {
            "title": RUNS[run].title,
            "settings": list(RUNS[run].settings),
            "parts": RUNS[run].parts,
            "seeds": {str(seed): found for seed, found in seeds.items()},
            "mean": _means([found["measures"] for found in seeds.values()]),
        }
    computing = sum(sum(value or 0.0 for value in found["seconds"].values()) for found in done.values())
    return {
        "format": FORMAT,
        **settings,
        "parts": {
            name: {
                "title": PARTS[name].title,
                "runs": list(PARTS[name].runs),
                "claims": [check(claim, by_seed) for claim in PARTS[name].claims],
            }
            for name in parts
        },
        "rule": RULE,
        "runs": runs,
        "failed": outcome.failed,
        "seconds": {"computing": round(computing, 3)},
        **provenance(resolve_device(jobs[0].config.run.accelerator)),
    }


def _means(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of every share; ``flips`` under PGD on the model, ``largest``: the most used expert's share."""
    flat = [
        {name: value for name, value in each.items() if isinstance(value, float)}
        | ({"flips": each["flips"]["ra"], "largest": max(each["first"])} if "first" in each else {})
        for each in seeds
    ]
    return {name: Spread(tuple(each[name] for each in flat)).plain() for name in (flat[0] if flat else ())}


def _write(results: dict[str, Any], jobs: Sequence[Job], target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    found = {
        run: {int(seed): each["measures"] for seed, each in content["seeds"].items()}
        for run, content in results["runs"].items()
    }
    figures = {part: draw_part(part, found, target) for part in results["parts"]}
    write_json(target / "study.json", results)
    replace_file(target / "summary.md", summary(results, figures).encode())
    return target / "study.json"
