"""Runs side by side on one HTML page: their curves, their numbers, the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator, PercentFormatter

from robust_moe.evaluation.figures import inline_svg
from robust_moe.evaluation.html_report.blocks import (
    NOT_MEASURED,
    Cell,
    Figure,
    Missing,
    Section,
    Table,
    Text,
    number,
    percent,
)
from robust_moe.evaluation.html_report.report import render_page
from robust_moe.evaluation.plots import MARKERS, NEUTRAL, RUNS, WIDTH, named_legend, new_figure, series, tidy
from robust_moe.files import replace_file
from robust_moe.outputs import COMPARED
from robust_moe.runs.summary import RunSummary

__all__ = ["MOST_NAMED", "curves", "differing", "write_page"]

MOST_NAMED = 12  # curves with a colour and a name; more cannot be told apart
_NO_CHOICE = ("run.out", "run.imports")  # differ without a change of what is trained


def write_page(runs: Sequence[RunSummary], path: str | Path, title: str) -> None:
    """Write the page of ``runs`` to ``path``; it fetches nothing, and is the same for the same runs."""
    parts = [_curve_section(runs), _number_section(runs), _setting_section(runs), _problem_section(runs)]
    counts = {state: sum(run.state == state for run in runs) for state in dict.fromkeys(run.state for run in runs)}
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    page = render_page(f"{title}: {COMPARED}", f"{len(runs)} runs: {said}", parts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.encode("utf-8", "replace"))


def _best_first(runs: Sequence[RunSummary]) -> list[RunSummary]:
    return sorted(runs, key=lambda run: -1.0 if run.best is None else run.best, reverse=True)


def curves(runs: Sequence[RunSummary]) -> Drawing:
    """Robust and clean accuracy on validation images and the training loss of every run over its epochs.

    The :data:`MOST_NAMED` runs with the highest robust accuracy have a colour and a name, the best first; the others
    are grey.
    """
    ordered = _best_first(runs)
    named, others = ordered[:MOST_NAMED], ordered[MOST_NAMED:]
    count = len(named) + bool(others)
    figure = new_figure(WIDTH, 3 * 2.6 + 0.24 * count)
    panels = figure.subplots(3, 1, sharex=True)
    keys = (
        ("val_robust", "robust accuracy (RA)"),
        ("val_clean", "clean accuracy (SA)"),
        ("train_loss", "training loss"),
    )
    for axes, (key, label) in zip(panels, keys, strict=True):
        for run in others:
            axes.plot(*_series(run, key), color=NEUTRAL, linewidth=0.8, alpha=0.4)
        lines = [
            axes.plot(
                *_series(run, key),
                color=RUNS[place % len(RUNS)],
                linestyle="-" if place < len(RUNS) else "--",  # where the colours come round
                marker=MARKERS[place % len(MARKERS)],
                markersize=3.5,
                linewidth=1.3,
            )[0]
            for place, run in enumerate(named)
        ]
        tidy(axes, "", label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if key != "train_loss":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[-1].set_xlabel("epoch")
    names = [run.name for run in named]
    if others:
        lines.append(panels[0].plot([], [], color=NEUTRAL, linewidth=0.8, alpha=0.4)[0])
        names.append(f"{len(others)} others")
    named_legend(panels[0], lines, names)
    return figure


def _series(run: RunSummary, key: str) -> tuple[list[int], list[float]]:
    """Over the epochs; a training whose loss is the task's alone logs it as that."""
    there = any(key in line for line in run.lines)
    return series(run.lines, key if there or key != "train_loss" else "train_task_loss")


def _curve_section(runs: Sequence[RunSummary]) -> Section | Missing:
    measured = [run for run in runs if run.lines]
    if not measured:
        return Missing("Curves: no run has finished an epoch.", None)
    label = "; ".join(f"{run.name}: best robust accuracy {percent(run.best).text}" for run in _best_first(measured))
    caption = "Accuracies on validation images, under the attack that each run validates with."
    if len(measured) > MOST_NAMED:
        caption += f" The {MOST_NAMED} runs with the highest robust accuracy are named, the best first."
    return Section("curves", "Curves", [Figure(inline_svg(curves(measured), "curves", label), caption)])


def _number_section(runs: Sequence[RunSummary]) -> Section | Missing:
    if not runs:
        return Missing("Numbers: there is no run.", None)
    rows = [
        [
            *(Cell(run.name), Cell(run.state), Cell(run.method or NOT_MEASURED), Cell(run.model or NOT_MEASURED)),
            Cell(NOT_MEASURED if run.epochs is None else f"{run.epoch} of {run.epochs}"),
            *map(percent, (run.clean, run.robust, run.best, run.test_clean, run.test_robust)),
            number(run.speed),
            Cell(NOT_MEASURED if run.written is None else f"{datetime.fromtimestamp(run.written, UTC):%Y-%m-%d %H:%M}"),
        ]
        for run in _best_first(runs)
    ]
    columns = (
        *("run", "state", "method", "model", "epoch", "SA", "RA", "best RA", "test SA", "test RA"),
        *("images a second", "last written (UTC)"),
    )
    text = (
        "SA and RA: clean and robust accuracy on validation images, of the last validation; best RA: the highest of "
        "all. Test: of the best checkpoint, as the evaluation after the training has it."
    )
    return Section("numbers", "Numbers", [Text("text", text), Table("The best first", columns, rows)])


def differing(runs: Sequence[RunSummary]) -> list[str]:
    """Names of the settings that not all of ``runs`` have alike, in the order of their configurations."""
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings if name not in _NO_CHOICE)
    return [name for name in names if len({settings.get(name) for settings in known}) > 1]


def _setting_section(runs: Sequence[RunSummary]) -> Section | Missing:
    known = [run for run in _best_first(runs) if run.settings]
    names = differing(known)
    if not names:
        return Missing("Settings in which the runs differ: there are none.", None)
    rows = [[Cell(run.name), *(Cell(run.settings.get(name, NOT_MEASURED)) for name in names)] for run in known]
    return Section("settings", "Settings that differ", [Table("Of every run", ("run", *names), rows)])


def _problem_section(runs: Sequence[RunSummary]) -> Section | None:
    rows = [[Cell(run.name), Cell(problem)] for run in runs for problem in run.problems]
    table = Table("What is damaged, missing or foreign", ("run", "what"), rows)
    return Section("problems", "What could not be read", [table]) if rows else None
