"""Batches of images that are decoded while the training computes, by worker processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import parent_process
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from robust_moe.data.decode_all import OtherSize
from robust_moe.data.image_set import DataError, ImageSet, listed
from robust_moe.data.loader import BatchLoader, Fetched, Loader
from robust_moe.data.order import Planned
from robust_moe.data.progress import Task, silent
from robust_moe.data.streamed import StreamedSet
from robust_moe.data.transfer import one_ahead

__all__ = ["StreamLoader", "make_loader"]

PREFETCHED = 2  # batches for each worker, decoded before they are asked for
MOST_WORKERS = 8  # where data.workers is null
IN_A_ROW = 100  # images that cannot be read, one after the other: then it is no longer damage to single ones


class _Request(NamedTuple):
    """What a worker decodes at a time: the images of a batch."""

    positions: list[int]  # in the set
    crops: list[list[float]] | None = None  # numbers of a random resized crop of each image
    ratio: tuple[float, ...] = ()  # that they were drawn with
    flips: list[bool] | None = None  # which images are mirrored left-right


class _Answer(NamedTuple):
    pixels: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B]
    index: Tensor  # type: ignore[assignment]  # int64 [B]: of the images that they are; hides tuple.index
    faults: list[str]  # of images in whose place the next ones came
    error: str | None  # why the pixels are none; an exception would bring the worker's stack with it


class _Decoder(Dataset[_Answer]):
    """In a worker: a request to its images."""

    def __init__(self, images: StreamedSet) -> None:
        self.images = images

    def __getitem__(self, request: _Request) -> _Answer:
        images, faults = self.images, list[str]()
        pixels = np.empty((len(request.positions), *images.shape), dtype=np.uint8)
        index = torch.tensor(request.positions)
        error = None
        try:
            for place, asked in enumerate(request.positions):
                crop = None if request.crops is None else request.crops[place]
                index[place], image = self._read(asked, crop, request.ratio, faults)
                mirrored = request.flips is not None and request.flips[place]
                pixels[place] = image[:, :, ::-1] if mirrored else image
        except DataError as fault:
            error = str(fault)
        return _Answer(torch.from_numpy(pixels), images.labels[index], index, faults, error)

    def _read(
        self, asked: int, crop: list[float] | None, ratio: tuple[float, ...], faults: list[str]
    ) -> tuple[int, np.ndarray]:
        """(position, pixels) of an image, or with ``on_error`` "skip" of the next in the set that can be read: the same
        in every epoch, on every rank and however often the run was stopped."""
        images = self.images
        for step in range(IN_A_ROW):
            i = (asked + step) % len(images)
            try:
                return i, images.pixels(i, crop, ratio)
            except OtherSize:
                raise
            except DataError as error:
                if images.on_error == "stop":
                    raise
                faults.append(str(error))
        raise DataError(
            f"expected an image that can be read among {IN_A_ROW} in a row, got none, the last of them: {faults[-1]}"
        )


class StreamLoader(Loader):
    """The loader of a :class:`StreamedSet`.

    The batches are those that :class:`~robust_moe.data.loader.BatchLoader` makes of the same images in memory, bit for
    bit, but for random resized crops, which are cut out of the images at their own resolution. Whole batches are
    decoded by ``images.workers`` processes, some before they are asked for; on a GPU the copy of the next batch
    overlaps with the step on this one.

    Args:
        say: told at the end of an epoch which images could not be read; None: nobody.
        task: shows the progress of what has to be done first, as for Parquet files.
        options: as of :class:`~robust_moe.data.loader.Loader`.
    """

    def __init__(
        self,
        images: StreamedSet,
        batch_size: int,
        *,
        say: Callable[[str], None] | None = None,
        task: Task = silent,
        **options: Any,
    ) -> None:
        super().__init__(images, batch_size, **options)
        self.images, self.say = replace(images, images=images.images.for_any_order(task)), say
        self.workers = images.workers
        if self.workers is None:
            self.workers = _useful_workers(self.device, self.order.world_size)

    def _fetch(self, epoch: int, batches: Iterable[Planned]) -> Iterator[Fetched]:
        faults: dict[str, None] = {}
        try:
            yield from one_ahead(self._decoded(batches, faults), self.device)
        finally:
            if faults and self.say is not None:
                self.say(
                    f"epoch {epoch + 1}: {len(faults)} images could not be read, and the next ones took their places "
                    f"(data.on_error=skip): {listed(list(faults), '; ')}"
                )

    def _decoded(self, batches: Iterable[Planned], faults: dict[str, None]) -> Iterator[Fetched]:
        """On the CPU; what is wrong with images joins ``faults``."""
        asked: deque[Planned] = deque()  # and not answered yet
        with _lost_workers_found_here():
            answers = iter(self._requested(batches, asked))
        try:
            while (answer := _next(answers)) is not None:
                planned = asked.popleft()
                if answer.error is not None:
                    raise DataError(answer.error)
                faults.update(dict.fromkeys(answer.faults))
                yield Fetched(_rest(planned), answer.pixels, answer.labels, answer.index)
        finally:
            del answers  # ends the workers; an error's traceback would keep them

    def _requested(self, batches: Iterable[Planned], asked: deque[Planned]) -> DataLoader[_Answer]:
        workers = self.workers or 0
        return DataLoader(
            _Decoder(self.images),
            batch_size=None,
            sampler=_Requests(batches, asked),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_live_with_parent,
            prefetch_factor=PREFETCHED if workers else None,
            generator=torch.Generator(),  # the global one is not moved
            # elsewhere the system's own way; a worker that Linux would start anew imports PyTorch for seconds
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )


def _rest(planned: Planned) -> Planned:
    """What of the changes a worker has not done: a resized crop comes first, and costs least on what is decoded; a flip
    costs nothing there where no other crop comes before it."""
    draw = planned.draw
    if draw is None:
        return planned
    return planned._replace(draw=draw._replace(resized=None, flip=draw.flip if draw.crop is not None else None))


class _Requests:
    """What the workers are asked for, in order; each plan joins ``asked`` when its request is made."""

    def __init__(self, batches: Iterable[Planned], asked: deque[Planned]) -> None:
        self._batches, self._asked = batches, asked

    def __iter__(self) -> Iterator[_Request]:
        for planned in self._batches:
            self._asked.append(planned)
            draw, request = planned.draw, _Request(planned.positions.tolist())
            if draw is not None and draw.resized is not None:
                request = request._replace(crops=draw.resized.tolist(), ratio=draw.ratio)
            if draw is not None and draw.flip is not None and draw.crop is None:
                request = request._replace(flips=draw.flip.tolist())
            yield request


def _as_it_is(answer: Any) -> Any:
    return answer


def _next(answers: Iterator[_Answer]) -> _Answer | None:
    try:
        return next(answers, None)
    except (RuntimeError, OSError, EOFError) as error:  # a worker was killed, or there is no shared memory
        why = str(error)
    raise DataError(  # not within the block above, whose error would keep the other workers
        f"data.workers: expected worker processes that decode images, one has ended: {why}; data.workers=0 decodes "
        "without them"
    )


@contextmanager
def _lost_workers_found_here() -> Iterator[None]:
    """The first DataLoader with workers in a process sets a handler that raises RuntimeError wherever the process is
    when one of them dies, so in the middle of a step. Without it the DataLoader notices when it waits for a batch."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def _live_with_parent(worker: int) -> None:
    """Not longer: a fork has the lock of the run folder open too, and a training that was killed could not be started
    again at once. Not shorter: a signal to stop meets all processes of a terminal or a job, and the training ends in
    order, with batches of its workers, which end when it says so; of SIGTERM its own is heeded alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on every system
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in the threads that start from here on too
        threading.Thread(target=_end_at_word_of, args=(os.getppid(),), daemon=True).start()
    threading.Thread(target=_end_after_parent, daemon=True).start()


def _end_after_parent() -> None:
    parent = parent_process()
    assert parent is not None  # of a worker
    parent.join()  # also the end of one that was killed
    os._exit(1)


def _end_at_word_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _useful_workers(device: torch.device, world_size: int) -> int:
    if device.type != "cuda":
        return 1
    known = hasattr(os, "sched_getaffinity")  # not on every system
    processors = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, processors // min(world_size, torch.cuda.device_count() or 1)))


def make_loader(
    images: ImageSet | StreamedSet,
    batch_size: int,
    *,
    say: Callable[[str], None] | None = None,
    task: Task = silent,
    **options: Any,
) -> Loader:
    """The loader of images in memory or of streamed ones; ``say``, ``task`` and the other arguments are
    :class:`StreamLoader`'s and :class:`~robust_moe.data.loader.Loader`'s."""
    if isinstance(images, StreamedSet):
        return StreamLoader(images, batch_size, say=say, task=task, **options)
    return BatchLoader(images, batch_size, **options)
