"""``robust-moe export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_moe.api import load_model
from robust_moe.commands.shared import Traceback, new_app, one_line_errors
from robust_moe.console import make_console
from robust_moe.engine.experiment import checkpoint_file
from robust_moe.pretrained import export_model, save_pretrained

__all__ = ["app"]

app = new_app()


@app.command()
@one_line_errors
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file, or a run folder: its best.pt.", show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(
            help="NAME.onnx, NAME.pt2 (torch.export), or a folder for weights and config.json (from_pretrained).",
            show_default=False,
        ),
    ],
    show_traceback: Traceback = False,
) -> None:
    """A trained model as a file that other programs run, or as a folder that from_pretrained reads."""
    model = load_model(checkpoint_file(checkpoint), device="cpu")
    written = [export_model(model, out)] if out.suffix else save_pretrained(model, out)
    for path in written:
        make_console().print(f"written: {path}", soft_wrap=True)
