"""Memory of large CPU results, kept for the next one of its size.

A stack of experts' filter gradients is hundreds of megabytes. C's allocator maps anything above 32 MB anew, and the
first touch of fresh pages is slow: 69 ms for 151 MB in pages of 4 KB, more than the products behind it; 10 ms in pages
of 2 MB; 6 ms in memory that was used before. A virtual machine that hands free memory back to its host pays more
again: measured 300 ms for the same 151 MB after some seconds. So results are made in mapped blocks that return here
when the last tensor on them is gone.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import torch
from torch import Tensor

__all__ = ["KEPT", "KeptMemory"]

_MAPPED_ANEW = 32 * 2**20  # bytes; smaller blocks the C library keeps by itself


class KeptMemory:
    """Blocks of large results. Idle ones are given up when a size is asked for that none of them has, so that what is
    kept is never more than what was in use at once.

    Args:
        smallest: bytes from which on results are kept.
    """

    def __init__(self, smallest: int = _MAPPED_ANEW) -> None:
        self._smallest = smallest
        self._lock = threading.RLock()  # a tensor may be freed, and return its block, while another is being made
        self._idle: list[mmap.mmap] = []
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes mapped, in use or idle."""
        return self._held

    def empty_like(self, tensor: Tensor) -> Tensor:
        """As torch.empty_like of a dense CPU tensor."""
        size = tensor.numel() * tensor.element_size()
        if size < self._smallest:
            return torch.empty_like(tensor)
        block = self._take(size)
        view = memoryview(block)
        # The storage holds the view until its last tensor is gone.
        weakref.finalize(view, self._return, block).atexit = False
        flat = torch.frombuffer(view, dtype=tensor.dtype, count=tensor.numel())
        return flat.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())

    def release(self) -> None:
        """Give idle blocks back to the system."""
        with self._lock:
            self._held -= sum(len(block) for block in self._idle)
            self._idle.clear()

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            for number, block in enumerate(self._idle):
                if len(block) == size:
                    return self._idle.pop(number)
            self.release()
            self._held += size
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def _return(self, block: mmap.mmap) -> None:
        with self._lock:
            self._idle.append(block)


KEPT = KeptMemory()
