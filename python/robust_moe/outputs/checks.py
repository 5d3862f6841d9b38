"""Outputs are looked at before the work: refused where they cannot be written or something else would be lost."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from robust_moe.files import remove_leftovers, temporary_file
from robust_moe.outputs.kinds import Kind, Output
from robust_moe.settings.errors import ConfigError

__all__ = [
    "clear_outputs",
    "expect_folder",
    "expect_json_name",
    "expect_named",
    "expect_outputs",
    "is_free",
    "place_of",
    "remove_folder",
]


def expect_named(argument: str, path: str | Path) -> Path:
    """``path`` with the home folder in place of ``~``; raises :class:`ConfigError` for an empty one, which would be the
    working directory."""
    if os.fspath(path) == "":
        raise ConfigError(f"{argument}: expected a name, got ''")
    return Path(os.path.expanduser(path))


def expect_json_name(argument: str, path: str | Path) -> Path:
    """``path``, whose name ends in .json, as the names of the files beside it are made of it; or ConfigError."""
    path = expect_named(argument, path)
    _expect_file(argument, path)  # a device or a folder is refused as such
    if path.suffix != ".json":
        raise ConfigError(f"{argument}: expected a file whose name ends in .json, got {path}")
    return path


def expect_folder(argument: str, path: str | Path) -> Path:
    """``path``, a folder or one that can be made; raises :class:`ConfigError` otherwise."""
    path = expect_named(argument, path)
    try:
        mode = _mode(path)
        if mode is None:
            _expect_room(path)
    except (OSError, ValueError) as error:
        raise _refused(argument, "a folder to write to", path, error) from error
    if mode is not None and not stat.S_ISDIR(mode):
        raise ConfigError(f"{argument}: expected a folder to write to, got {path} (a {_called(mode)})")
    return path


def expect_outputs(
    argument: str, outputs: Iterable[Output], inputs: Iterable[tuple[str, str | Path | None]] = ()
) -> None:
    """Refuse outputs that cannot be written, are one another, or would take the place of something else.

    Args:
        argument: that the names come from, for messages, e.g. ``"out"``.
        outputs: all files that will be written.
        inputs: (argument, file that will be read); None: none.

    Raises:
        ConfigError: the first output that is refused; nothing has been written.
    """
    outputs = list(outputs)
    places: dict[tuple[Any, ...], Kind] = {}
    for path, kind in outputs:
        _expect_file(argument, path)
        first = places.setdefault(place_of(path), kind)
        if first is not kind:
            raise ConfigError(f"{argument}: expected names that differ, got {path} for {first.what} and {kind.what}")
    for name, source in inputs:
        if source is not None and place_of(Path(source)) in places:
            raise ConfigError(f"{argument}: expected another file than {name}, which is read, got {source}")
    there = [(path, kind) for path, kind in outputs if path.is_file()]
    known = any(kind.ours(path, False) for path, kind in there)
    for path, kind in there:
        if not is_free(path, kind, known):
            raise ConfigError(f"{argument}: expected a new name or {kind.what}, got another file at {path}")
        if other := kind.owner(path):
            raise ConfigError(f"{argument}: expected other names for {kind.what}, got {path}, which belongs to {other}")


def is_free(path: Path, kind: Kind, known: bool = False) -> bool:
    """Whether a file of ``kind`` may be written to ``path``: nothing is there, an empty file or one of the kind.
    ``known``: as for :attr:`Kind.ours`."""
    return not path.is_file() or not path.stat().st_size or kind.ours(path, known)


def clear_outputs(outputs: Iterable[Output], *, anew: bool, keep: Kind | None = None) -> None:
    """Delete what killed writes of ``outputs`` left; ``anew``: and the files themselves, but for those of the kind
    ``keep``. No other process may be writing them."""
    outputs = list(outputs)
    remove_leftovers(path for path, _ in outputs)
    for path, kind in outputs if anew else ():
        if kind is not keep:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path, outputs: Iterable[Output]) -> None:
    """Delete ``outputs``, and their folders up to ``folder`` where nothing else is in them."""
    outputs = list(outputs)
    clear_outputs(outputs, anew=True)
    for each in sorted({path.parent for path, _ in outputs} | {folder}, reverse=True):  # the deepest first
        with contextlib.suppress(OSError):
            each.rmdir()


def _expect_file(argument: str, path: Path) -> None:
    try:
        mode = _mode(path)
        if mode is None or stat.S_ISREG(mode):
            _mode(temporary_file(path))  # its name is longer
            _expect_room(path)
    except (OSError, ValueError) as error:
        raise _refused(argument, "a file to write", path, error) from error
    if mode is not None and not stat.S_ISREG(mode):
        raise ConfigError(f"{argument}: expected a file to write, got the {_called(mode)} {path}")


def _refused(argument: str, expected: str, path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{argument}: expected {expected}, got {path} ({getattr(error, 'strerror', None) or error})")


def _mode(path: Path) -> int | None:
    """Of what a name leads to; None: nothing is there."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None


def _expect_room(path: Path) -> None:
    """Raise OSError where no file or folder of that name can be made."""
    folder = path.parent
    while _mode(folder) is None and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(0, f"{folder} is not writable")


def _called(mode: int) -> str:
    names = {
        stat.S_IFDIR: "folder",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFREG: "file",
    }
    return names.get(stat.S_IFMT(mode), "device")


def place_of(path: Path) -> tuple[Any, ...]:
    """Equal for names of one file, through links too."""
    try:
        found = os.stat(path)
    except OSError:
        return (os.path.realpath(path),)
    return found.st_dev, found.st_ino
