"""``robust-moe demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from robust_moe.commands.shared import STOPPED, Traceback, new_app, one_line_errors, stoppable
from robust_moe.console import make_console
from robust_moe.demo import run_demo
from robust_moe.engine import Reporter

__all__ = ["app"]

app = new_app()


@app.command()
@one_line_errors
def demo(
    out: Annotated[str, typer.Option(metavar="PATH", help="Folder of the runs.")] = "runs/demo",
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run; default: the presets'.")] = None,
    show_traceback: Traceback = False,
) -> None:
    """Train a routed network and its dense twin on handwritten digits, and compare them.

    PGD-7 trains both; PGD-20 attacks them. Takes minutes.
    """
    console = make_console()
    with stoppable(Reporter(console=console).line):
        finished = run_demo(out, epochs, console=console)
    if len(finished) < 2:
        raise typer.Exit(STOPPED)
