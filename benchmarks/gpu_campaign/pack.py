"""The few files that a campaign leaves behind: small enough to be carried away together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_campaign.plan import Part
from robust_moe.files import replace_file

__all__ = ["EXTRA", "FILE_LIMIT", "pack"]

FILE_LIMIT = 16 * 2**20  # bytes of a file
LOG_LIMIT = 2**20  # bytes that a part's log keeps
EXTRA = ("tiles.json",)  # files of parts that go along as they are


def pack(parts: Sequence[Part], about: dict[str, Any], work: Path, out: Path, limit: int = FILE_LIMIT) -> None:
    """Write ``results.json``, ``log.txt`` and what parts made for themselves to ``out``, no file above ``limit``."""
    results = {part.name: json.loads(path.read_text()) for part in parts if (path := _json(work, part)).is_file()}
    replace_file(out / "results.json", _within({**about, "parts": results}, limit))
    logs = []
    for part in parts:
        log = work / f"{part.stem}.log"
        if log.is_file():
            logs.append(f"===== part {part.number}, {part.name}\n".encode() + _shortened(log.read_bytes(), LOG_LIMIT))
    replace_file(out / "log.txt", _shortened(b"\n".join(logs), limit))
    for name in EXTRA:
        if (work / name).is_file():
            replace_file(out / name, _shortened((work / name).read_bytes(), limit))


def _json(work: Path, part: Part) -> Path:
    return work / f"{part.stem}.json"


def _within(results: dict[str, Any], limit: int) -> bytes:
    """As JSON; while that is too large, the part with most rows loses the second half of them, and says so."""
    while True:
        text = (json.dumps(results, indent=None) + "\n").encode()
        largest = max(results["parts"].values(), key=lambda part: len(json.dumps(part["rows"])), default=None)
        if len(text) <= limit or not largest or not largest["rows"]:
            return text
        half = len(largest["rows"]) // 2
        largest["rows_left_out"] = largest.get("rows_left_out", 0) + len(largest["rows"]) - half
        largest["rows"] = largest["rows"][:half]


def _shortened(content: bytes, limit: int) -> bytes:
    """The beginning and, mostly, the end."""
    if len(content) <= limit:
        return content
    note = f"\n... {len(content) - limit} bytes or more left out ...\n".encode()
    head = limit // 4
    return content[:head] + note + content[len(content) - (limit - head - len(note)) :]
