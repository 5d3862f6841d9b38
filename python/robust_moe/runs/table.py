"""Runs as a table on screen and as a CSV file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table
from rich.text import Text

from robust_moe.evaluation.tables import plain_table
from robust_moe.files import replace_file
from robust_moe.runs.summary import RunSummary

__all__ = ["COLUMNS", "problem_lines", "runs_table", "write_csv", "written_at"]

# of the CSV file; shares are in 0..1, a cell that is empty was not measured
COLUMNS = (
    *("run", "state", "method", "model", "epoch", "epochs", "val_clean", "val_robust", "best_val_robust", "best_epoch"),
    *("test_clean", "test_robust", "images_per_second", "written", "folder", "problems"),
)
_LINE = 20  # characters of a name that the narrowest table has room for
_CAPTION = "SA, RA: clean and robust accuracy of the last validation in percent; best: the highest RA of all"


def runs_table(runs: Sequence[RunSummary], title: str, now: datetime) -> Table:
    """One row per run, which fits 80 characters. Of a method or model that all have, the caption tells once."""
    shared = [
        (name, values.pop())
        for name in ("method", "model")
        if len(values := {getattr(run, name) for run in runs if run.settings}) == 1
    ]
    told = [name for name in ("method", "model") if name not in dict(shared)]
    table = plain_table(title, "\n".join([_CAPTION, *(f"{name} of all: {value}" for name, value in shared)]))
    table.padding = (0, 0, 0, 0)  # one space between columns, of which there are many
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True, min_width=8)
    for name in told:
        table.add_column(name, overflow="fold", min_width=7)
    for name in ("epoch", "SA", "RA", "best", "img/s", "when"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for run in runs:
        table.add_row(
            Text(_broken(run.name)),
            run.state,
            *(Text(getattr(run, name)) for name in told),
            "" if run.epochs is None else f"{run.epoch}/{run.epochs}",
            *("" if share is None else f"{100 * share:.1f}" for share in (run.clean, run.robust, run.best)),
            "" if run.speed is None else f"{run.speed:,.0f}",
            written_at(run, now),
        )
    return table


def _broken(name: str) -> str:
    """A long name in lines that end where a folder or a setting ends."""
    return re.sub("(?<=[,/])", "\n", name) if len(name) > _LINE else name


def written_at(run: RunSummary, now: datetime) -> str:
    """When a run was last logged to, in local time: of today the hour, of this year the day, else the month."""
    if run.written is None:
        return ""
    then = datetime.fromtimestamp(run.written)
    if then.date() == now.date():
        return f"{then:%H:%M}"
    return f"{then:%m-%d}" if then.year == now.year else f"{then:%Y-%m}"


def problem_lines(runs: Sequence[RunSummary]) -> list[str]:
    """One line per run of which something cannot be read."""
    return [f"{run.name}: {'; '.join(run.problems)}" for run in runs if run.problems]


def write_csv(runs: Sequence[RunSummary], path: str | Path) -> None:
    """Write :data:`COLUMNS` of every run to ``path``, exact numbers, times in UTC."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for run in runs:
        written = "" if run.written is None else f"{datetime.fromtimestamp(run.written, UTC):%Y-%m-%dT%H:%M:%SZ}"
        rows.writerow(
            [
                *(run.name, run.state, run.method, run.model, run.epoch, run.epochs),
                *(run.clean, run.robust, run.best, run.best_epoch, run.test_clean, run.test_robust),
                *(run.speed, written, run.folder, "; ".join(run.problems)),
            ]
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue().encode("utf-8", "surrogateescape"))
