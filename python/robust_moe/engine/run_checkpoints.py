"""The checkpoints of a run folder: which one a run goes on from, and the past ones that are kept."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from robust_moe.engine.checkpoint import CheckpointError, DamagedError, load_checkpoint
from robust_moe.files import naming, replacing, temporary_file

__all__ = [
    "BEST",
    "LAST",
    "CheckpointReader",
    "drop_past",
    "find_checkpoint",
    "keep_past",
    "newest_whole",
    "past_checkpoints",
]

LAST, BEST = "last.pt", "best.pt"
_PAST = re.compile(r"step-(\d{1,18})\.pt")


def find_checkpoint(folder: Path) -> Path | None:
    """Where a run in ``folder`` goes on from: ``last.pt``, or ``best.pt``, a whole state too, if killed before it."""
    return next((path for path in (folder / LAST, folder / BEST) if path.is_file()), None)


def past_checkpoints(folder: Path) -> dict[int, Path]:
    """The kept ones, ``step-N.pt``, by their steps, in their order."""
    found = {}
    with suppress(OSError):  # no such folder
        for path in folder.iterdir():
            if (named := _PAST.fullmatch(path.name)) is not None:
                found[int(named[1])] = path
    return dict(sorted(found.items()))


def keep_past(folder: Path, step: int) -> None:
    """Give ``last.pt``, of that many steps, the name ``step-N.pt`` too: it survives the next one, which takes the place
    of ``last.pt``. No byte is written where the file system has hard links.

    Raises:
        CheckpointError: it could not be kept.
    """
    last, past = folder / LAST, folder / f"step-{step}.pt"
    try:
        with naming(past):
            if last.is_file():
                _link(last, past)
    except OSError as error:
        raise CheckpointError(f"{past}: the past checkpoint could not be kept ({error})") from error


def _link(source: Path, target: Path) -> None:
    """Another name of ``source``, in the place of what ``target`` was."""
    temporary = temporary_file(source)  # a name by which what a kill leaves is known
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # no hard links here
            with open(source, "rb") as old, replacing(target) as new:
                shutil.copyfileobj(old, new, 2**20)
        else:
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # of two names of one file neither takes the other's place


def drop_past(folder: Path, keep: int, before: int) -> None:
    """Remove all but the ``keep`` latest of the kept checkpoints, and those of ``before`` steps or more: of a course
    that the run, having gone on from an older one, has left. What cannot be removed stays."""
    past = past_checkpoints(folder)
    kept = [step for step in past if step < before][-keep:]
    for step, path in past.items():
        if step not in kept:
            with suppress(OSError):
                path.unlink()


def newest_whole(folder: Path, but: Path) -> Path | None:
    """The checkpoint of the most steps beside the file ``but`` that a run could go on from. They are read for that, of
    the past ones no more than there have to be."""
    steps: dict[Path, int] = {}

    def is_whole(path: Path) -> bool:
        with suppress(CheckpointError, LookupError, OSError):
            steps[path] = load_checkpoint(path)["position"]["step"]
        return path in steps

    for path in (folder / LAST, folder / BEST):
        if path != but:
            is_whole(path)
    any(map(is_whole, reversed(past_checkpoints(folder).values())))  # up to the first
    return max(steps, key=lambda path: (steps[path], path.name), default=None)


class CheckpointReader:
    """Reads a checkpoint of a run folder, and the same file no second time. One that was written since is another file,
    as each takes the place of the one before, whole; that is read."""

    def __init__(self) -> None:
        self._file: tuple[int, ...] | None = None
        self._state: dict[str, Any] = {}

    def read(self, path: Path) -> dict[str, Any]:
        """As :func:`~robust_moe.engine.checkpoint.load_checkpoint`, which also says what it raises. The error of a
        damaged file names the newest whole one beside it, if there is one: the run never goes back by itself."""
        file = None
        with suppress(OSError):  # it is named below
            found = path.stat()
            file = found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
        if file is None or file != self._file:
            try:
                self._state = load_checkpoint(path)
            except DamagedError as error:
                if (whole := newest_whole(path.parent, path)) is None:
                    raise
                copied = f"cp {shlex.quote(str(whole))} {shlex.quote(str(path.with_name(LAST)))}"
                raise DamagedError(f"{error}; to go on from the newest whole one: {copied}") from error
            self._file = file
        return self._state

    def take(self, path: Path) -> dict[str, Any]:
        """Likewise, for the last time: nothing of it is kept here."""
        state = self.read(path)
        self._file, self._state = None, {}
        return state
