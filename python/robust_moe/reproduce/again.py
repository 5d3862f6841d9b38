"""Studies that are on file, judged anew: one, or the seeds of several put together. Nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from robust_moe.config import choose
from robust_moe.content import anything, fields, items, mapping, number, optional, text, whole
from robust_moe.files import replace_file
from robust_moe.outputs import expect_folder, expect_outputs
from robust_moe.reproduce.claims import RULE
from robust_moe.reproduce.jobs import deciding
from robust_moe.reproduce.preparation import StudyError
from robust_moe.reproduce.results import (
    FORMAT,
    SUMMARY,
    StudyResult,
    judged,
    read_results,
    report_outputs,
    results_of,
    with_means,
    write_report,
)
from robust_moe.reproduce.runs import RUNS
from robust_moe.reproduce.studies import PARTS, STUDIES
from robust_moe.reproduce.summary import summary
from robust_moe.settings import shown

__all__ = ["judge_again", "merge_studies"]

# What a file that is read lacks, or has of another type, where claims and pages are made of it.
LACKING = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)
NUMBERS = ("best", "attack", "checkpoint")  # what two records of a run at one seed have in common besides the measures
ORIGIN = ("study", "seeds", "overrides", "commits", "versions", "git", "hardware")  # kept of each of the studies

MEASURED = fields(
    {
        "measures": mapping(anything),
        "attack": mapping(anything),
        "checkpoint": mapping(anything),
        "best": optional(fields({"measures": mapping(anything)})),
        "seconds": mapping(optional(number(0))),
        "git": optional(text),
        "hardware": text,
    }
)
MERGEABLE = fields(
    {
        "study": text,
        "scale": fields({"name": text, "settings": items(text)}),
        "overrides": items(text),
        "seeds": items(whole(), most=1000),
        "data": fields({"sha256": text}),
        "parts": mapping(anything),
        "runs": mapping(
            fields({"title": text, "settings": items(text), "parts": mapping(text), "seeds": mapping(MEASURED)})
        ),
        "failed": mapping(text),
        "commits": items(optional(text)),
        "versions": mapping(text),
        "git": optional(text),
        "hardware": text,
    }
)


def judge_again(file: str | Path, study: str | None = None, out: str | Path | None = None) -> StudyResult:
    """Decide the claims of a finished study anew, by the claims, checks and rule of this version; nothing is trained.

    Writes ``summary.md``, which says so; ``file`` stays as it was measured.

    Args:
        file: a study.json, of this format or of one in :data:`~robust_moe.reproduce.results.READABLE`.
        study: that it has to be of; None: any.
        out: folder of the summary; None: that of ``file``, with whose figures it goes.

    Raises:
        StudyError: no such file, other content, another format, a part or run that this version does not have, or
            measures that a claim cannot be computed from.
    """
    path = Path(file)
    results = read_results(path)
    if study not in (None, results["study"]):
        raise StudyError(f"study: expected {results['study']!r}, which {path} is of, got {study!r}")
    _expect_parts(path, results)
    try:
        parts = judged(list(results["parts"]), results["seeds"], results["runs"])
    except LACKING as error:
        raise StudyError(f"{path}: {error}") from error
    target = path.parent if out is None else expect_folder("out", out)
    expect_outputs("out", [(target / "summary.md", SUMMARY)], [("judge", path)])
    results |= {"parts": parts, "rule": RULE, "judged_again": True}
    figures = {part: [target / found.name for found in sorted(path.parent.glob(f"{part}-*.png"))] for part in parts}
    try:
        words = summary(results, figures if out is None else {}).encode()
    except LACKING as error:
        raise StudyError(f"{path}: expected what a summary says, got {error!r}") from error
    target.mkdir(parents=True, exist_ok=True)
    replace_file(target / "summary.md", words)
    return StudyResult(results, path, True)


def merge_studies(files: Sequence[str | Path], study: str, out: str | Path) -> StudyResult:
    """Put the seeds of several studies together, and decide the claims from all of them; nothing is trained.

    Writes study.json, figures and summary.md; the ``files`` stay as they are. Each seed of a run keeps the versions,
    commit and hardware that its numbers were measured with; ``merged`` says which studies there were.

    Args:
        files: study.json of this format, of one scale, with equal settings and images. Each has parts of ``study``;
            their seeds and their parts may differ or be the same.
        study: a key of :data:`STUDIES`. The result has those of its parts that any of ``files`` has, and those of which
            they have all runs, with what all claims are computed from at some seed.
        out: folder of the result.

    Raises:
        ConfigError: no such study, or files of another kind, or ``files`` themselves, in the place of the result.
        StudyError: a file as for :func:`judge_again`; a part that is not of ``study``; another scale, setting or data
            digest; or a run that two files have at one seed with other numbers.
    """
    began = time.perf_counter()
    allowed = choose(STUDIES, study, "study")
    paths = [Path(file) for file in files]
    found = {path: read_results(path, (FORMAT,), MERGEABLE) for path in paths}
    for path, results in found.items():
        _expect_parts(path, results)
        if foreign := [part for part in results["parts"] if part not in allowed]:
            raise StudyError(f"study: expected one with the part {foreign[0]}, which {path} has, got {study!r}")
    asked = {part for results in found.values() for part in results["parts"]}
    measured = {run for results in found.values() for run in results["runs"]}
    parts = [part for part in allowed if part in asked or measured.issuperset(PARTS[part].runs)]
    target = expect_folder("out", out)
    expect_outputs("out", report_outputs(parts, target), [("judge", path) for path in paths])
    for (one, left), (other, right) in combinations(found.items(), 2):
        _expect_alike(one, left, other, right)
    seeds = _seeds(found)
    failed = {job: why for results in found.values() for job, why in results["failed"].items()}
    first = found[paths[0]]
    try:
        runs = {}
        for name, of in seeds.items():
            content = next(results["runs"][name] for results in found.values() if name in results["runs"])
            runs[name] = with_means(content, {str(seed): of[seed] for seed in sorted(of)})
            for seed in of:
                failed.pop(f"{name}, seed {seed}", None)  # by another of the studies it is measured
        about = {
            "study": study,
            **{name: first[name] for name in ("scale", "overrides", "data")},
            "seeds": sorted({seed for results in found.values() for seed in results["seeds"]}),
            "merged": list(_origins(found.values())),
            "judged_again": True,
        }
        parts = [part for part in parts if part in asked or _is_decided(part, about["seeds"], runs)]
        merged = results_of(parts, runs, about, failed, "cpu")
        merged["seconds"]["this_call"] = round(time.perf_counter() - began, 3)
        path = write_report(merged, target)
    except LACKING as error:
        named = ", ".join(map(str, paths))
        raise StudyError(f"{named}: expected what a report is made of, got {type(error).__name__}: {error}") from error
    return StudyResult(merged, path, True)


def _is_decided(part: str, seeds: Sequence[int], runs: Mapping[str, Any]) -> bool:
    """Whether the runs tell something about every claim of a part that nobody may have measured them for."""
    try:
        claims = judged([part], seeds, runs)[part]["claims"]
    except LACKING:
        return False
    return all(claim["seeds"] for claim in claims)


def _expect_parts(path: Path, results: Mapping[str, Any]) -> None:
    """Raise StudyError for a part that this version does not have."""
    if unknown := sorted({*results["parts"]} - {*PARTS}):
        raise StudyError(f"{path}: expected parts among {', '.join(PARTS)}, got {', '.join(unknown)}")


def _expect_alike(one: Path, first: Mapping[str, Any], other: Path, results: Mapping[str, Any]) -> None:
    """Raise StudyError where two studies differ in what decides their numbers, apart from the seeds."""
    left, right = _decided_by(first), _decided_by(results)
    absent = "nothing"
    for run in first["runs"].keys() ^ results["runs"].keys():  # which parts they have may differ
        for settings in (left, right):
            settings.pop(f"run {run}", None)
    differ = [
        f"{name}: {shown(left.get(name, absent))} and {shown(right.get(name, absent))}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name, absent) != right.get(name, absent)
    ]
    if differ:
        raise StudyError(
            f"judge: expected studies of equal scale, settings and images, got {one} and {other}, which differ in "
            f"{'; '.join(differ)}"
        )


def _decided_by(results: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the numbers of a study but the seeds and the code, by name."""
    scale = {name: value for name, value in results["scale"].items() if name not in ("settings", "families", "why")}
    families = results["scale"].get("families", {})  # of runs alone: a study is older than the families it has not
    return {
        **{"scale" if name == "name" else f"scale {name}": value for name, value in scale.items()},
        **{f"scale {key}": value for key, value in deciding(results["scale"]["settings"]).items()},
        **{f"override {key}": value for key, value in deciding(results["overrides"]).items()},
        "data sha256": results["data"]["sha256"],
        **{
            f"run {name}": [
                run["settings"],
                run["parts"],
                list(families.get(RUNS[name].family if name in RUNS else "", ())),
            ]
            for name, run in results["runs"].items()
        },
    }


def _seeds(found: Mapping[Path, Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """What every run has measured, by run and seed, in all of the studies."""
    runs: dict[str, dict[int, tuple[Path, Mapping[str, Any]]]] = {}
    for path, results in found.items():
        for name, run in results["runs"].items():
            known = runs.setdefault(name, {})
            for key, record in run["seeds"].items():
                seed = _seed(path, name, key, results["seeds"])
                before, same = known.setdefault(seed, (path, record))
                if differ := list(_differing(same, record)):
                    raise StudyError(
                        f"judge: expected equal numbers of {name}, seed {seed}, in {before} and {path}, got other "
                        f"{', '.join(differ)}; leave one of the files out"
                    )
    return {name: {seed: record for seed, (_, record) in of.items()} for name, of in runs.items()}


def _seed(path: Path, run: str, key: str, seeds: Sequence[int]) -> int:
    if not key.isdecimal() or int(key) not in seeds:
        raise StudyError(f"{path}: runs.{run}.seeds: expected seeds among {seeds}, got {shown(key)}")
    return int(key)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two records of a run at one seed: its measures by name, and what else of :data:`NUMBERS`."""
    left, right = one["measures"], other["measures"]
    yield from sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    yield from (name for name in NUMBERS if one[name] != other[name])


def _origins(studies: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Where the seeds of a merged study come from: what each of the studies says of itself, each once."""
    known: list[dict[str, Any]] = []
    for results in studies:
        for origin in results.get("merged") or [results]:
            entry = {name: origin[name] for name in ORIGIN}
            if entry not in known:
                known.append(entry)
                yield entry
