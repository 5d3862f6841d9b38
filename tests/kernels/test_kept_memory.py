"""Large results' memory: used again once no tensor is left on it, and never before."""

from __future__ import annotations

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


def test_outlives_its_keeper() -> None:
    result = KeptMemory(smallest=1).empty_like(like(KB))
    assert result.fill_(4).eq(4).all()
