"""Single settings: what a field of a :class:`~robust_moe.settings.Config` says of itself, and how a value is read.

A value comes from Python, typed already, or from a file or an override as :class:`Plain` text, and the field's type
decides what the text means. So text stays as it was typed (``run.out=007``), and only the numbers of the decimal system
are numbers (no ``0x10``, no ``1_000``).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, Union, get_args, get_origin

from robust_moe.settings.errors import DECIMAL, ConfigError, hint, parse_fraction, shown
from robust_moe.settings.text import Plain, read_list, read_yaml

__all__ = ["convert", "expect_in_range", "finish", "is_null", "is_union", "setting"]

INTEGER = re.compile(r"[+-]?[0-9]+")
NOT_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)
LONGEST_TEXT = 4096  # letters
LONGEST = 1000  # items of a list: a short file may name a long list many times


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: bool = False,
) -> Any:
    """A field of a :class:`~robust_moe.settings.Config`.

    Args:
        default: its value where nobody chose one; for a section, a :class:`~robust_moe.settings.Config`.
        meaning: what it does, one sentence without a full stop.
        unit: of a number, e.g. ``"epochs"``.
        at_least, above, at_most, below: its range; of None nothing is asked, and of a tuple each item must lie in it.
        path: a path of the file system, in which a leading ``~`` is the home folder.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"meaning": meaning, "unit": unit, "path": path, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union or the values of a Literal."""
    return get_args(kind)


def is_union(kind: Any) -> bool:
    """Whether a type is one of several, as ``int | None`` is."""
    return get_origin(kind) in (Union, types.UnionType)


def _refuse(key: str, expected: str, value: object, more: str = "") -> ConfigError:
    return ConfigError(f"{key}: expected {expected}, got {shown(value)}{more}")


def _integer(value: object, key: str) -> int:
    number = value
    if isinstance(value, Plain) and INTEGER.fullmatch(value):
        number = int(value) if len(value) < 100 else 2**64
    if not isinstance(number, int) or isinstance(number, bool):
        raise _refuse(key, "a whole number", value)
    if not -(2**63) <= number < 2**63:
        raise _refuse(key, "a whole number of at most 64 bits", value)
    return number


def _float(value: object, key: str) -> float:
    if isinstance(value, Plain):
        if not DECIMAL.fullmatch(value):
            expected = "a finite number" if NOT_FINITE.fullmatch(value) else "a decimal number"
            raise _refuse(key, expected, value)
        value = float(value)  # of 1e400: infinite
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(key, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _refuse(key, "a finite number", value)
    return number


def _fraction(value: object, key: str) -> Fraction:
    if isinstance(value, float) and not math.isfinite(value):
        raise _refuse(key, "a finite number", value)
    return parse_fraction(value, key)


def _boolean(value: object, key: str) -> bool:
    if isinstance(value, Plain) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise _refuse(key, "true or false", value)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise _refuse(key, "text", value)
    if len(value) > LONGEST_TEXT:
        raise _refuse(key, f"text of at most {LONGEST_TEXT} letters", value)
    return str(value)


SIMPLE = {int: _integer, float: _float, Fraction: _fraction, bool: _boolean, str: _text}


def is_null(value: object, kind: Any) -> bool:
    """``null`` without quotes; also ``~`` where no text, and so no home folder, can be meant."""
    if value is None:
        return True
    tilde = value == "~" and str not in _choices(kind)
    return isinstance(value, Plain) and (value.lower() == "null" or value == "" or tilde)


def _literal(kind: Any, value: object, key: str) -> object:
    allowed = _choices(kind)
    for choice in allowed:
        same = type(value) is type(choice) or (isinstance(value, str) and isinstance(choice, str))
        if same and value == choice:
            return choice
        if isinstance(choice, bool) and isinstance(value, Plain) and value.lower() == str(choice).lower():
            return choice
    shown = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in allowed]
    raise _refuse(key, f"one of {', '.join(shown)}", value, hint(value, shown))


def convert(kind: Any, value: object, key: str) -> Any:
    """``value`` as the type ``kind`` of a field: int, float, bool, str, Fraction, a Literal, a tuple of one kind, a
    mapping of text to one kind, or a union of these with None.

    Raises:
        ConfigError: a value of another type; the message begins with ``key``.
    """
    if kind is Any:
        return value
    if is_union(kind):
        members = _choices(kind)
        if type(None) in members and is_null(value, kind):
            return None
        rest = [member for member in members if member is not type(None)]
        for member in rest[:-1]:
            try:
                return convert(member, value, key)
            except ConfigError:
                continue
        return convert(rest[-1], value, key)
    if get_origin(kind) is Literal:
        return _literal(kind, value, key)
    if get_origin(kind) is tuple:
        item = _choices(kind)[0]
        if isinstance(value, Plain):
            value = read_list(value, key)
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise _refuse(key, "a list", value)
        if len(value) > LONGEST:
            raise ConfigError(f"{key}: expected a list of at most {LONGEST} items, got {len(value)}")
        return tuple(convert(item, one, f"{key}[{place}]") for place, one in enumerate(value))
    if get_origin(kind) in (dict, Mapping):
        if isinstance(value, Plain):
            value = read_yaml(value, key)
        if not isinstance(value, Mapping):
            raise _refuse(key, "a section of names and values", value)
        return {_text(name, key): convert(_choices(kind)[1], one, f"{key}.{name}") for name, one in value.items()}
    if kind in SIMPLE:
        return SIMPLE[kind](value, key)
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise _refuse(key, f"a {getattr(kind, '__name__', kind)}", value)


def finish(field: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` with its home folder written out, where the field is a path. Raises :class:`ConfigError` for what no
    file system can have."""
    if field.metadata.get("path") and isinstance(value, str):
        if not value:
            raise _refuse(field.name, "a name", value)
        try:
            name = os.fsencode(value)
        except UnicodeEncodeError:
            name = b""
        longest = max(map(len, name.split(b"/")))
        if not name or longest > 255 or len(name) > 4000 or b"\0" in name:  # what Linux's file systems have
            raise _refuse(field.name, "a path, its names of at most 255 bytes", value)
        return os.path.expanduser(value)
    return value


def _range(limits: Mapping[str, Any]) -> str:
    low, above, high, below = (limits.get(name) for name in ("at_least", "above", "at_most", "below"))
    if (low is None and above is None) or (high is None and below is None):
        signs = ((">=", low), (">", above), ("<=", high), ("<", below))
        return " and ".join(f"{sign} {_limit(limit)}" for sign, limit in signs if limit is not None)
    left = f"[{_limit(low)}" if low is not None else f"({_limit(above)}"
    right = f"{_limit(high)}]" if high is not None else f"{_limit(below)})"
    return f"in {left}, {right}"


def _limit(limit: float | None) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def expect_in_range(field: dataclasses.Field[Any], value: Any, key: str) -> None:
    """Raise :class:`ConfigError` where a number, or an item of a tuple, is out of the range of its ``field``."""
    limits = field.metadata
    if value is None or not any(limits.get(name) is not None for name in ("at_least", "above", "at_most", "below")):
        return
    if isinstance(value, tuple):
        for place, one in enumerate(value):
            expect_in_range(field, one, f"{key}[{place}]")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)):
        return
    low, above, high, below = (limits.get(name) for name in ("at_least", "above", "at_most", "below"))
    ok = (low is None or value >= low) and (above is None or value > above)
    if not (ok and (high is None or value <= high) and (below is None or value < below)):
        what = "a whole number" if isinstance(value, int) else "a number"
        unit = f" {limits['unit']}" if limits.get("unit") else ""
        got = str(value) if isinstance(value, Fraction) else repr(value)
        raise ConfigError(f"{key}: expected {what}{unit and f' of{unit}'} {_range(limits)}, got {got}")
