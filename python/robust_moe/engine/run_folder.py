"""One training in a run folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from robust_moe.config import ConfigError
from robust_moe.files import lock

__all__ = ["LOCK", "alone_in"]

LOCK = ".train.lock"  # not .lock, by which a study holds the folder around the training


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other training is in ``folder``, which is made, meanwhile. The lock goes with its process, however that ends.
    A folder that was made here and in which nothing was written is removed again.

    Raises:
        ConfigError: another training is.
        OSError: the folder cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / LOCK, "ab") as file:
            # a file that was removed meanwhile is locked in vain
            if not (lock(file) and (folder / LOCK).exists() and os.path.samefile(folder / LOCK, file.fileno())):
                raise ConfigError(f"run.out: expected a folder that no other training works in, got {folder}")
            yield
    finally:
        if made and os.listdir(folder) == [LOCK]:
            with suppress(OSError):
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
