"""The journal of an evaluation: what is done so far, on the disk, so that a killed one goes on where it was."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from robust_moe.evaluation import file_fields
from robust_moe.files import lock

__all__ = ["Journal", "Result", "ResumeError"]

FORMAT = 3
_ARRAY = "__array__"


class ResumeError(ValueError):
    """A journal that cannot be gone on with; the message names what differs."""


class Journal:
    """Results by key, each on the disk before :meth:`put` returns.

    A file of lines, a checksum and JSON each; the first holds ``identity``. A line cut short by a kill is dropped when
    the file is opened again, so at most the result that was being written is lost. The file is open, and locked where
    the file system has locks, until :meth:`close`, the end of a ``with`` block, or the end of the process.

    Args:
        path: the file; None: kept in memory only.
        identity: what the results depend on, plain values by name: hashes of model and data, settings.
        resume: go on with the file that is there; False: write it anew.

    Raises:
        ResumeError: the file is of another identity, or damaged before its end, or open in another evaluation.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], resume: bool = True) -> None:
        self.path = path
        self._kept: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        header = _line({"format": FORMAT, "identity": dict(identity)})
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = file = open(path, "a+b", buffering=0)  # noqa: SIM115 - until closed
        try:
            if not lock(file):
                raise ResumeError(f"{path}: expected a journal of this evaluation alone, got one that another writes")
            file.seek(0)
            data = file.read() if resume else b""
            if data:
                whole = self._read(data, json.loads(header[9:])["identity"])
                if whole < len(data):  # the last line was cut short
                    file.truncate(whole)
                    os.fsync(file.fileno())
            else:  # new, or left empty by a kill before the first line
                file.truncate(0)
                _append(file, header)
        except BaseException:
            self.close()
            raise

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
        if self._file is not None:
            _append(self._file, line)
        self._kept[key] = _decode(json.loads(line[9:])["result"])
        return self._kept[key]

    def claim(self, key: str, identity: Mapping[str, Any]) -> None:
        """Put ``identity``, plain values by name, under ``key``; or compare it with what is there.

        Raises:
            ResumeError: it differs; the message names in what.
        """
        known = self.get(key)
        if known is None:
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
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, data: bytes, identity: Mapping[str, Any]) -> int:
        """Take over the results in ``data``, a journal's content; returns how many bytes its whole lines have."""
        path = self.path
        lines = data.splitlines(keepends=True)
        header, *records = _record(lines[0]), *map(_checked, lines[1:])
        records = [header, *records]
        if header is None or header.get("format") != FORMAT or not isinstance(header.get("identity"), dict):
            raise ResumeError(
                f"{path}: expected the journal of an evaluation, got another file; --fresh (resume=False) starts anew"
            )
        if differences := _differences(header["identity"], identity):
            raise ResumeError(
                f"{path}: expected the journal of this evaluation, got another's: {_first(differences)}; "
                "--fresh (resume=False) starts anew"
            )
        if None in records[:-1]:
            raise ResumeError(
                f"{path}: expected whole lines, got a damaged line {records.index(None) + 1} of {len(records)}; "
                "--fresh (resume=False) starts anew"
            )
        for record in records[1:]:
            if record is not None:
                self._kept[record["key"]] = record["result"]
        return len(data) - (len(lines[-1]) if records[-1] is None else 0)


def _append(file: BinaryIO, line: bytes) -> None:
    """Write a line whole; cut off what came of it where that fails, or the next one would follow half a line."""
    end = file.seek(0, os.SEEK_END)
    try:
        left = memoryview(line)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


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
    try:
        assert content is not None
        content["result"] = _decode(content["result"])
        file_fields.record(content, "")
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return content


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
