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

from robust_moe.console import visible
from robust_moe.evaluation.tables import plain_table
from robust_moe.files import replace_file
from robust_moe.runs.summary import RunSummary

__all__ = ["COLUMNS", "problem_lines", "runs_table", "write_csv", "written_at"]

# of the CSV file; shares are in 0..1, a cell that is empty was not measured
COLUMNS = (
    *("run", "state", "method", "model", "epoch", "epochs", "val_clean", "val_robust", "best_val_robust", "best_epoch"),
    *("test_clean", "test_robust", "images_per_second", "written", "folder", "problems"),
)
_LINE = 20  # characters of a name in one line
# columns beside the name and the state, with their usual widths; the first go first where a console is narrow
_SPARED = {"img/s": 6, "when": 5, "model": 7, "method": 7, "SA": 4, "epoch": 7, "RA": 4, "best": 4}
_NAME, _STATE = 12, 8  # characters that a run's name and its state have even then
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # by which a spreadsheet knows one
_CAPTION = "SA, RA: clean and robust accuracy of the last validation in percent; best: the highest RA of all"


def runs_table(runs: Sequence[RunSummary], title: str, now: datetime, width: int = 80) -> Table:
    """One row per run, which fits 80 characters, and fewer with fewer columns. Of a method or model that all have, the
    caption tells once."""
    shared = [
        (name, values.pop())
        for name in ("method", "model")
        if len(values := {getattr(run, name) for run in runs if run.settings}) == 1
    ]
    shown = _shown([name for name in _SPARED if name not in dict(shared)], width)
    told = [name for name in ("method", "model") if name in shown]
    numbers = [name for name in ("epoch", "SA", "RA", "best", "img/s", "when") if name in shown]
    table = plain_table(title, "\n".join([_CAPTION, *(f"{name} of all: {visible(value)}" for name, value in shared)]))
    table.padding = (0, 0, 0, 0)  # one space between columns, of which there are many
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True, min_width=_STATE)
    for name in told:
        table.add_column(name, overflow="fold", min_width=7)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    for run in runs:
        shares = {"SA": run.clean, "RA": run.robust, "best": run.best}
        cells = {name: "" if share is None else f"{100 * share:.1f}" for name, share in shares.items()}
        cells["epoch"] = "" if run.epochs is None else f"{run.epoch}/{run.epochs}"
        cells["img/s"] = "" if run.speed is None else f"{run.speed:,.0f}"
        cells["when"] = written_at(run, now)
        table.add_row(
            Text(_broken(visible(run.name))),
            run.state,
            *(Text(visible(getattr(run, name))) for name in told),
            *(cells[name] for name in numbers),
        )
    return table


def _shown(columns: Sequence[str], width: int) -> Sequence[str]:
    """Those of ``columns`` that have room beside the name and the state of a run."""
    room = width - _NAME - 1 - _STATE
    while columns and sum(1 + _SPARED[name] for name in columns) > room:
        columns = columns[1:]
    return columns


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
    return [visible(f"{run.name}: {'; '.join(run.problems)}") for run in runs if run.problems]


def write_csv(runs: Sequence[RunSummary], path: str | Path) -> None:
    """Write :data:`COLUMNS` of every run to ``path``, exact numbers, times in UTC; in UTF-8, what has no such code as
    ``\\udcff``. A folder may be anyone's: text that a spreadsheet would take for a formula gets an apostrophe first."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for run in runs:
        written = "" if run.written is None else f"{datetime.fromtimestamp(run.written, UTC):%Y-%m-%dT%H:%M:%SZ}"
        rows.writerow(
            [
                *(*map(_no_formula, (run.name, run.state, run.method, run.model)), run.epoch, run.epochs),
                *(run.clean, run.robust, run.best, run.best_epoch, run.test_clean, run.test_robust),
                *(run.speed, written, _no_formula(str(run.folder)), _no_formula("; ".join(run.problems))),
            ]
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.getvalue().encode("utf-8", "backslashreplace"))


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
