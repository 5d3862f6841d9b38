"""``robust-moe runs``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from robust_moe.commands.shared import Traceback, new_app, one_line_errors
from robust_moe.config import ConfigError
from robust_moe.console import make_console
from robust_moe.outputs import comparison_outputs, expect_named, expect_outputs
from robust_moe.runs import find_runs, runs_table, write_csv, write_page
from robust_moe.runs.table import problem_lines

__all__ = ["app"]

app = new_app()


@app.command()
@one_line_errors
def runs(
    folder: Annotated[str, typer.Argument(help="Searched for run folders, with all below it.")] = "runs",
    csv: Annotated[
        str | None, typer.Option(metavar="PATH", help="Write the numbers to a CSV file too.", show_default=False)
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Write a page with the curves of all runs too.", show_default=False),
    ] = None,
    show_traceback: Traceback = False,
) -> None:
    """The runs in a folder, side by side: state, accuracies, speed.

    A run is finished, stopped, or running: then a training holds its folder's lock. Nothing in a run folder is changed.
    Of a damaged folder, or one that is not a run's, one line below the table says what is wrong with it.
    """
    table = None if csv is None else expect_named("csv", csv)
    page = None if html is None else expect_named("html", html)
    expect_outputs("csv", comparison_outputs(table, None))
    expect_outputs("html", comparison_outputs(table, page))
    found = find_runs(expect_named("folder", folder))
    if not found:
        raise ConfigError(f"folder: expected a folder of run folders, found none in {folder}")
    out = make_console()
    out.print(runs_table(found, f"runs in {folder}", datetime.now()))
    for line in problem_lines(found):
        out.print(line, soft_wrap=True)
    if table is not None:
        write_csv(found, table)
        out.print(f"table: {table}", soft_wrap=True)
    if page is not None:
        write_page(found, page, expect_named("folder", folder).resolve().name)
        out.print(f"page: {page}", soft_wrap=True)
