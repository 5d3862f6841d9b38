"""The files that each command writes, with their kinds."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from robust_moe.outputs.checks import place_of
from robust_moe.outputs.kinds import JSON_LIMIT, Kind, Output, figure, head_of, journal, json_with, members_of, text

__all__ = [
    "CERTIFIED_JOURNAL",
    "COMPARED",
    "CONFIG",
    "EVENTS_SUFFIX",
    "EXPORT_MARK",
    "JOURNAL",
    "certificate_outputs",
    "comparison_outputs",
    "evaluation_outputs",
    "export_outputs",
    "pretrained_outputs",
    "robustbench_file",
    "run_outputs",
    "samples_file",
]

COMPARED = "runs compared"  # ends the title of a comparison's page
EVENTS_SUFFIX = ".robust-moe"  # of the names of TensorBoard's files
EXPORT_MARK = "robust-moe-export"  # in an ONNX file, and the name of an entry of a program of torch.export


def _checkpoint(path: Path, known: bool) -> bool:
    if known:  # a damaged one too
        return True
    members = members_of(path)
    if "data.pkl" not in members:
        return False
    try:
        with zipfile.ZipFile(path) as archive, archive.open(members["data.pkl"]) as file:
            pickled = file.read(JSON_LIMIT)  # never unpickled: it has the names of its entries as plain text
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
    return all(name in pickled for name in (b"config", b"position", b"format"))


def _metrics(path: Path, known: bool) -> bool:
    """Any whole line is of a run, or there is none yet."""
    lines = head_of(path).splitlines()
    return known or not lines or any(line.startswith(b'{"kind": ') and b'"step": ' in line for line in lines)


def _config(path: Path, known: bool) -> bool:
    """Every section is there, and no comment: a configuration that was written by hand is not to be lost. With a
    checkpoint beside it the run goes on, and a file with comments stays as it is."""
    if known and any(path.with_name(name).is_file() for name in ("last.pt", "best.pt")):
        return True
    content = head_of(path, JSON_LIMIT).decode("utf-8", "replace")
    sections = {line.partition(":")[0] for line in content.splitlines() if ":" in line}
    return {"data", "model", "method", "optim", "eval", "run"} <= sections and not _has_comment(content)


def _has_comment(content: str) -> bool:
    """Whether YAML has a comment, or cannot be read: a # that is part of no token."""
    if "#" not in content:
        return False
    import yaml

    end = 0
    try:
        for token in yaml.scan(content, Loader=yaml.SafeLoader):
            if "#" in content[end : token.start_mark.index]:
                return True
            end = max(end, token.end_mark.index)
    except yaml.YAMLError:
        return True
    return "#" in content[end:]


def _events(path: Path) -> bool:
    """A file of events whose name has a run's suffix; or an earlier version's: without a suffix, and with the epoch of
    training that every run logs. Other programs may write to the same folder."""
    name = path.name.removesuffix(EVENTS_SUFFIX)
    if not path.is_file() or not re.fullmatch(r"events\.out\.tfevents\.\d{10,}\..+\.\d+\.\d+", name):
        return False
    return name != path.name or b"train/epoch" in head_of(path)


CONFIG = Kind("the configuration of an earlier run, which has no comments", _config)
CHECKPOINT = Kind("a checkpoint of an earlier run", _checkpoint)
METRICS = Kind("the metrics of an earlier run", _metrics)
EVENTS = Kind("TensorBoard's events of an earlier run", lambda path, known: known)
RESULTS = json_with("a result file of robust-moe eval", "format", "attacks", "clean")
REPORT = Kind("a report of robust-moe eval", lambda path, _: b"robustness report</title>" in head_of(path))
JOURNAL = journal("the journal of an evaluation", foreign="by")
ROBUSTBENCH = json_with("an entry of RobustBench", "autoattack_acc", "clean_acc")
COMPARISON = Kind("a page of robust-moe runs", lambda path, _: COMPARED.encode() + b"</title>" in head_of(path))
RUNS_TABLE = text("a table of robust-moe runs", "run,state,")
CERTIFIED = json_with("a result file of robust-moe certify", "format", "by", "guarantee")
CERTIFIED_JOURNAL = journal("the journal of robust-moe certify", foreign="preset")
CERTIFIED_FIGURE = figure("certify")
ONNX = Kind("an ONNX file of robust-moe export", lambda path, _: EXPORT_MARK.encode() in head_of(path))
PROGRAM = Kind("a program of robust-moe export", lambda path, _: EXPORT_MARK in members_of(path))
DESCRIPTION = json_with("the description of a model of robust-moe", "format", "robust_moe", "model", "data")
WEIGHTS = Kind("the weights beside such a description", lambda path, known: known)
RUN_FIGURES = {"training.png": figure("train", "epoch"), "routing.png": figure("train", "routing")}


def samples_file(path: Path) -> Path:
    """The arrays beside the result file ``path``: ``samples.npz`` beside ``results.json``."""
    stem = path.stem.replace("results", "samples", 1) if "results" in path.stem else f"{path.stem}-samples"
    return path.with_name(f"{stem}.npz")


def samples_of(results: Path) -> Kind:
    """The arrays of ``results``; those of another result file that gives them the same name belong to that one."""

    def owner(path: Path) -> Path | None:
        claims = json_with("", "format", "attacks", "clean", samples=path.name).ours
        others = (each for each in path.parent.glob("*.json") if samples_file(each).name == path.name)
        return next(
            (each for each in sorted(others) if place_of(each) != place_of(results) and claims(each, False)), None
        )

    def ours(path: Path, _: bool) -> bool:
        return {"index.npy", "label.npy", "clean.npy"} <= {*members_of(path)}

    return Kind("the arrays of robust-moe eval", ours, owner)


def robustbench_file(path: Path) -> Path:
    """The RobustBench entry beside the result file ``path``."""
    return path.with_name(f"{path.stem}-robustbench.json")


def evaluation_outputs(results: Path | None, report: Path | None, entry: bool = False) -> list[Output]:
    """Of an evaluation: the result file ``results`` with its arrays and, if ``entry``, RobustBench's; the HTML file
    ``report``; the journal, beside the first of the two."""
    first = results or report
    outputs = [] if first is None else [(first.with_suffix(".journal"), JOURNAL)]
    if results is not None:
        outputs += [(results, RESULTS), (samples_file(results), samples_of(results))]
        outputs += [(robustbench_file(results), ROBUSTBENCH)] if entry else []
    return outputs if report is None else [*outputs, (report, REPORT)]


def certificate_outputs(path: Path) -> list[Output]:
    """Of ``robust-moe certify``: the result file ``path``, its plot, its journal."""
    plot, kept = path.with_suffix(".png"), path.with_suffix(".journal")
    return [(path, CERTIFIED), (plot, CERTIFIED_FIGURE), (kept, CERTIFIED_JOURNAL)]


def comparison_outputs(table: Path | None, page: Path | None) -> list[Output]:
    """Of ``robust-moe runs``: the CSV file ``table``, the HTML file ``page``; None: not asked for."""
    asked = ((table, RUNS_TABLE), (page, COMPARISON))
    return [(path, kind) for path, kind in asked if path is not None]


def export_outputs(path: Path) -> list[Output]:
    """Of an export to one file, ONNX by its suffix, or else a program of ``torch.export``."""
    return [(path, ONNX if path.suffix == ".onnx" else PROGRAM)]


def pretrained_outputs(description: Path, weights: Sequence[Path]) -> list[Output]:
    """Of a model for others: its description, and the files that its weights may be in."""
    return [(description, DESCRIPTION), *((path, WEIGHTS) for path in weights)]


def run_outputs(folder: Path) -> list[Output]:
    """Of a training and what follows it, in its run folder."""
    return [
        (folder / "config.yaml", CONFIG),
        (folder / "metrics.jsonl", METRICS),
        *((folder / name, CHECKPOINT) for name in ("last.pt", "best.pt", "crash.pt")),
        *((path, CHECKPOINT) for path in sorted(folder.glob("step-*.pt")) if re.fullmatch(r"step-\d+\.pt", path.name)),
        *((path, EVENTS) for path in sorted(folder.glob("tensorboard/events.out.tfevents.*")) if _events(path)),
        *((folder / name, kind) for name, kind in RUN_FIGURES.items()),
        *evaluation_outputs(folder / "results.json", folder / "results.html"),
    ]
