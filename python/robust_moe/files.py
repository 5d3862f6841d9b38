"""Files that are written whole or not at all, or by one process at a time; errors of writing name their file."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "WaitingLines",
    "append_line",
    "lock",
    "naming",
    "remove_leftovers",
    "replace_file",
    "replacing",
    "temporary_file",
]


def temporary_file(path: Path) -> Path:
    """Where :func:`replacing` writes the new content of ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write the new content of ``path`` to; an error inside leaves what was there.

    The bytes go to a temporary file in the same folder, are forced to the disk, and only then take the name: a full
    disk, a kill or a power cut leaves the file that was there before.

    Raises:
        OSError: it could not be written; it names ``path``.
    """
    temporary = temporary_file(path)
    try:
        with naming(path):
            temporary.unlink(missing_ok=True)  # a killed process of the same number left it
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` by :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Delete the temporary files that killed writes of ``paths`` left. No process may be writing one of them."""
    names: dict[Path, list[str]] = defaultdict(list)
    for path in paths:
        names[path.parent].append(re.escape(path.name))
    for folder, known in names.items():
        ours = re.compile(rf"\.({'|'.join(known)})\.\d+\.tmp")
        for path in folder.iterdir() if folder.is_dir() else ():
            if ours.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names ``path``: a full disk says no name, and a temporary file's says nothing to a user."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # otherwise its text is all it has
            error.filename = str(path)
            del error.filename2
        raise


def append_line(file: BinaryIO, line: bytes, path: Path, sync: bool = True) -> None:
    """Write a line whole at the end of the unbuffered ``file``; cut off what came of it where that fails, or the next
    one would follow half a line.

    Args:
        path: of the file, for errors.
        sync: force it to the disk.
    """
    end = file.seek(0, os.SEEK_END)
    try:
        with naming(path):
            left = memoryview(line)
            while left:
                left = left[file.write(left) :]
            if sync:
                os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


class WaitingLines:
    """Appends lines, or records, whole to an unbuffered file. What cannot be written waits in memory for the next one:
    a disk that is full for a while costs nothing.

    Args:
        file: is closed by :meth:`close`.
        path: of the file, for errors.
        say: called with a sentence when lines begin to wait; None: nobody is told.
    """

    def __init__(self, file: BinaryIO, path: Path, say: Callable[[str], object] | None = None) -> None:
        self.file, self.path, self._say = file, path, say
        self._waiting = b""

    def append(self, line: bytes) -> None:
        """Write ``line``, after those that wait."""
        waited = bool(self._waiting)
        self._waiting += line
        try:
            self._write()
        except OSError as error:
            if not waited and self._say is not None:
                self._say(f"{self.path}: could not be written ({error.strerror or error}); its lines wait in memory")

    def _write(self) -> None:
        append_line(self.file, self._waiting, self.path, sync=False)
        self._waiting = b""

    def close(self) -> None:
        """Write what waits, and close the file. Raises OSError, which names it, where that cannot be written."""
        try:
            if self._waiting:
                self._write()
        finally:
            self.file.close()


def lock(file: BinaryIO, shared: bool = False) -> bool:
    """Whether no other open file of that name has the lock, which ``file`` then keeps until it is closed. A file system
    without locks is taken to have none.

    Args:
        shared: beside other shared ones, for a look at who has the lock; where the system has no such, as if alone.
    """
    try:
        if sys.platform == "win32":
            file.seek(2**62)  # far beyond what is read: a locked byte cannot be
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where the system can do that for a folder."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems cannot; the file itself is on the disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
