"""Memory of large CPU results, kept for the next one of its size.

A stack of experts' filter gradients is hundreds of megabytes. C's allocator maps anything above 32 MB anew, and the
first touch of fresh pages is slow: 69 ms for 151 MB in pages of 4 KB, more than the products behind it; 10 ms in pages
of 2 MB; 6 ms in memory that was used before. A virtual machine that hands free memory back to its host pays more
again: measured 300 ms for the same 151 MB after some seconds. So results are made in mapped blocks that return here
when the last tensor on them is gone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

__all__ = ["KEPT", "KeptMemory"]

_MAPPED_ANEW = 32 * 2**20  # bytes; smaller blocks the C library keeps by itself
_PRIVATE = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)  # no choice: Windows


class KeptMemory:
    """Blocks of large results. Idle ones are given up, the longest idle first, so that what is kept is never more than
    what was in use at once.

    A kept tensor is one of PyTorch's in all but one respect: its storage cannot grow (``untyped_storage().resize_``).

    Args:
        smallest: bytes from which on results are kept.
    """

    def __init__(self, smallest: int = _MAPPED_ANEW) -> None:
        self._smallest = smallest
        self._idle: list[mmap.mmap] = []
        self._held = self._used = self._peak = 0
        self._unlock()

    def _unlock(self) -> None:
        # Reentrant: a tensor may be freed, and return its block, while another is being made.
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes mapped, in use or idle."""
        return self._held

    def empty_like(self, tensor: Tensor) -> Tensor:
        """As torch.empty_like of a dense CPU tensor."""
        size = tensor.numel() * tensor.element_size()
        block = self._take(size) if size >= self._smallest else None
        if block is None:
            return torch.empty_like(tensor)
        view = memoryview(block)
        # The storage holds the view until its last tensor is gone.
        weakref.finalize(view, self._return, block).atexit = False
        flat = torch.frombuffer(view, dtype=tensor.dtype, count=tensor.numel())
        return flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())

    def release(self) -> None:
        """Give idle blocks back to the system."""
        with self._lock:
            self._give_up(self._used)
            self._peak = self._used

    def _take(self, size: int) -> mmap.mmap | None:
        """A block of ``size`` bytes; ``None`` if the system has none: the allocator can say that better."""
        with self._lock:
            block = next((block for block in self._idle if len(block) == size), None)
            if block is not None:
                self._idle.remove(block)
            else:
                self._give_up(max(self._peak, self._used + size) - size)
                try:
                    block = mmap.mmap(-1, size, **_PRIVATE)
                except OSError:
                    return None
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with contextlib.suppress(OSError):  # a kernel without large pages
                        block.madvise(mmap.MADV_HUGEPAGE)
                self._held += size
            self._used += size
            self._peak = max(self._peak, self._used)
        return block

    def _give_up(self, bound: int) -> None:
        """Drop idle blocks until no more than ``bound`` bytes are held, or none is left."""
        while self._held > bound and self._idle:
            self._held -= len(self._idle.pop(0))

    def _return(self, block: mmap.mmap) -> None:
        with self._lock:
            self._used -= len(block)
            self._idle.append(block)


KEPT = KeptMemory()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=KEPT._unlock)  # another thread may have held it
