"""One training in a run folder at a time."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from robust_moe.config import ConfigError, load_config, yaml_text
from robust_moe.files import lock

__all__ = ["LOCK", "TRAINED", "alone_in", "expect_other_folder", "is_running"]

TRAINED = ("last.pt", "best.pt", "metrics.jsonl")  # by which a run is known
LOCK = ".train.lock"  # not .lock, by which a study holds the folder around the training
LOOKS, PAUSE = 10, 0.05  # tries for the lock, and seconds between two: is_running has it for the moment of a look


@contextmanager
def alone_in(folder: Path) -> Iterator[Callable[[], None]]:
    """No other training is in ``folder``, which is made, meanwhile. The lock goes with its process, however that ends;
    its file is removed at the end, and the folder too where it was made here and nothing is in it.

    What is yielded is to be called before something is written, and raises ConfigError where another training has begun
    all the same: some network file systems have no locks, and a lock's file may be removed by hand. The file says whose
    it is, and the training that began last has the folder.

    Raises:
        ConfigError: another training is.
        OSError: the folder cannot be made or written to.
    """
    mine = secrets.token_hex(16).encode()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        while True:
            file = held.enter_context(open(folder / LOCK, "ab"))
            if not _take(file):
                raise _not_alone(folder)
            with suppress(FileNotFoundError):
                if os.path.samefile(folder / LOCK, file.fileno()):
                    break  # otherwise another training has removed it since it was opened
        file.truncate(0)
        file.write(mine)
        file.flush()

        def expect_alone() -> None:
            if not _is_mine(folder, mine):
                raise _not_alone(folder, ", where another one has begun since")

        try:
            yield expect_alone
        finally:
            with suppress(OSError):  # an open file stays on some systems, a folder with other files on all
                if _is_mine(folder, mine):
                    (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()


def _is_mine(folder: Path, mine: bytes) -> bool:
    """Also where there is no such file, or it cannot be read: it is no other's for that."""
    try:
        return (folder / LOCK).read_bytes() in (mine, b"")
    except OSError:
        return True


def _not_alone(folder: Path, more: str = "") -> ConfigError:
    return ConfigError(f"run.out: expected a folder that no other training works in, got {folder}{more}")


def _take(file: BinaryIO) -> bool:
    """Whether the lock is ours: looks at it are waited out."""
    for _ in range(LOOKS):
        if lock(file):
            return True
        time.sleep(PAUSE)
    return lock(file)


def is_running(folder: Path) -> bool:
    """Whether a training is in ``folder``. A lock that is free is taken for the moment of the look, beside other looks:
    a training that starts in that moment waits it out."""
    if not (folder / LOCK).is_file():  # a FIFO would be waited for
        return False
    try:
        with open(folder / LOCK, "rb") as file:
            return not lock(file, shared=True)
    except FileNotFoundError:
        return False


def expect_other_folder(source: str | Path, folder: str | Path) -> None:
    """Refuse the folder of the configuration ``source`` for a new run, which writes a config.yaml of its own there.

    Args:
        source: that the settings were read from, as for :func:`~robust_moe.config.load_config`.
        folder: ``run.out``.

    Raises:
        ConfigError: the run would take the place of ``source``, and ``source`` is not what a run wrote: no run was
            trained there, and its text is not what :func:`~robust_moe.config.yaml_text` makes of it.
    """
    written, folder = Path(source).expanduser(), Path(folder)
    if not written.is_file() or not _same(written, folder / "config.yaml"):
        return
    if any(path.is_file() and path.stat().st_size for path in map(folder.joinpath, TRAINED)):
        return  # a run is gone on with
    with suppress(ConfigError):  # it may need settings beside it
        if written.read_text(encoding="utf-8") == yaml_text(load_config(written)):
            return
    raise ConfigError(
        "run.out: expected another folder than that of the configuration that is read, as a run writes its own "
        f"config.yaml, got {folder}"
    )


def _same(first: Path, second: Path) -> bool:
    return second.is_file() and os.path.samefile(first, second)
