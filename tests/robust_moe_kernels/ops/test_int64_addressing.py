"""Rows beyond 2^31 elements. The big tensor is never filled: only its last row is touched, so it costs address space
(4.3 GB) and hardly any memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robust_moe_kernels.dispatch import IMPLEMENTATIONS
from robust_moe_kernels.ops.permute import PERMUTE

ROWS, SIZE = 2**21 + 1, 1024  # float16: the last row starts at element 2^31
RUNNABLE = [impl for impl in IMPLEMENTATIONS if PERMUTE.why_not(impl, "cpu") is None]


@pytest.fixture
def last_row(poisoned, generator) -> tuple[Tensor, Tensor]:
    """(tensor of ROWS rows of which only the last is written, that row)."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        big = torch.empty(ROWS, SIZE, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    big[-1] = torch.randn(SIZE, generator=generator).half()
    assert big[-1].storage_offset() == 2**31
    return big, big[-1].clone()


@pytest.mark.parametrize("impl", RUNNABLE)
def test_the_last_row_is_found(impl, last_row):
    """One pair at one row: sample and row ROWS - 1, gathered, summed and multiplied."""
    big, row = last_row
    module = PERMUTE.module(impl)
    place, one = torch.tensor([ROWS - 1]), torch.ones(1, 1)
    assert torch.equal(module.dispatch(big, place, place, None, 1)[0], row)
    assert torch.equal(module.combine(big, place, place, one, 1)[0], row)
    dot = module.row_dot(row[None], big, torch.zeros(1, dtype=torch.int64), place, 1)
    assert dot.item() == pytest.approx(row.double().square().sum().item(), rel=1e-6)
