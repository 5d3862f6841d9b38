"""The error of a bad setting, and the nearest name to offer."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TypeVar

__all__ = ["DECIMAL", "ConfigError", "choose", "hint", "parse_fraction", "shown"]

T = TypeVar("T")

DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")  # a number of the decimal system


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, what was expected and what came."""

    settings: tuple[str, ...] = ()  # KEY=VALUE with which the same command goes, where that is known


class _Short(reprlib.Repr):
    """``repr`` of at most some lines: a file may hold a megabyte of text, or a list of lists of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 12, 12, 8
        self.maxstring = self.maxother = 120

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """``value`` as an error shows it: its ``repr``, the middle left out where it is long."""
    return _Short().repr(str(value) if isinstance(value, str) else value)


def hint(name: object, names: Iterable[str], cutoff: float = 0.4) -> str:
    """``"; did you mean 'pgd'?"`` with the nearest of ``names``, or nothing where none is near."""
    near = difflib.get_close_matches(name[:200], list(names), n=1, cutoff=cutoff) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def choose(table: Mapping[str, T], name: str, key: str) -> T:
    """``table[name]``. Raises :class:`ConfigError` with the nearest name for one that is not in the table."""
    if name in table:
        return table[name]
    raise ConfigError(f"{key}: expected one of {', '.join(table)}, got {shown(name)}{hint(name, table)}")


def parse_fraction(text: object, name: str = "value") -> Fraction:
    """An exact number from ``"8/255"``, ``"0.1"``, ``0.1`` or a Fraction: 8/255 stays 8/255 in every report.

    Raises:
        ConfigError: anything else; also a number that no float is near, such as 1e999.
    """
    expected = "a number or a fraction such as 8/255"
    try:
        parts = [] if isinstance(text, bool) else str(text).replace(" ", "").split("/")
        if len(parts) not in (1, 2) or not all(DECIMAL.fullmatch(part) for part in parts):
            raise ValueError
        number = Fraction(parts[0]) / (Fraction(parts[1]) if len(parts) == 2 else 1)
        if number != 0 and float(number) == 0:
            raise ValueError
        return number
    except (ArithmeticError, ValueError):
        raise ConfigError(f"{name}: expected {expected}, got {shown(text)}") from None
