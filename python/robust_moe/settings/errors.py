"""The error of a bad setting, and the nearest name to offer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TypeVar

__all__ = ["ConfigError", "choose", "hint", "parse_fraction"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what was expected and what came."""


def hint(name: object, names: Iterable[str], cutoff: float = 0.4) -> str:
    """``"; did you mean 'pgd'?"`` with the nearest of ``names``, or nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """``table[name]``. Raises :class:`ConfigError` with the nearest name for one that is not in the table."""
    if name in table:
        return table[name]
    raise ConfigError(f"{key}: expected one of {', '.join(table)}, got {name!r}{hint(name, table)}")


def parse_fraction(text: object, name: str = "value") -> Fraction:
    """An exact number from ``"8/255"``, ``"0.1"``, ``0.1`` or a Fraction: 8/255 stays 8/255 in every report."""
    try:
        if isinstance(text, bool):
            raise ValueError
        return Fraction(str(text).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{name}: expected a number or a fraction such as 8/255, got {text!r}") from None
