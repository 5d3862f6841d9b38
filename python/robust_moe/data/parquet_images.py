"""The encoded images of a Parquet file, row by row.

A row lies compressed among those of its row group, 100 to 100,000 rows, which is read as a whole. In the order of the
file that costs nothing: the groups last read are kept. In a shuffled order every image would cost a group. So the
encoded bytes of streamed images are copied once, in one pass over the file, to a temporary file, from which any of them
is one read. That takes as much room on the disk as the images take in the Parquet file, and no memory but the system's
cache. Measured with groups of 100 images of 100 kB on two busy cores: 129 MB a second are copied; then an image of a
shuffled order is read in 0.08..0.24 ms, out of the groups in 27..48 ms.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from multiprocessing.reduction import DupFd
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from robust_moe.data.encoded import EncodedImages
from robust_moe.data.image_set import DataError, expect_room, import_extra
from robust_moe.data.progress import Task

__all__ = ["ParquetImages", "open_parquet"]

ROWS = 256  # read at a time
KEPT_GROUPS = 4  # row groups: threads that decode the images of a file are at one or two
NULL = -1  # instead of an image's size


def open_parquet(file: Path) -> Any:
    """pyarrow's ``ParquetFile``. Raises :class:`DataError` for a file that is missing or damaged, or has no row."""
    parquet = import_extra("pyarrow.parquet", "pyarrow", "data.name=parquet")
    if not file.is_file():
        raise DataError(f"{file}: expected a file, got none")
    try:
        source = parquet.ParquetFile(file, memory_map=True)
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError and more for a truncated file
        raise DataError(f"{file}: expected a whole Parquet file, got: {error}") from error
    if source.metadata.num_rows == 0:
        raise DataError(f"{file}: expected at least one row, got none")
    return source


class ParquetImages(EncodedImages):
    """The rows of a column, best read in their order.

    Args:
        file: the file.
        source: of it, by :func:`open_parquet`.
        column: encoded images, as binary values or in the field ``bytes`` of a struct.
    """

    def __init__(self, file: Path, source: Any, column: str) -> None:
        super().__init__(source.metadata.num_rows)
        self._file, self._groups = file, _Groups(file, source, column)
        self._bytes = file.stat().st_size

    def for_any_order(self, task: Task) -> EncodedImages:
        return _CopiedImages(self, task)

    def forget(self) -> None:
        self._groups.forget()

    def _read(self, position: int) -> bytes:
        data: bytes | None = self._groups.row(position)
        if data is None:
            raise ValueError("null instead of the encoded image")
        return data

    def _where(self, position: int) -> str:
        return f"{self._file}: row {position}"

    def _identity(self, position: int) -> str:
        return f"{self._file.name}:{position}\0{self._bytes}"  # of a row alone the file does not tell the size


class _Groups:
    """The row groups that were read last."""

    def __init__(self, file: Path, source: Any, column: str) -> None:
        self._file, self._source, self._column = file, source, column
        counts = [source.metadata.row_group(group).num_rows for group in range(source.metadata.num_row_groups)]
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._faults: dict[int, str] = {}  # of groups that cannot be read, each of which is tried once
        self._lock = Lock()

    def row(self, position: int) -> bytes | None:
        group = int(np.searchsorted(self._starts, position, side="right")) - 1
        with self._lock:
            if group in self._faults:
                raise DataError(self._faults[group])
            if group not in self._kept:
                try:
                    self._kept[group] = self._read(group)
                except DataError as error:
                    self._faults[group] = str(error)
                    raise
                while len(self._kept) > KEPT_GROUPS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            values = self._kept[group]
        data: bytes | None = values[position - int(self._starts[group])].as_py()
        return data

    def forget(self) -> None:
        with self._lock:
            self._kept.clear()

    def _read(self, group: int) -> list[Any]:
        """The values, which are views of the group and no copies."""
        batches, held = [], 0
        try:
            found = self._source.iter_batches(batch_size=ROWS, row_groups=[group], columns=[self._column])
            for batch in found:  # what the file says of its size may be wrong
                held += batch.nbytes
                expect_room(held, f"{self._file}: row group {group}")
                column = batch.column(self._column.partition(".")[0])
                batches.append(column.field("bytes") if "." in self._column else column)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self._file}: row group {group}: expected whole rows, got: {error}") from error
        return [value for batch in batches for value in batch]


class _CopiedImages(EncodedImages):
    """The same images out of a temporary file, which has no name and so ends with the processes that have it open."""

    def __init__(self, source: ParquetImages, task: Task) -> None:
        self._file, self._bytes = source._file, source._bytes
        self._rows, places = np.unique(source._index, return_inverse=True)
        super().__init__(len(self._rows))
        sizes = []
        self._faults: dict[int, str] = {}  # by position: why there is no image; said when it is asked for
        try:
            self._copy = _TemporaryFile()
            with task("copying training images", len(self._rows)) as advance:
                for position, row in enumerate(self._rows):  # ascending
                    try:
                        data = source._groups.row(int(row))
                    except DataError as error:
                        data, self._faults[position] = None, str(error)
                    sizes.append(NULL if data is None else len(data))
                    self._copy.append(data or b"")
                    advance(1)
                self._copy.flush()
        except OSError as error:
            folder = tempfile.tempdir or "temporary files"  # None: there is none that can be written to
            raise DataError(
                f"{folder}: expected room for the encoded images of {self._file} (TMPDIR chooses the folder), got: "
                f"{error}"
            ) from error
        source.forget()
        self._sizes = np.array(sizes, dtype=np.int64)
        self._begins = np.cumsum([0, *np.maximum(self._sizes, 0)], dtype=np.int64)
        self._index = places.reshape(-1)

    def _read(self, position: int) -> bytes:
        if position in self._faults:
            raise DataError(self._faults[position])
        size = int(self._sizes[position])
        if size == NULL:
            raise ValueError("null instead of the encoded image")
        return self._copy.read(size, int(self._begins[position]))

    def _where(self, position: int) -> str:
        return f"{self._file}: row {self._rows[position]}"

    def _identity(self, position: int) -> str:
        return f"{self._file.name}:{self._rows[position]}\0{self._bytes}"


class _TemporaryFile:
    """A file that is written from its beginning to its end, then read at any place, also by processes that it is sent
    to when they are started."""

    def __init__(self, file: Any = None) -> None:
        self._file = file or tempfile.TemporaryFile(prefix="robust-moe-")  # noqa: SIM115  # closed with this object

    def append(self, data: bytes) -> None:
        self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def read(self, count: int, begin: int) -> bytes:
        return os.pread(self._file.fileno(), count, begin)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (DupFd(self._file.fileno()),)


def _reopened(descriptor: Any) -> _TemporaryFile:
    return _TemporaryFile(open(descriptor.detach(), "rb"))
