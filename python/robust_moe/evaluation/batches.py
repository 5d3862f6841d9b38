"""The images of an evaluation batch by batch, each batch done once: it is on the disk before the next one begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robust_moe.data import Batch
from robust_moe.evaluation.store import Journal
from robust_moe.seeding import derive_seed

__all__ = ["Batches", "Progress", "Task", "drawing"]

Record = dict[str, Any]


class Progress(Protocol):
    """Called after each batch: images done, and what to say."""

    def __call__(self, advance: int = 1, note: str | None = None) -> None: ...


Task = Callable[[str, int, int], AbstractContextManager[Progress]]  # (what, images, of them done already)


def _quiet(advance: int = 1, note: str | None = None) -> None:
    pass


def _silent(what: str, total: int, done: int = 0) -> AbstractContextManager[Progress]:
    return nullcontext(_quiet)


class Batches:
    """Images, and what was computed of them so far.

    What a batch gives is taken from the journal where it is there. PyTorch's default generators, the CPU's and the
    device's, are seeded for each piece of work by (seed, key) and left as found, so that a model that draws from them
    draws the same when resumed; one with a ``torch.Generator`` of its own does not.

    Args:
        images: uint8 [n, C, H, W] in 0..255, or floats in [0, 1]; checked by the caller, like all that follows.
        labels, index: int64 [n]; positions in the data set.
        device: where batches go.
        batch_size: images in one.
        seed: of the generators.
        journal: None: kept in memory.
        task: shows progress; see :meth:`robust_moe.engine.Reporter.task`. None: shows none.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        *,
        device: torch.device,
        batch_size: int,
        seed: int,
        journal: Journal | None = None,
        task: Task | None = None,
    ) -> None:
        self.images, self.labels, self.index = images, labels, index
        self.device, self.batch_size, self.seed = device, batch_size, seed
        self.journal = Journal(None, {}) if journal is None else journal
        self.task = task or _silent
        self.seconds = 0.0  # of all work, in all sessions

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Batch:
        """The images of ``rows`` as floats in [0, 1], on the device."""
        chosen = torch.from_numpy(rows)
        x, y, index = (
            tensor[chosen.to(tensor.device)].to(self.device) for tensor in (self.images, self.labels, self.index)
        )
        if x.dtype == torch.uint8:  # by a tensor, not a number: as in training, also on a GPU
            x = x.to(torch.float32).div_(torch.tensor(255.0, device=self.device))
        return Batch(x, y, index)

    def once(self, key: str, compute: Callable[[], Record]) -> Record:
        """What ``compute`` gives, plain values and arrays by name; it is called where the journal has no ``key``."""
        record = self.journal.get(key)
        if record is None:
            began = time.perf_counter()
            with drawing(derive_seed(self.seed, key), self.device):
                result = compute()
            record = self.journal.put(key, {**result, "seconds": time.perf_counter() - began})
        self.seconds += record["seconds"]
        return record

    def over(
        self, name: str, rows: np.ndarray, compute: Callable[[np.ndarray], Record], title: str | None = None
    ) -> Iterator[tuple[np.ndarray, Record, Progress]]:
        """(rows, what ``compute`` gave of them now or before, progress to advance) of each batch of ``rows``.

        Args:
            name: of the stage; begins its keys in the journal.
            title: of its progress; None: ``name``.
        """
        starts = range(0, len(rows), self.batch_size)
        batches = {f"{name}/{number}": rows[at : at + self.batch_size] for number, at in enumerate(starts)}
        known = sum(len(batch) for key, batch in batches.items() if self.journal.get(key) is not None)
        with self.task(title or name, len(rows), known) as advance:
            for key, batch in batches.items():
                new = self.journal.get(key) is None
                yield batch, self.once(key, partial(compute, batch)), advance if new else _quiet


@contextmanager
def drawing(seed: int, device: torch.device) -> Iterator[None]:
    """PyTorch's default generators, of the CPU and of ``device``, seeded for what runs inside, and as found after it.
    Other GPUs are left alone."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
