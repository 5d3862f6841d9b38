"""Descriptions of what a file holds, and the one place where a file's content is checked against its description.

A file may come from anyone: its content is checked before it is used, field by field, by type and by range. A
description is a :data:`Check`, made of the functions below::

    POSITION = fields({"epoch": whole(), "step": whole()})
    POSITION({"epoch": -1, "step": 0}, "position")  # ContentError: position.epoch: expected a whole number >= 0, got -1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from robust_moe.settings import shown

__all__ = [
    "LARGEST",
    "Check",
    "ContentError",
    "anything",
    "fields",
    "flag",
    "items",
    "mapping",
    "number",
    "one_of",
    "optional",
    "refuse",
    "share",
    "tensor",
    "text",
    "whole",
]

Check = Callable[[Any, str], None]  # (value, its place) -> None; raises ContentError
LARGEST = 2**53  # whole numbers up to here are exact in every format


class ContentError(ValueError):
    """Content that is not as described; the message names the place, what was expected and what came."""


def refuse(place: str, expected: str, got: Any) -> ContentError:
    """The error for a value that is not as described."""
    if type(got).__module__.partition(".")[0] == "torch" and hasattr(got, "layout"):
        what = f"a {str(got.dtype).removeprefix('torch.')} tensor {list(got.shape)}, {got.layout}, {got.device.type}"
    else:
        what = shown(got)
    return ContentError(f"{place[:300]}: expected {expected}, got {what}")


def anything(value: Any, place: str) -> None:
    """Of what is not read, or is checked by its reader."""


def flag(value: Any, place: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise refuse(place, "true or false", value)


def text(value: Any, place: str) -> None:
    """Text, also empty."""
    if not isinstance(value, str):
        raise refuse(place, "text", value)


def whole(low: int = 0, high: int = LARGEST) -> Check:
    """A whole number in [low, high]."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            limit = f" and <= {high}" if high < LARGEST else ""
            raise refuse(place, f"a whole number >= {low}{limit}", value)

    return check


def number(low: float = -math.inf, high: float = math.inf, above: bool = False) -> Check:
    """A finite number in [low, high]; ``above``: and not ``low`` itself."""
    limits = [f" {'>' if above else '>='} {low:g}"] * math.isfinite(low) + [f" <= {high:g}"] * math.isfinite(high)

    def check(value: Any, place: str) -> None:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        ok = ok and low <= value <= high and abs(value) < math.inf and not (above and value == low)
        if not ok:
            raise refuse(place, f"a finite number{' and'.join(limits)}", value)

    return check


def share(value: Any, place: str) -> None:
    """A finite number in 0..1."""
    number(0, 1)(value, place)


def one_of(*values: Any) -> Check:
    """One of some plain values."""

    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(one) and value == one for one in values):
            raise refuse(place, f"one of {', '.join(map(str, values))}", value)

    return check


def optional(inner: Check) -> Check:
    """As ``inner``, or None."""
    return lambda value, place: None if value is None else inner(value, place)


def items(inner: Check, least: int = 0, most: int = 2**20) -> Check:
    """A list of ``least`` to ``most`` items, each as ``inner``."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            raise refuse(place, f"a list of {count} items", value)
        for index, one in enumerate(value):
            inner(one, f"{place}[{index}]")

    return check


def mapping(inner: Check) -> Check:
    """Names, which are text, and values as ``inner``."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, Mapping):
            raise refuse(place, "names and values", value)
        for name, one in value.items():
            text(name, f"a name in {place}")
            inner(one, f"{place}.{name[:200]}")

    return check


def fields(known: Mapping[str, Check], required: bool = True) -> Check:
    """Names and values: each of the ``known`` fields as described; what else is there, of a newer version or another
    component, is not looked at.

    Args:
        required: every known field must be there; False: those that are there are checked.
    """

    def check(value: Any, place: str) -> None:
        mapping(anything)(value, place)
        missing = [name for name in known if name not in value] if required else []
        if missing:
            raise ContentError(f"{place}: expected {', '.join(known)}, got nothing for {', '.join(missing)}")
        for name, inner in known.items():
            if name in value:
                inner(value[name], f"{place}.{name}" if place else name)

    return check


def tensor(ndim: int | None = None, dtype: str = "", count: int | None = None, real: bool = True) -> Check:
    """A tensor whose numbers are there, in ordinary (strided, not quantised) layout.

    Args:
        ndim: its dimensions; None: any.
        dtype: without ``torch.``; empty: any.
        count: of its numbers; None: any.
        real: refuse complex ones.
    """
    wanted = f"a dense{f' {dtype}' if dtype else ''} tensor"
    wanted += f" of {ndim} dimensions" if ndim is not None else ""
    wanted += f" with {count} numbers" if count is not None else ""

    def check(value: Any, place: str) -> None:
        import torch

        ok = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type != "meta"
        ok = (
            ok
            and not (value.is_quantized or (real and value.is_complex()))
            and ndim in (None, value.ndim)
            and count in (None, value.numel())
        )
        if not (ok and dtype in ("", str(value.dtype).removeprefix("torch."))):
            raise refuse(place, wanted, value)

    return check
