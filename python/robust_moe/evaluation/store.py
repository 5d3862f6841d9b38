"""The journal of an evaluation: what is done so far, on the disk, so that a killed one goes on where it was."""

from __future__ import annotations

import base64
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from robust_moe.evaluation import file_fields
from robust_moe.evaluation.shards import ONE, Shards
from robust_moe.files import append_line, lock

__all__ = ["Journal", "Result", "ResumeError"]

FORMAT = 3
_ARRAY = "__array__"


class ResumeError(ValueError):
    """A journal that cannot be gone on with; the message names what differs."""


class Journal:
    """Results by key, each on the disk before :meth:`put` returns.

    A file of lines, a checksum and JSON each; the first holds ``identity``. A line cut short by a kill is dropped when
    the file is opened again, so at most the result that was being written is lost; a damaged line costs its result,
    with a warning that names it. A file cut within its first line is begun anew. It is open, and locked where the file
    system has locks, until :meth:`close`, the end of a ``with`` block, or the end of the process.

    Args:
        path: the file; None: kept in memory only.
        identity: what the results depend on, plain values by name: hashes of model and data, settings.
        resume: go on with the file that is there; False: write it anew.
        shards: processes that evaluate together and all put the same: the first one has the file.

    Raises:
        ResumeError: the file is of another identity, or damaged in its first line, or open in another evaluation.
        OSError: it cannot be read or written.
    """

    def __init__(
        self, path: Path | None, identity: Mapping[str, Any], resume: bool = True, shards: Shards = ONE
    ) -> None:
        self.path = path
        self.shards = shards
        self._kept: dict[str, dict[str, Any]] = {}
        self._damaged: list[int] = []  # numbers of the lines that were passed over, the first being 1
        self._file: BinaryIO | None = None
        if path is not None:
            header = _line({"format": FORMAT, "identity": dict(identity)})
            self._kept, self._damaged = shards.first(lambda: self._open(path, header, resume))

    def _open(self, path: Path, header: bytes, resume: bool) -> tuple[dict[str, dict[str, Any]], list[int]]:
        """Open the file; (results in it, its damaged lines)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = file = open(path, "a+b", buffering=0)  # noqa: SIM115 - until closed
        try:
            if not lock(file):
                raise ResumeError(f"{path}: expected a journal of this evaluation alone, got one that another writes")
            file.seek(0)
            data = file.read() if resume else b""
            if _cut_header(data):
                warnings.warn(f"{path}: a kill cut its first line, before any result: begun anew", stacklevel=2)
                data = b""
            if data:
                whole = self._read(data, json.loads(header[9:])["identity"])
                if whole < len(data):  # the last line was cut short
                    file.truncate(whole)
                    os.fsync(file.fileno())
            else:  # new, or cut by a kill before any result
                file.truncate(0)
                append_line(file, header, path)
        except BaseException:
            self.close()
            raise
        return self._kept, self._damaged

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def seconds(self) -> float:
        """The sum of the ``seconds`` of all results: what the work took, in all sessions."""
        return sum(result.get("seconds", 0.0) for result in self._kept.values())

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put under ``key``, or ``None``."""
        return self._kept.get(key)

    def put(self, key: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep ``result``: plain values and arrays by name. Returns it as :meth:`get` will. What cannot be written
        leaves the file as it was."""
        line = _line({"key": key, "result": {name: _encode(value) for name, value in result.items()}})
        if self._file is not None and self.path is not None:
            append_line(self._file, line, self.path)
        self._kept[key] = _decode(json.loads(line[9:])["result"])
        return self._kept[key]

    def claim(self, key: str, identity: Mapping[str, Any], begins: str = "") -> None:
        """Put ``identity``, plain values by name, under ``key``; or compare it with what is there.

        Args:
            begins: how the keys of the results begin that are claimed so.

        Raises:
            ResumeError: it differs; the message names in what. Or it is not there, a line is damaged, and there are
                such results: nothing tells any more whose they are.
        """
        known = self.get(key)
        if known is None:
            if self._damaged and any(other.startswith(begins) for other in self._kept):
                raise ResumeError(
                    f"{self.path}: expected a line that says which {key} the results are of, got a damaged line "
                    f"{self._damaged[0]}; --fresh (resume=False) starts anew"
                )
            self.put(key, identity)
        elif differences := _differences(known, json.loads(json.dumps(dict(identity)))):
            raise ResumeError(f"journal: expected that of this {key}, got another's: {_first(differences)}")

    def close(self) -> None:
        """Let go of the file; what was put stays in it."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Delete the file: the evaluation is done."""
        self.close()
        if self.path is not None and self.shards.rank == 0:
            self.path.unlink(missing_ok=True)

    def _read(self, data: bytes, identity: Mapping[str, Any]) -> int:
        """Take over the results in ``data``, a journal's content; returns how many bytes its whole lines have."""
        path = self.path
        lines = data.splitlines(keepends=True)
        header, *results = _record(lines[0]), *map(_checked, lines[1:])
        records = [header, *results]
        if header is None or header.get("format") != FORMAT or not isinstance(header.get("identity"), dict):
            journal = header is None and any(record is not None for record in results)
            got = "a damaged line 1, which says whose it is" if journal else "another file"
            raise ResumeError(
                f"{path}: expected the journal of an evaluation, got {got}; --fresh (resume=False) starts anew"
            )
        if differences := _differences(header["identity"], identity):
            raise ResumeError(
                f"{path}: expected the journal of this evaluation, got another's: {_first(differences)}; "
                "--fresh (resume=False) starts anew"
            )
        self._damaged = [number for number, record in enumerate(records[:-1], 1) if record is None]
        if self._damaged:
            numbers = ", ".join(map(str, self._damaged))
            warnings.warn(f"{path}: expected whole lines, passed over damaged lines: {numbers}", stacklevel=3)
        for record in records[1:]:
            if record is not None:
                self._kept[record["key"]] = record["result"]
        return len(data) - (len(lines[-1]) if records[-1] is None else 0)


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, allow_nan=False).encode()
    return b"%08x " % zlib.crc32(text) + text + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    """``None``: not a whole line."""
    text = line[9:-1]
    if not (line.endswith(b"\n") and line[:9] == b"%08x " % zlib.crc32(text)):
        return None
    try:
        content = json.loads(text)
    except (RecursionError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _checked(line: bytes) -> dict[str, Any] | None:
    """A line with a result, its arrays decoded; ``None``: not a whole one, or not what a stage keeps."""
    content = _record(line)
    if content is None:
        return None
    try:
        content["result"] = _decode(content["result"])
        file_fields.record(content, "")
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return content


def _cut_header(data: bytes) -> bool:
    """Whether these are the first bytes of a journal's first line."""
    checksum, begin = data[:9], b'{"format": '
    return (
        len(data) > 0
        and b"\n" not in data
        and all(byte in b"0123456789abcdef" for byte in checksum[:8])
        and checksum[8:] in (b"", b" ")
        and (data[9:].startswith(begin) or begin.startswith(data[9:]))
    )


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_ARRAY: data, "dtype": value.dtype.str, "shape": value.shape}
    return value


class Result(dict[str, Any]):
    """What a journal has under a key. Raises :class:`ResumeError` for a name that is not in it."""

    def __missing__(self, name: str) -> Any:
        raise ResumeError(f"journal: expected a result with {name!r}, got {', '.join(self)}; --fresh starts anew")


def _decode(result: Mapping[str, Any]) -> dict[str, Any]:
    return Result({name: _value(value) for name, value in result.items()})


def _value(value: Any) -> Any:
    """A plain value, or an array of plain numbers. Raises KeyError, TypeError or ValueError for a malformed one."""
    if not (isinstance(value, dict) and _ARRAY in value):
        return value
    kind, shape = np.dtype(str(value["dtype"])), value["shape"]
    if kind.kind not in "biuf" or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"array: expected numbers, got {kind} {shape}")
    return np.frombuffer(base64.b64decode(value[_ARRAY]), kind).reshape(shape)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {new.get(name, 'nothing')!r} here, {old.get(name, 'nothing')!r} there"
        for name in dict.fromkeys([*new, *old])
        if old.get(name, "nothing") != new.get(name, "nothing")
    ]


def _first(differences: list[str]) -> str:
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more
