"""``robust-moe config``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from robust_moe.commands.shared import (
    Dense,
    Imports,
    Overrides,
    SettingsCommand,
    Traceback,
    import_modules,
    new_app,
    one_line_errors,
)
from robust_moe.config import preset_names, resolve_config, yaml_text
from robust_moe.console import make_console
from robust_moe.settings import Config, plain

__all__ = ["app"]

app = new_app()


class Setting(NamedTuple):
    """A row of the table."""

    key: str
    value: str
    meaning: str
    origin: str


def settings_of(config: Config, origins: dict[str, str], key: str = "") -> Iterator[Setting]:
    """Every setting of ``config`` and its sections; ``origins``: where the chosen ones come from."""
    values = plain(config)
    if "name" in values and type(config).table is not None:
        place = f"{key}name"
        names = ", ".join(type(config).table)
        yield Setting(place, config.name, f"one of: {names}", origins.get(place, "default"))
    for field in dataclasses.fields(config):
        place, value = f"{key}{field.name}", getattr(config, field.name)
        if isinstance(value, Config):
            yield from settings_of(value, origins, f"{place}.")
            continue
        unit = f" [{field.metadata['unit']}]" if field.metadata.get("unit") else ""
        meaning = f"{field.metadata['meaning']}{unit}"
        yield Setting(place, _shown(values[field.name]), meaning, origins.get(place, "default"))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@app.command(cls=SettingsCommand)
@one_line_errors
def config(
    source: Annotated[
        str, typer.Argument(help=f"A YAML file, or one of: {', '.join(preset_names())}.", show_default=False)
    ],
    overrides: Overrides = None,
    dense: Dense = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="As a YAML file that train reads.")] = False,
    imports: Imports = None,
    show_traceback: Traceback = False,
) -> None:
    """Every setting in force, with its unit, its meaning and where it came from."""
    found = resolve_config(source, import_modules(imports, overrides), dense=dense)
    out = make_console()
    if as_yaml:
        out.print(yaml_text(found.config), end="", soft_wrap=True)
        return
    table = Table(title=source, title_justify="left")
    table.add_column("setting", no_wrap=True)
    for column in ("value", "meaning [unit]", "from"):
        table.add_column(column, overflow="fold")
    for row in settings_of(found.config, found.origins):
        table.add_row(*row)
    out.print(table)
