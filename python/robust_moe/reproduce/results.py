"""study.json: what it holds, how it is read again, and the report beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robust_moe.content import Check, ContentError, anything, fields, items, mapping, text, whole
from robust_moe.files import replace_file
from robust_moe.outputs import Output, figure, json_with
from robust_moe.outputs import text as text_with
from robust_moe.provenance import provenance
from robust_moe.reproduce.claims import RULE, Spread, judge
from robust_moe.reproduce.figures import FIGURES, draw_part
from robust_moe.reproduce.jobs import write_json
from robust_moe.reproduce.preparation import StudyError
from robust_moe.reproduce.studies import PARTS
from robust_moe.reproduce.summary import summary

__all__ = [
    *("FORMAT", "READABLE", "SUMMARY", "StudyResult", "judged", "read_results", "report_outputs", "results_of"),
    *("with_means", "write_report"),
]

FORMAT = 3  # of study.json
READABLE = (2, 3)  # 2: claims without checks, three verdicts
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
    """What a study leaves."""

    results: dict[str, Any]  # the content of ``path``
    path: Path  # study.json, with figures and summary.md beside it
    finished: bool  # False: stopped by a signal; the same call goes on


def results_of(
    parts: Sequence[str],
    runs: Mapping[str, Any],
    about: Mapping[str, Any],
    failed: Mapping[str, str],
    device: torch.device | str,
) -> dict[str, Any]:
    """The content of study.json.

    Args:
        runs: by name, as :func:`with_means` returns them.
        about: study, scale, overrides, seeds, data and how they came together.
        failed: by run and seed in words, why.
        device: of which the settings that change rounding are noted.

    Raises:
        ValueError: a claim cannot be computed from the measures.
    """
    done = [found for run in runs.values() for found in run["seeds"].values()]
    seconds = [value for found in done for value in found["seconds"].values()]
    return {
        "format": FORMAT,
        **about,
        "parts": judged(parts, about["seeds"], runs),
        "rule": RULE,
        "runs": dict(runs),
        "failed": dict(failed),
        "seconds": {"computing": round(sum(value or 0.0 for value in seconds), 3), "unknown": seconds.count(None)},
        "commits": sorted({found["git"] for found in done}, key=str),
        **provenance(device),
        "hardware": ", ".join(sorted({found["hardware"] for found in done})),
    }


def with_means(run: Mapping[str, Any], seeds: Mapping[str, Any]) -> dict[str, Any]:
    """A run's title, settings and parts with what was measured, by seed, and the means over the seeds."""
    best = [found["best"]["measures"] for found in seeds.values() if found["best"]]
    return {
        **{name: run[name] for name in ("title", "settings", "parts")},
        "seeds": dict(seeds),
        "mean": _means([found["measures"] for found in seeds.values()]),
        "best": _means(best),
    }


def _means(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of every share that all seeds have; ``flips`` under PGD on the model, ``largest``: the most used
    expert's share."""
    flat = [
        {name: value for name, value in each.items() if isinstance(value, float) and name != "alpha"}
        | ({"flips": each["flips"]["ra"], "largest": max(each["first"])} if "first" in each else {})
        for each in seeds
    ]
    common = [name for name in (flat[0] if flat else ()) if all(name in each for each in flat)]
    return {name: Spread(tuple(each[name] for each in flat)).plain() for name in common}


def judged(parts: Sequence[str], seeds: Sequence[int], runs: Mapping[str, Any]) -> dict[str, Any]:
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


def read_results(path: Path, readable: Sequence[int] = READABLE, content: Check = CONTENT) -> dict[str, Any]:
    """The content of a study.json of one of the formats ``readable``, as ``content`` describes it.

    Raises:
        StudyError: no such file, another format or other content.
    """
    expected = f"{path}: expected a study.json of robust-moe reproduce, of format {' or '.join(map(str, readable))}"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        got = results["format"]
    except (OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{expected}, got {type(error).__name__}: {error}") from error
    if got not in readable:
        raise StudyError(f"{expected}, got format {got!r}")
    try:
        content(results, "")
    except ContentError as error:
        raise StudyError(f"{path}: {error}") from error
    return results


def report_outputs(parts: Sequence[str], target: Path) -> list[Output]:
    """The files of a report on ``parts`` in the folder ``target``."""
    figures = [(target / f"{part}-{name}.png", figure("reproduce")) for part in parts for name in FIGURES[part]]
    return [(target / "study.json", STUDY), (target / "summary.md", SUMMARY), *figures]


def write_report(results: dict[str, Any], target: Path) -> Path:
    """Figures, study.json and summary.md, in ``target``; returns the path of the second."""
    target.mkdir(parents=True, exist_ok=True)
    found = {run: content["seeds"] for run, content in results["runs"].items()}
    figures = {part: draw_part(part, found, target) for part in results["parts"]}
    page = summary(results, figures).encode()
    write_json(target / "study.json", results)
    replace_file(target / "summary.md", page)
    return target / "study.json"
