"""``robust-moe demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_moe.commands.shared import STOPPED, Traceback, console, new_app, one_line_errors
from robust_moe.demo import run_demo

__all__ = ["app"]

app = new_app()


@app.command()
@one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/demo"),
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run; default: the presets'.")] = None,
    show_traceback: Traceback = False,
) -> None:
    """Train a routed network and its dense twin on handwritten digits, and compare them.

    PGD-7 trains both; PGD-20 attacks them. Takes minutes.
    """
    if len(run_demo(out, epochs, console=console())) < 2:
        raise typer.Exit(STOPPED)
