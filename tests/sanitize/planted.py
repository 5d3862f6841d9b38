"""Wrong calls of the extension, which no op makes: each is one fault that its sanitizer has to find."""

from __future__ import annotations

import sys
import threading

import torch

from robust_moe_kernels import native


def sort(experts: int, top_k: int) -> None:
    """Four pairs; the offsets of two experts are allocated."""
    pairs, invalid = torch.zeros(4, dtype=torch.int64), torch.zeros((), dtype=torch.int32)
    order, sample, inverse = (torch.empty_like(pairs) for _ in range(3))
    outputs = (order, sample, inverse, torch.empty(3, dtype=torch.int64), invalid)
    addresses = (tensor.data_ptr() for tensor in outputs)
    native.extension().sort_by_expert_cpu(pairs.data_ptr(), len(pairs), experts, top_k, *addresses)


def overflow() -> None:
    sort(20, 1)


def division() -> None:
    sort(2, 0)


def race() -> None:
    """Two threads, each of which writes all of one output."""
    maps, out = torch.ones(64, 16, 16, 64), torch.empty(64, 16, 16, 64)
    table, offsets = torch.ones(2, 64), torch.tensor([0, 30, 64])
    tables = (table.data_ptr(), table.data_ptr())

    def write() -> None:
        for _ in range(50):
            sizes = (2, 64, 256, 64, native.dtype_code(maps))
            native.extension().scale_shift_cpu(
                offsets.data_ptr(), *sizes, maps.data_ptr(), *tables, True, out.data_ptr(), 1
            )

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    {"overflow": overflow, "division": division, "race": race}[sys.argv[1]]()
