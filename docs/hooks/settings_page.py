"""The page of all settings, made from the classes that check them: one table for each section of a configuration, and
one for each component that a section can choose."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

from robust_moe.config import TrainConfig
from robust_moe.settings import Config, field_types

__all__ = ["settings_page"]

HEAD = """# Settings

Every setting of a training run, made from the code when this site is built. `robust-moe config PRESET KEY=VALUE ...`
shows the same for one run: the values in force, and where each comes from. A setting is `section.name=value` on the
command line, and a nested mapping in a YAML file. `null` is no value.

A section whose kind is, say, *attack* chooses one of the [attacks](#attack) by its `name`, and then has the settings of
all attacks and those of the one chosen: `method.attack={name: pgd, steps: 10}`, or `method.attack.steps=10`.
"""
SIMPLE = {
    "int": "whole number",
    "float": "number",
    "bool": "`true`, `false`",
    "str": "text",
    "Fraction": "number, `8/255`",
}


def settings_page() -> str:
    """Markdown."""
    parts = [HEAD]
    waiting: deque[tuple[type[Config], str]] = deque([(TrainConfig, "")])
    seen: set[type[Config]] = set()
    while waiting:
        kind, key = waiting.popleft()
        if kind in seen:
            continue
        seen.add(kind)
        parts += section(kind, key, waiting)
    return "\n".join(parts) + "\n"


def section(kind: type[Config], key: str, waiting: deque[tuple[type[Config], str]]) -> Iterator[str]:
    """The text of one section; the sections inside are put on ``waiting``, under their keys."""
    if kind is TrainConfig:
        title, prefix = "A configuration", ""
    elif kind.table is not None:
        title, prefix = kind.table.what.capitalize(), ""
    else:
        title, prefix = f"`{key}`", f"{key}."
    yield f"\n## {title} {{ #{anchor(kind, key)} }}\n"
    yield (kind.__doc__ or "").partition("\n\n")[0].replace("\n    ", " ") + "\n" if own_text(kind) else ""
    if kind.table is not None:
        yield f"As in the section `{key}`.\n"
    common = {field.name for field in dataclasses.fields(kind)}
    yield from table(kind, common, prefix, key, waiting)
    if kind.table is None:
        return
    for name in kind.table:
        member = kind.table[name]
        if not issubclass(member, kind):
            continue
        own = {
            field.name
            for field in dataclasses.fields(member)
            if field.name not in common or default_of(member, field.name) != default_of(kind, field.name)
        }
        yield f"\n### `name={name}` {{ #{kind.table.what.replace(' ', '-')}-{name.replace('_', '-')} }}\n"
        if own:
            yield from table(member, own, "", key, waiting)
        else:
            yield "No further settings.\n"


def table(
    kind: type[Config], names: set[str], prefix: str, key: str, waiting: deque[tuple[type[Config], str]]
) -> Iterator[str]:
    """A row for each of the fields ``names``."""
    rows = []
    for field in dataclasses.fields(kind):
        if field.name not in names:
            continue
        inner = section_type(field_types(kind)[field.name])
        below = f"{key}.{field.name}" if key else field.name
        if inner is None:
            default = f"`{shown(field.default)}`"
            values = values_of(field_types(kind)[field.name], field.metadata)
        else:
            waiting.append((inner, below))
            default = getattr(field.default, "name", "") if inner.table is not None else ""
            default = f"`{default}`" if default else "" if field.default is not None else "`null`"
            values = f"section: [{inner.table.what if inner.table is not None else below}](#{anchor(inner, below)})"
        rows.append((f"`{prefix}{field.name}`", default, values, field.metadata["meaning"]))
    if rows:
        yield "| setting | default | values | meaning |\n|---|---|---|---|"
        for row in rows:
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        yield ""


def section_type(kind: Any) -> type[Config] | None:
    """The settings class of a field that is a section, which may be absent."""
    for part in (kind, *typing.get_args(kind)):
        if isinstance(part, type) and issubclass(part, Config):
            return family(part)
    return None


def family(kind: type[Config]) -> type[Config]:
    """The class that has the table ``kind`` is chosen from, or ``kind``."""
    owners = [base for base in kind.__mro__ if base.__dict__.get("table") is not None]
    return owners[-1] if owners else kind


def anchor(kind: type[Config], key: str) -> str:
    if kind is TrainConfig:
        return "configuration"
    return kind.table.what.replace(" ", "-") if kind.table is not None else key.replace(".", "-").replace("_", "-")


def own_text(kind: type[Config]) -> bool:
    """Whether the class says what it is, beyond its constructor's signature."""
    text = vars(kind).get("__doc__") or ""
    return bool(text) and not text.startswith(f"{kind.__name__}(")


def default_of(kind: type[Config], name: str) -> Any:
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def shown(value: Any) -> str:
    """As in a YAML file."""
    if isinstance(value, Fraction) or (isinstance(value, str) and value):
        return str(value)
    return json.dumps(value)


def values_of(kind: Any, metadata: Any) -> str:
    """The type, the range and the unit of a setting, in words."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{shown(value)}`" for value in arguments)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        some = [values_of(part, metadata) for part in arguments if part is not type(None)]
        return " or ".join([*some, *(["`null`"] if type(None) in arguments else [])])
    if typing.get_origin(kind) is tuple:
        return f"list: {values_of(arguments[0], metadata)}"
    words = SIMPLE.get(getattr(kind, "__name__", ""), "YAML")
    signs = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
    if words in (SIMPLE["int"], SIMPLE["float"], SIMPLE["Fraction"]):
        limits = [f"{sign} {metadata[name]}" for name, sign in signs.items() if metadata.get(name) is not None]
        words = ", ".join([words, *limits]) + (f" [{metadata['unit']}]" if metadata.get("unit") else "")
    return words
