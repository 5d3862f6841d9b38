"""Processes that evaluate together: each computes some of the batches, and all know what every one of them found.

The batches are those of one process, with the same images and the same random numbers, so that verdicts are the same
bit for bit on devices of one kind, whatever the number of processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["ONE", "Shards"]

T = TypeVar("T")


class Shards:
    """Who this process is among those of ``torch.distributed``'s default process group.

    Args:
        count: of the processes.
        rank: 0: the one that writes.
    """

    def __init__(self, count: int = 1, rank: int = 0) -> None:
        self.count, self.rank = count, rank

    def each(self, compute: Callable[[], T]) -> list[T]:
        """What ``compute`` returns in every process, in their order; it can be pickled. All have to call this.

        Raises:
            Exception: what it raised in one of them, the first, in all.
            ConnectionError: another process has ended.
        """
        if self.count == 1:
            return [compute()]
        outcome: tuple[Any, Exception | None]
        try:
            outcome = compute(), None
        except Exception as error:
            outcome = None, _sendable(error)
        found: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(found, outcome)
        except RuntimeError as error:
            raise ConnectionError(
                f"evaluation: expected {self.count} processes to the end, got none from another any more; the same "
                "command goes on after the last finished batch"
            ) from error
        found[self.rank] = outcome  # not a copy
        for _, raised in found:
            if raised is not None:
                raise raised
        return [value for value, _ in found]

    def first(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns in the first process, where alone it runs; errors as :meth:`each`."""
        return self.each(lambda: compute() if self.rank == 0 else None)[0]  # type: ignore[return-value]


ONE = Shards()


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
