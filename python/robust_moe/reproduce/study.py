"""A study from its name to its report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust_moe.config import ConfigError, choose
from robust_moe.content import ContentError, anything, fields, items, mapping, text, whole
from robust_moe.engine import Reporter
from robust_moe.engine.experiment import resolve_device
from robust_moe.files import replace_file
from robust_moe.outputs import Output, clear_outputs, expect_folder, expect_outputs, figure, json_with
from robust_moe.outputs import text as text_with
from robust_moe.provenance import provenance
from robust_moe.reproduce.claims import RULE, Spread, judge
from robust_moe.reproduce.figures import FIGURES, draw_part
from robust_moe.reproduce.jobs import Job, expect_overrides, job_outputs, make_jobs, write_json
from robust_moe.reproduce.preparation import (
    StudyError,
    alone_in,
    data_digest,
    default_workers,
    describe,
    expect_runnable,
    load_data,
    remove,
    variant,
)
from robust_moe.reproduce.runner import Outcome, run_jobs
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.scales import SCALES
from robust_moe.reproduce.studies import PARTS, STUDIES
from robust_moe.reproduce.summary import summary

__all__ = ["StudyError", "StudyResult", "judge_again", "reproduce"]

FORMAT = 3  # of study.json
READABLE = (2, 3)  # 2: claims without checks, three verdicts
SEEDS = 3
STUDY = json_with("the study.json of an earlier report", "format", "study", "parts")
SUMMARY = text_with("the summary.md of an earlier report", "# `robust-moe reproduce")

# What is read of a study.json to decide its claims again; what a claim reads of the measures, it looks at itself.
CONTENT = fields(
    {
        "study": text,
        "seeds": items(whole(), most=1000),
        "parts": mapping(anything),
        "runs": mapping(fields({"seeds": mapping(fields({"measures": mapping(anything)}))})),
    },
    required=False,
)


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
        overrides: key=value on top of the scale's settings, for all runs, e.g. ``["data.name=cifar10"]``; not those by
            which runs differ. ``run.epochs`` is for the runs that have no number of their own.
        seeds: how many; the first is 0.
        workers: runs at a time; None: one a CPU core on a CPU, one on a GPU.
        runs: folder of the run folders; None: ``runs/study-SCALE``, with overrides another for each set of them.
        out: folder of the report; None: ``report-STUDY`` in ``runs``.
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
    folder = expect_folder("runs", f"runs/study-{scale}{variant(overrides)}" if runs is None else runs)
    target = folder / f"report-{study}" if out is None else expect_folder("out", out)
    outputs = report_outputs(parts, target)
    expect_outputs("out", outputs)
    settings = [] if data_root is None else [f"data.root={data_root}"]
    names = list(dict.fromkeys(run for part in parts for run in PARTS[part].runs))
    notes = expect_overrides(names, overrides)
    settings += overrides
    splits = load_data([*size.settings, *settings])
    content = data_digest(splits)
    jobs = make_jobs(names, size, range(seeds), folder, settings, content)
    expect_runnable(jobs, splits)
    for job in jobs:
        expect_outputs("runs", job_outputs(job.folder))
    for note in notes:
        reporter.line(note)
    workers = workers or default_workers(jobs[0])
    described: dict[str, Any] = {"name": scale, **dataclasses.asdict(size), "settings": list(size.settings)}
    described["families"] = {name: list(settings) for name, settings in size.families.items()}
    asked: dict[str, Any] = {
        "study": study,
        "scale": described,
        "overrides": list(overrides),
        "seeds": list(range(seeds)),
    }
    asked |= {"jobs": workers, "data": {**describe(splits), "sha256": content}}
    with alone_in(folder):
        clear_outputs(outputs, anew=not resume)
        if not resume:
            remove(jobs, folder)
        for job in jobs:
            job.expect_startable()
        outcome = run_jobs(jobs, workers, reporter)
        results = _results(parts, jobs, outcome, asked)
        results["seconds"]["this_call"] = round(time.perf_counter() - began, 3)
        path = _write(results, target)
    if len(results["commits"]) > 1:
        reporter.warn(f"the runs are of several commits: {', '.join(map(str, results['commits']))}")
    if outcome.failed:
        first, why = next(iter(outcome.failed.items()))
        more = f" (and {len(outcome.failed) - 1} more)" if len(outcome.failed) > 1 else ""
        raise StudyError(
            f"{len(outcome.failed)} of {len(jobs)} runs failed; {first}: {why}{more}; the rest is in {path}"
        )
    return StudyResult(results, path, not outcome.stopped)


def report_outputs(parts: Sequence[str], target: Path) -> list[Output]:
    """The files of a report on ``parts`` in the folder ``target``."""
    figures = [(target / f"{part}-{name}.png", figure("reproduce")) for part in parts for name in FIGURES[part]]
    return [(target / "study.json", STUDY), (target / "summary.md", SUMMARY), *figures]


def _results(parts: Sequence[str], jobs: Sequence[Job], outcome: Outcome, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of study.json."""
    done = {(job.run, job.seed): found for job in jobs if (found := job.finished()) is not None}
    runs = {}
    for run in dict.fromkeys(job.run for job in jobs):
        seeds = {seed: found for (name, seed), found in done.items() if name == run}
        runs[run] = {
            "title": RUNS[run].title,
            "settings": list(RUNS[run].settings),
            "parts": RUNS[run].parts,
            "seeds": {str(seed): found for seed, found in seeds.items()},
            "mean": _means([found["measures"] for found in seeds.values()]),
            "best": _means([found["best"]["measures"] for found in seeds.values() if found["best"]]),
        }
    seconds = [value for found in done.values() for value in found["seconds"].values()]
    return {
        "format": FORMAT,
        **settings,
        "parts": _judged(parts, settings["seeds"], runs),
        "rule": RULE,
        "runs": runs,
        "failed": outcome.failed,
        "seconds": {"computing": round(sum(value or 0.0 for value in seconds), 3), "unknown": seconds.count(None)},
        "commits": sorted({found["git"] for found in done.values()}, key=str),
        **provenance(resolve_device(jobs[0].config.run.accelerator)),
        "hardware": ", ".join(sorted({found["hardware"] for found in done.values()})),
    }


def _judged(parts: Sequence[str], seeds: Sequence[int], runs: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a study with every claim decided, from its ``runs`` as study.json has them."""
    by_seed: dict[int, dict[str, Any]] = {seed: {} for seed in seeds}
    for run, content in runs.items():
        for seed, found in content["seeds"].items():
            by_seed[int(seed)][run] = found["measures"]
    return {
        name: {
            "title": PARTS[name].title,
            "runs": list(PARTS[name].runs),
            "claims": [judge(claim, by_seed) for claim in PARTS[name].claims],
        }
        for name in parts
    }


def judge_again(file: str | Path, study: str | None = None, out: str | Path | None = None) -> StudyResult:
    """Decide the claims of a finished study anew, by the claims, checks and rule of this version; nothing is trained.

    Writes ``summary.md``, which says so; ``file`` stays as it was measured.

    Args:
        file: a study.json, of this format or of one in :data:`READABLE`.
        study: that it has to be of; None: any.
        out: folder of the summary; None: that of ``file``, with whose figures it goes.

    Raises:
        StudyError: no such file, other content, another format, a part or run that this version does not have, or
            measures that a claim cannot be computed from.
    """
    path = Path(file)
    expected = f"{path}: expected a study.json of robust-moe reproduce, of format {' or '.join(map(str, READABLE))}"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        got = results["format"]
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{expected}, got {type(error).__name__}: {error}") from error
    if got not in READABLE:
        raise StudyError(f"{expected}, got format {got!r}")
    try:
        CONTENT(results, "")
    except ContentError as error:
        raise StudyError(f"{path}: {error}") from error
    if study not in (None, results["study"]):
        raise StudyError(f"study: expected {results['study']!r}, which {path} is of, got {study!r}")
    if unknown := sorted({*results["parts"]} - {*PARTS}):
        raise StudyError(f"{path}: expected parts among {', '.join(PARTS)}, got {', '.join(unknown)}")
    try:
        parts = _judged(list(results["parts"]), results["seeds"], results["runs"])
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path}: {error}") from error
    target = path.parent if out is None else expect_folder("out", out)
    expect_outputs("out", [(target / "summary.md", SUMMARY)], [("judge", path)])
    results |= {"parts": parts, "rule": RULE, "judged_again": True}
    figures = {part: [target / found.name for found in sorted(path.parent.glob(f"{part}-*.png"))] for part in parts}
    try:
        words = summary(results, figures if out is None else {}).encode()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path}: expected what a summary says, got {error!r}") from error
    target.mkdir(parents=True, exist_ok=True)
    replace_file(target / "summary.md", words)
    return StudyResult(results, path, True)


def _means(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of every share; ``flips`` under PGD on the model, ``largest``: the most used expert's share."""
    flat = [
        {name: value for name, value in each.items() if isinstance(value, float) and name != "alpha"}
        | ({"flips": each["flips"]["ra"], "largest": max(each["first"])} if "first" in each else {})
        for each in seeds
    ]
    return {name: Spread(tuple(each[name] for each in flat)).plain() for name in (flat[0] if flat else ())}


def _write(results: dict[str, Any], target: Path) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    found = {run: content["seeds"] for run, content in results["runs"].items()}
    figures = {part: draw_part(part, found, target) for part in results["parts"]}
    write_json(target / "study.json", results)
    replace_file(target / "summary.md", summary(results, figures).encode())
    return target / "study.json"
