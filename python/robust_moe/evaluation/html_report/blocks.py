"""What a report's page is made of, and how numbers are written in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

NOT_MEASURED = "–"
_SENTENCE = 32  # characters from which a cell's text may be broken into lines


@dataclass(frozen=True)
class Cell:
    """What a table shows, and the exact number behind it."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]  # the first cell of a row names it
    marks: Sequence[str] = ()  # a CSS class for every row

    def look(self, column: int) -> str:
        """The CSS class of a column: of numbers only, of short words, or of sentences."""
        cells = [row[column] for row in self.rows]
        if column > 0 and all(cell.value is not None or cell.text == NOT_MEASURED for cell in cells):
            return "number"
        return "words" if any(len(cell.text) > _SENTENCE for cell in cells) else "word"


@dataclass(frozen=True)
class Figure:
    """A drawing with the sentence below it."""

    kind: ClassVar[str] = "figure"
    svg: str
    caption: str


@dataclass(frozen=True)
class Text:
    """A paragraph, or the heading of what follows."""

    kind: str  # "text" or "heading"
    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens."""

    kind: ClassVar[str] = "folded"
    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Picture:
    """An image file in the page itself."""

    source: str  # data: address
    alt: str
    small: bool  # to be enlarged without blurring


@dataclass(frozen=True)
class Example:
    """Pictures side by side with the words below them."""

    images: Sequence[Picture]
    caption: str


@dataclass(frozen=True)
class Examples:
    """Examples in a grid."""

    kind: ClassVar[str] = "examples"
    pictures: Sequence[Example]


@dataclass(frozen=True)
class Missing:
    """What the results do not hold, and the command that measures it (None: nothing would)."""

    what: str
    command: str | None


Block = Table | Figure | Text | Folded | Examples


@dataclass(frozen=True)
class Section:
    """A titled part of the page; ``slug`` is its address in it."""

    slug: str
    title: str
    blocks: Sequence[Block]


def percent(value: float | None) -> Cell:
    """A share in percent."""
    return Cell(NOT_MEASURED) if value is None else Cell(f"{100 * value:.1f}%", value)


def number(value: float | None) -> Cell:
    """A whole number, or one with a decimal, its thousands apart."""
    if value is None:
        return Cell(NOT_MEASURED)
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:,.1f}", value)


def span(ends: Sequence[float] | None) -> str:
    """An interval of shares, in percent."""
    return NOT_MEASURED if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}%"


def plain(value: Any) -> Cell:
    """Any value of a result file."""
    if value is None:
        return Cell(NOT_MEASURED)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, float):
        return Cell(f"{value:.4g}", value)
    if isinstance(value, int):
        return Cell(str(value), value)
    return Cell(str(value))


def flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names on the way there, value) of every leaf; a list is one value."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, (*path, name))
        else:
            yield (*path, name), ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def command(results: Mapping[str, Any], preset: str) -> str:
    """What to type for the measurements of ``preset``."""
    return f"robust-moe eval {shlex.quote(results['checkpoint'])} --preset {preset}"


def settings_table(caption: str, settings: Mapping[str, Any]) -> Table:
    """Names and values of a part of a result file."""
    return Table(
        caption, ("setting", "value"), [[Cell(".".join(path)), plain(value)] for path, value in flat(settings)]
    )
