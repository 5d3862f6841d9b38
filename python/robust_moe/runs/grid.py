"""Settings with several values each, and the runs of all their combinations."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from robust_moe.config import ConfigError
from robust_moe.settings import shown

__all__ = ["MOST_RUNS", "Point", "grid", "values_of"]

MOST_RUNS = 1000
_LONGEST = 120  # characters of a folder's name


class Point(NamedTuple):
    """One combination."""

    name: str  # of its run folder: the settings that have several values, and this one's
    settings: tuple[str, ...]  # key=value, all of them


def grid(settings: Sequence[str]) -> list[Point]:
    """All combinations of ``settings`` such as ``["optim.lr=0.05,0.1", "run.seed=0,1"]``, the last changing fastest.

    Raises:
        ConfigError: a setting without values, the same setting or value twice, no setting with several values, or more
            than :data:`MOST_RUNS` combinations.
    """
    chosen: dict[str, list[str]] = {}
    for item in settings:
        key, equals, text = item.partition("=")
        if not (key and equals):
            raise ConfigError(f"sweep: expected key=value,value,..., got {shown(item)}")
        if key in chosen:
            raise ConfigError(f"{key}: expected one list of values, got the setting twice")
        chosen[key] = values_of(text, key)
    several = [key for key, values in chosen.items() if len(values) > 1]
    if not several:
        raise ConfigError(
            "sweep: expected a setting with several values, such as run.seed=0,1,2, got none; robust-moe train is for "
            "a single run"
        )
    count = math.prod(map(len, chosen.values()))
    if count > MOST_RUNS:
        raise ConfigError(f"sweep: expected at most {MOST_RUNS:,} runs, got {count:,} combinations")
    points = []
    for values in itertools.product(*chosen.values()):
        point = dict(zip(chosen, values, strict=True))
        text = ",".join(f"{key}={point[key]}" for key in several)
        points.append(Point(_folder_name(text), tuple(f"{key}={value}" for key, value in point.items())))
    return points


def values_of(text: str, key: str) -> list[str]:
    """The values in ``text``, which commas separate; those inside of brackets ``[ ]`` and ``{ }`` and those after a
    backslash belong to a value.

    Raises:
        ConfigError: an empty value, or one that is there twice; it names ``key``.
    """
    values, depth = [""], 0
    for part in re.findall(r"\\,|.", text, flags=re.DOTALL):
        depth += (part in "[{") - (part in "]}")
        if part == "," and depth <= 0:
            values.append("")
        else:
            values[-1] += "," if part == r"\," else part
    if not all(value.strip() for value in values):
        raise ConfigError(f"{key}: expected values with commas between them, got {shown(text)} with an empty one")
    if twice := next((value for place, value in enumerate(values) if value in values[:place]), None):
        raise ConfigError(f"{key}: expected values that differ, got {shown(twice)} twice")
    return values


def _folder_name(text: str) -> str:
    """``text`` itself where it can be a folder's name; otherwise as much of it as can, and a digest of the whole."""
    name = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)
    if name == text and len(name) <= _LONGEST:
        return name
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return f"{name[:_LONGEST]}-{digest}"
