"""Kinds of output files, by which a file of an earlier run of the same command is known."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "JSON_LIMIT",
    "Kind",
    "Output",
    "figure",
    "figure_marks",
    "head_of",
    "journal",
    "json_with",
    "members_of",
    "text",
]

JSON_LIMIT = 2**28  # bytes: none of ours is larger
HEAD = 2**16  # bytes of a file that are looked at where its beginning tells what it is


@dataclass(frozen=True)
class Kind:
    """A kind of output file.

    Args:
        what: how messages call it, with its article.
        ours: whether a regular file that is there is one; its second argument says that another output of the same list
            is there and of its kind, for files whose content alone cannot tell.
        owner: which other file a file that is there belongs to; None: none.
    """

    what: str
    ours: Callable[[Path, bool], bool]
    owner: Callable[[Path], Path | None] = lambda _: None


Output = tuple[Path, Kind]


def json_with(what: str, *keys: str, **values: Any) -> Kind:
    """A JSON object that has ``keys``, and ``values`` under theirs."""

    def ours(path: Path, _: bool) -> bool:
        if path.stat().st_size > JSON_LIMIT or head_of(path, 1) != b"{":
            return False
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return False
        return all(key in content for key in keys) and all(content.get(key) == value for key, value in values.items())

    return Kind(what, ours)


def text(what: str, beginning: str) -> Kind:
    """A text that begins with ``beginning``."""
    return Kind(what, lambda path, _: head_of(path).startswith(beginning.encode()))


def figure(command: str, lines: str | None = None) -> Kind:
    """A PNG figure of ``command``, as :func:`figure_marks` marks it. One of an earlier version has no mark: it is
    Matplotlib's, and beside other files of the command, metrics.jsonl with ``lines`` of that kind among them."""

    def ours(path: Path, known: bool) -> bool:
        head = head_of(path)
        drawn = known and head.startswith(b"\x89PNG") and b"Matplotlib" in head
        if b"robust-moe " in head:
            return drawn and f"robust-moe {command}".encode() in head
        return drawn and (lines is None or _has_lines(path.with_name("metrics.jsonl"), lines))

    return Kind(f"a figure of robust-moe {command}", ours)


def _has_lines(metrics: Path, kind: str) -> bool:
    return metrics.is_file() and f'{{"kind": "{kind}"'.encode() in head_of(metrics, JSON_LIMIT)


def figure_marks(command: str) -> dict[str, str]:
    """``metadata`` of ``savefig`` by which :func:`figure` knows the file again."""
    return {"Source": f"robust-moe {command}"}


def journal(what: str, foreign: str) -> Kind:
    """A journal (:class:`~robust_moe.evaluation.Journal`) whose identity does not have the entry ``foreign``. A first
    line that a kill cut short may be any command's."""

    def ours(path: Path, _: bool) -> bool:
        with open(path, "rb") as file:
            line = file.readline(JSON_LIMIT)
        start = re.match(rb"([0-9a-f]{1,8}$|[0-9a-f]{8} )(.*)", line, re.DOTALL)
        if start is None:
            return False
        beginning = b'{"format": '
        if not line.endswith(b"\n"):
            return start[2].startswith(beginning) or beginning.startswith(start[2])
        try:
            return foreign not in json.loads(start[2])["identity"]
        except (ValueError, LookupError, TypeError):
            return start[2].startswith(beginning)  # damaged, or of an earlier version

    return Kind(what, ours)


def head_of(path: Path, count: int = HEAD) -> bytes:
    """The first ``count`` bytes of a file, fewer where it has no more."""
    with open(path, "rb") as file:
        return file.read(count)


def members_of(path: Path) -> dict[str, str]:
    """The whole names in an archive by their last parts; empty where the file is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.rpartition("/")[2]: name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        return {}
