"""``robust-moe sweep``."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from robust_moe.commands.shared import (
    STOPPED,
    Imports,
    SettingsCommand,
    Traceback,
    import_modules,
    new_app,
    one_line_errors,
)
from robust_moe.config import preset_names
from robust_moe.console import make_console
from robust_moe.engine import Reporter
from robust_moe.runs import plan_sweep, run_sweep, runs_table
from robust_moe.runs.table import problem_lines

__all__ = ["SweepError", "app"]

app = new_app()


class SweepError(ValueError):
    """Runs of a sweep failed; the others are finished."""


@app.command(cls=SettingsCommand)
@one_line_errors
def sweep(
    config: Annotated[
        str, typer.Argument(help=f"A YAML file, or one of: {', '.join(preset_names())}.", show_default=False)
    ],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE,...",
            help="Settings, e.g. optim.lr=0.05,0.1 run.seed=0,1,2; one with a single value is for all runs. A comma "
            "inside [ ] or { } belongs to its value, so a list is written in brackets: model.moe.layers=[layer3.1,"
            "layer4.1],[layer4.1]; and so does one after a backslash.",
            show_default=False,
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Runs at a time; default: as many as have run.threads CPU cores each, on a GPU one.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Folder of the run folders; default: runs/sweep-CONFIG.", show_default=False),
    ] = None,
    imports: Imports = None,
    show_traceback: Traceback = False,
) -> None:
    """Train every combination of settings with several values, side by side on this machine.

    Each combination has a run folder, named by its settings, and is trained and evaluated as by robust-moe train. The
    same command goes on: runs that are finished are passed over, those that were stopped are resumed. Ctrl-C saves and
    stops all. A run that fails is said, and the others go on.
    """
    folder = f"runs/sweep-{Path(config).stem}" if out is None else out
    runs = plan_sweep(config, settings, folder, import_modules(imports, []))
    reporter = Reporter(console=make_console())
    outcome = run_sweep(runs, jobs, reporter)
    found = [run.summary() for run in runs if run.folder.is_dir()]
    reporter.console.print(runs_table(found, f"sweep in {folder}", datetime.now()))
    for line in problem_lines(found):
        reporter.line(line)
    if outcome.stopped:
        reporter.line("stopped; the same command goes on")
        raise typer.Exit(STOPPED)
    if outcome.failed:
        first, why = next(iter(outcome.failed.items()))
        more = f" (and {len(outcome.failed) - 1} more)" if len(outcome.failed) > 1 else ""
        raise SweepError(
            f"{len(outcome.failed)} of {len(runs)} runs failed; {first}: {why}{more}; the same command tries again"
        )
