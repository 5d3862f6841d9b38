"""``robust-moe env``."""

from __future__ import annotations

from rich.table import Table

from robust_moe.commands.shared import new_app
from robust_moe.console import make_console
from robust_moe.engine.experiment import resolve_device
from robust_moe.engine.fabric import explain_precision
from robust_moe.provenance import git_revision, versions
from robust_moe_kernels.env import report

__all__ = ["app"]

app = new_app()


@app.command()
def env() -> None:
    """Versions, devices, and which implementation of every op can run here."""
    out = make_console()
    table = Table(title="software and devices")
    table.add_column("what")
    table.add_column("found")
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("git", git_revision() or "not a checkout")
    table.add_row("run.precision", explain_precision(resolve_device("auto")))
    out.print(table)
    ops = Table(title="implementations")
    for column in ("op", "implementation", "device", "can run", "why not"):
        ops.add_column(column)
    for row in report():
        mark = ("default" if row.default else "yes") if row.available else "no"
        ops.add_row(row.op, row.impl, row.device, mark, row.reason)
    out.print(ops)
