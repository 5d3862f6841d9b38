"""Checkpoints that do not stop the training: the state is copied at the step, and a thread writes the copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from robust_moe.engine.checkpoint import CheckpointError, save_checkpoint
from robust_moe.engine.run_checkpoints import LAST, drop_past, keep_past

__all__ = ["CheckpointWriter", "on_host"]


class CheckpointWriter:
    """Writes the checkpoints of a run folder, in the order in which they are asked for; a context manager.

    :meth:`save` copies the state and returns; a thread writes the copy, as :func:`~robust_moe.engine.checkpoint.
    save_checkpoint` does. At most one is written at a time: the next save waits for it. What could not be written is
    told by ``say``, stays in memory, and is tried again before anything that was asked for later, unless a newer one
    takes its name: ``best.pt`` is never older than what ``last.pt`` says of it. Only :meth:`finish` raises, after one
    more try. So a disk that is full for a while costs no run of days.

    The end of the ``with`` block is :meth:`finish`; where an error leaves it, a file that cannot be written is told.

    Args:
        folder: the run folder.
        keep: how many past ``last.pt`` are kept (:func:`~robust_moe.engine.run_checkpoints.keep_past`).
        step: of the ``last.pt`` that is there; None: there is none.
        say: called with a sentence about a file that could not be written.
        before, after: called in the thread, around the files of a save; an OSError of ``after`` counts as theirs.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 0,
        step: int | None = None,
        say: Callable[[str], object] = lambda _: None,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.keep, self._step = folder, keep, step
        self._say, self._before, self._after = say, before, after
        self._pending: dict[str, dict[str, Any]] = {}  # by file name, the first to write first
        self._whole = True  # nothing is to be written, what follows the files included
        self._copied: torch.cuda.Event | None = None  # when the copies from a GPU are whole
        self._thread: Thread | None = None
        self._error: BaseException | None = None  # of the thread

    def save(self, state: Mapping[str, Any], *names: str) -> None:
        """Write ``state`` (plain types and tensors, which may change as soon as this returns) to each of ``names``.

        Raises what the thread met otherwise than in writing, such as a training that has begun in the same folder.
        """
        self.wait()
        held, self._copied = on_host(state)
        self._pending |= dict.fromkeys(names, held)
        if LAST in self._pending:  # at the end, also where an earlier one has waited: it says which best.pt there is
            self._pending[LAST] = self._pending.pop(LAST)
        self._whole = False
        self._thread = Thread(target=self._write, name="checkpoints")
        try:
            self._thread.start()
        except RuntimeError:  # the system allows no further one: the training waits
            self._thread = None
            self._write()

    def check(self) -> None:
        """As :meth:`wait`, if there is nothing to wait for."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written; a file that could not be is told, and stays to be written."""
        error = self._join()
        if isinstance(error, CheckpointError):
            self._say(f"{error}; the training goes on, and the next checkpoint tries again")
        elif error is not None:
            raise error

    def finish(self) -> None:
        """Until everything is written. Raises :class:`CheckpointError` for a file that cannot be; waiting costs one
        write, or two where the first one fails."""
        error = self._join()
        if not self._whole:
            self._write()
            error = self._join()
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.finish()
        except CheckpointError as failed:
            if kind is None:
                raise
            self._say(str(failed))

    def _join(self) -> BaseException | None:
        """Wait for the thread; what it met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _write(self) -> None:
        try:
            if self._copied is not None:
                self._copied.synchronize()
            self._before()
            while self._pending:
                name, state = next(iter(self._pending.items()))
                self._write_file(name, state)
                del self._pending[name]
            try:
                self._after()
            except OSError as error:
                raise CheckpointError(
                    f"{error.filename or self.folder}: the settings beside the checkpoint could not be written "
                    f"({error.strerror or error})"
                ) from error
            self._whole = True
        except CheckpointError as error:
            self._error = error
        except BaseException as error:
            self._error = error
            self._pending.clear()
            self._whole = True  # nothing more of this run

    def _write_file(self, name: str, state: dict[str, Any]) -> None:
        path = self.folder / name
        step = int(state["position"]["step"])
        rotates = name == LAST and self.keep > 0
        if rotates and self._step is not None and self._step < step:
            keep_past(self.folder, self._step)
        save_checkpoint(state, path)
        if name == LAST:
            self._step = step
        if rotates:
            drop_past(self.folder, self.keep, before=step)


def on_host(state: Mapping[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """A copy of ``state`` in the CPU's memory, and when it is whole (None: at once).

    Whole storages are copied, each once, as ``torch.save`` writes them: views stay views. From a GPU they go to pinned
    memory while the training goes on; what is queued there later changes the tensors after the copies.
    """
    storages: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}  # by id, as deepcopy takes it
    on_gpu = False
    for tensor in _tensors(state):
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            copies[id(tensor)] = tensor.detach().resolve_conj().resolve_neg().cpu().clone()
            continue
        storage = tensor.untyped_storage()
        key = storage.device, storage.data_ptr(), storage.nbytes()
        if key not in storages:
            on_gpu |= tensor.is_cuda
            storages[key] = _host_copy(storage)
        view = torch.empty(0, dtype=tensor.dtype)
        copies[id(tensor)] = view.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
    event = None
    if on_gpu:
        event = torch.cuda.Event()
        event.record()
    return copy.deepcopy(dict(state), copies), event


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _host_copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    if storage.device.type != "cuda":
        return storage.cpu() if storage.device.type != "cpu" else storage.clone()
    source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    pinned = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
    return pinned.copy_(source, non_blocking=True).untyped_storage()
