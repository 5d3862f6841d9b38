"""Large results' memory: used again once no tensor is left on it, and never before."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from robust_moe_kernels.kept_memory import KeptMemory

KB = 1024


@pytest.fixture
def kept() -> KeptMemory:
    return KeptMemory(smallest=4 * KB)


def like(*shape: int) -> Tensor:
    return torch.empty(shape)


def test_used_again_after_the_last_view(kept: KeptMemory) -> None:
    first = kept.empty_like(like(4, KB))
    address, row = first.data_ptr(), first[2]
    del first
    other = kept.empty_like(like(4, KB))  # the row still lives there
    assert other.data_ptr() != address
    row.fill_(1)
    other.fill_(2)
    assert row.eq(1).all()
    del row
    assert kept.empty_like(like(4, KB)).data_ptr() == address
    assert kept.held == 2 * 16 * KB


def test_kept_alive_by_autograd_and_detached_tensors(kept: KeptMemory) -> None:
    result = kept.empty_like(like(4, KB)).fill_(3)
    weight = torch.ones(4, KB, requires_grad=True)
    product = (weight * result).sum()  # saves the result
    address = result.data_ptr()
    del result
    assert kept.empty_like(like(4, KB)).fill_(7).data_ptr() != address
    product.backward()
    assert weight.grad.eq(3).all()


def test_an_own_gradient_stays(kept: KeptMemory) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, KB))

    class Give(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return kept.empty_like(like(4, KB)).fill_(5)

    Give.apply(parameter).backward()
    kept.empty_like(like(4, KB)).fill_(6)
    assert parameter.grad.eq(5).all()
    Give.apply(parameter).backward()
    assert parameter.grad.eq(10).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layout_and_dtype_of_the_model(kept: KeptMemory, dtype: torch.dtype) -> None:
    model = torch.empty(4, 3, 16, 33, dtype=dtype).permute(0, 3, 1, 2)
    result = kept.empty_like(model)
    assert (result.shape, result.stride(), result.dtype) == (model.shape, model.stride(), dtype)
    result.fill_(2)
    assert float(result.double().sum()) == 2.0 * model.numel()


def test_small_results_are_not_kept(kept: KeptMemory) -> None:
    kept.empty_like(like(KB - 1))
    assert kept.held == 0


def test_idle_blocks_go_when_another_size_comes(kept: KeptMemory) -> None:
    one, two = kept.empty_like(like(2 * KB)), kept.empty_like(like(2 * KB))
    del one
    three = kept.empty_like(like(3 * KB))  # the idle block is given up, the one in use is not
    assert kept.held == (2 + 3) * 4 * KB
    del two, three
    assert kept.held == (2 + 3) * 4 * KB
    kept.release()
    assert kept.held == 0


def test_two_sizes_in_turn_are_both_kept(kept: KeptMemory) -> None:
    """As under gradient accumulation: the first sums stay, each later gradient is freed before the next."""
    sums = [kept.empty_like(like(2 * KB)), kept.empty_like(like(3 * KB))]
    for _ in range(2):
        both = kept.empty_like(like(2 * KB)), kept.empty_like(like(3 * KB))
        del both
    addresses = set()
    for _ in range(3):
        for size in (2, 3):
            addresses.add(kept.empty_like(like(size * KB)).data_ptr())
    assert len(addresses) == 2
    assert kept.held == 2 * (2 + 3) * 4 * KB
    del sums


def test_never_more_than_was_in_use_at_once(kept: KeptMemory) -> None:
    for size in range(1, 9):
        kept.empty_like(like(size * KB))
        assert kept.held == size * 4 * KB
    one, two = kept.empty_like(like(8 * KB)), kept.empty_like(like(2 * KB))
    del one, two
    kept.empty_like(like(3 * KB))
    assert kept.held <= (8 + 2) * 4 * KB


def test_a_system_without_large_pages(kept: KeptMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refuses)
    assert kept.empty_like(like(4 * KB)).fill_(1).eq(1).all()
    assert kept.held == 16 * KB


def test_memory_that_cannot_be_had_is_the_allocators_to_refuse(
    kept: KeptMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuses)
    assert kept.empty_like(like(4 * KB)).fill_(1).eq(1).all()
    assert kept.held == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_holds_the_lock() -> None:
    """The child has no such thread, so nobody would ever open the lock. In a process of its own: forking this one, with
    its threads, is not for a test to do."""
    script = """
import os, threading, torch
from robust_moe_kernels.kept_memory import KEPT
inside, leave = threading.Event(), threading.Event()
def hold():
    with KEPT._lock:
        inside.set(); leave.wait()
thread = threading.Thread(target=hold); thread.start(); inside.wait()
child = os.fork()
if child == 0:
    KEPT.empty_like(torch.empty(2**23 + 1)).fill_(1); os._exit(7)
leave.set(); thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "7", done.stderr


def test_outlives_its_keeper() -> None:
    result = KeptMemory(smallest=1).empty_like(like(KB))
    assert result.fill_(4).eq(4).all()
