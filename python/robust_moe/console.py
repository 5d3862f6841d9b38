"""Consoles for output: text is printed without markup, and a character that an encoding lacks as a code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["make_console", "print_line", "show_any_text", "visible"]


def show_any_text(stream: TextIO) -> None:
    """From now on ``stream`` shows a character that its encoding does not have as a code, ``\\xe9``."""
    reconfigure = getattr(stream, "reconfigure", None)  # a notebook's has none, and shows all characters
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def print_line(text: str) -> None:
    """A line on standard output, also where the extra of :class:`robust_moe.engine.Reporter` is not installed."""
    show_any_text(sys.stdout)
    print(text, flush=True)


def make_console(stderr: bool = False) -> Console:
    """Standard output, or standard error: brackets and colons in names are no markup, and numbers are not coloured."""
    from rich.console import Console

    show_any_text(sys.stderr if stderr else sys.stdout)
    return Console(highlight=False, markup=False, emoji=False, stderr=stderr)


def visible(text: str) -> str:
    """``text`` in one line, with a mark in place of what is not to be seen: a terminal acts on some such characters."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
