"""One training in a run folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from robust_moe.config import ConfigError
from robust_moe.files import lock

__all__ = ["LOCK", "alone_in"]

LOCK = ".train.lock"  # not .lock, by which a study holds the folder around the training


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other training is in ``folder``, which is made, meanwhile. The lock goes with its process, however that ends;
    its file is removed at the end, and the folder too where it was made here and nothing is in it.

    Raises:
        ConfigError: another training is.
        OSError: the folder cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        while True:
            file = held.enter_context(open(folder / LOCK, "ab"))
            if not lock(file):
                raise ConfigError(f"run.out: expected a folder that no other training works in, got {folder}")
            with suppress(FileNotFoundError):
                if os.path.samefile(folder / LOCK, file.fileno()):
                    break  # otherwise another training has removed it since it was opened
        try:
            yield
        finally:
            with suppress(OSError):  # an open file stays on some systems, a folder with other files on all
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
