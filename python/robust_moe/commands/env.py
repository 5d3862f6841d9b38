"""``robust-moe env``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table

from robust_moe.commands.shared import new_app
from robust_moe.console import make_console
from robust_moe.engine.experiment import resolve_device
from robust_moe.engine.fabric import explain_precision
from robust_moe.provenance import git_revision, versions
from robust_moe_kernels.env import OpStatus, report

__all__ = ["app"]

app = new_app()


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead, with the reasons.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every implementation, and why one cannot run.")] = False,
) -> None:
    """Versions, devices, and which implementation of every op can run here."""
    facts = {
        **versions(),
        "git": git_revision() or "not a checkout",
        "run.precision": explain_precision(resolve_device("auto")),
    }
    rows = report()
    if as_json:
        typer.echo(json.dumps({"facts": facts, "implementations": [dataclasses.asdict(row) for row in rows]}, indent=2))
        return
    out = make_console()
    table = Table(title="software and devices")
    table.add_column("what")
    table.add_column("found")
    for name, version in facts.items():
        table.add_row(name, version)
    out.print(table)
    out.print(_every(rows) if every else _defaults(rows))
    if not every:
        out.print("which others could run, and why the rest cannot: robust-moe env --all")


def _defaults(rows: Iterable[OpStatus]) -> Table:
    """What computes every op on each kind of device."""
    chosen: dict[str, dict[str, str]] = {}
    for row in rows:
        devices = chosen.setdefault(row.op, {})
        if row.default:
            devices[row.device] = row.impl
    table = Table(title="what computes an op")
    for column in ("op", "cpu", "cuda"):
        table.add_column(column)
    for op, devices in chosen.items():
        table.add_row(op, *(devices.get(device, "nothing") for device in ("cpu", "cuda")))
    return table


def _every(rows: Iterable[OpStatus]) -> Table:
    table = Table(title="implementations")
    for column in ("op", "implementation", "device", "can run", "why not"):
        table.add_column(column)
    for row in rows:
        mark = ("default" if row.default else "yes") if row.available else "no"
        table.add_row(row.op, row.impl, row.device, mark, row.reason)
    return table
