"""What the sections of a configuration are checked with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

__all__ = ["ConfigError", "choose", "expect_one_of", "parse_fraction", "require"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what was expected and what came."""


def parse_fraction(text: str | float, name: str = "value") -> Fraction:
    """An exact number from ``"8/255"``, ``"0.1"`` or ``0.1``; so that 8/255 stays 8/255 in every report."""
    try:
        return Fraction(str(text).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{name}: expected a number or a fraction such as 8/255, got {text!r}") from None


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """``table[name]``; a name that is not in the table is refused with the nearest one that is."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{key}: expected one of {', '.join(table)}, got {name!r}{hint}")


def expect_one_of(names: Iterable[str], name: str, key: str) -> None:
    """Raise :class:`ConfigError`, with the nearest of ``names``, unless ``name`` is one of them."""
    choose(dict.fromkeys(names), name, key)


def require(ok: bool, key: str, expected: str, got: Any) -> None:
    """Raise :class:`ConfigError` unless ``ok``."""
    if not ok:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")
