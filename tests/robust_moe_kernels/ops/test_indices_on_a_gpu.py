"""What the GPU's kernels make of indices that the host has not read: nothing outside of the tensors is reached, and
what an index out of range would have reached is NaN.

On a CPU the operations refuse such indices before a kernel runs, so the kernels are called here without them: Triton's
in its interpreter, and CUDA's where they are emulated.
"""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

from robust_moe_kernels.dispatch import Op
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_block import EXPERT_BLOCK
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV
from robust_moe_kernels.ops.expert_mlp import EXPERT_MLP
from robust_moe_kernels.ops.expert_mlp.activation import activation_of
from robust_moe_kernels.ops.gate import GATE
from robust_moe_kernels.ops.permute import PERMUTE
from robust_moe_kernels.ops.routing import sort_by_expert

B, K, E, C = 3, 2, 4, 5
R = B * K
FAR = (-1, R, 2**33, -(2**40))
ROUTE = sort_by_expert(torch.tensor([[0, 3], [3, 1], [0, 1]]), E)
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
UNIT = Geometry((1, 1), (1, 1), (1, 1))


@pytest.fixture(params=["native", "triton"])
def impl(request) -> str:
    if request.param == "native" and not (HAS_GPU or os.environ.get("RMK_TEST_EMULATED_CUDA")):
        pytest.skip("the CPU's native kernels run behind the checks alone")
    return request.param


def module_of(op: Op, impl: str) -> ModuleType:
    reason = op.why_not(impl, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return op.module(impl)


def maps(rows: int, channels: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.rand(rows, channels, 4, 3, generator=generator).contiguous(memory_format=torch.channels_last).to(DEVICE)
    )


def table(seed: int) -> Tensor:
    return torch.rand(E, C, generator=torch.Generator().manual_seed(seed)).to(DEVICE) + 0.5


def wrong(index: Tensor, place: int, value: int) -> Tensor:
    index = index.clone()
    index[place] = value
    return index.to(DEVICE)


def broken(rows: Tensor) -> list[bool]:
    return rows.flatten(1).isnan().all(1).tolist()


@pytest.fixture(params=FAR)
def far(request) -> int:
    return request.param


@pytest.mark.parametrize("weighted", [False, True])
def test_dispatch_and_combine(impl, far, weighted):
    ops = module_of(PERMUTE, impl)
    weights = torch.rand(B, K, device=DEVICE) if weighted else None
    order, inverse = ROUTE.order.to(DEVICE), ROUTE.inverse.to(DEVICE)
    right = ops.dispatch(maps(B), order, inverse, weights, K)
    got = ops.dispatch(maps(B), wrong(ROUTE.order, 2, far), inverse, weights, K)
    assert broken(got) == [row == 2 for row in range(R)]
    assert torch.equal(got[[0, 1, 3, 4, 5]], right[[0, 1, 3, 4, 5]])
    got = ops.combine(maps(R), order, wrong(ROUTE.inverse, 2, far), weights, K)
    assert broken(got) == [False, True, False]
    assert torch.equal(got[[0, 2]], ops.combine(maps(R), order, inverse, weights, K)[[0, 2]])
    dots = ops.row_dot(maps(B), maps(R), order, wrong(ROUTE.inverse, 2, far), K)
    assert dots.isnan().flatten().tolist() == [pair == 2 for pair in range(R)]


@pytest.mark.parametrize("normed", [False, True])
def test_the_end_of_a_block(impl, far, normed):
    ops = module_of(EXPERT_BLOCK, impl)
    skip = (maps(R), table(3), table(4)) if normed else (maps(B), None, None)
    head = (maps(R), table(1), table(2), *skip)
    offsets, weights = ROUTE.offsets.to(DEVICE), torch.rand(B, K, device=DEVICE) + 0.5
    order, inverse = ROUTE.order.to(DEVICE), ROUTE.inverse.to(DEVICE)
    right = ops.head_forward(*head, order, inverse, offsets, weights)
    got = ops.head_forward(*head, order, wrong(ROUTE.inverse, 3, far), offsets, weights)
    assert broken(got) == [False, True, False]
    assert torch.equal(got[[0, 2]], right[[0, 2]])
    right, _ = ops.head_backward(maps(B), *head, order, inverse, offsets, weights)
    got, _ = ops.head_backward(maps(B), *head, wrong(ROUTE.order, 1, far), inverse, offsets, weights)
    assert got[1].isnan().any()
    assert torch.equal(got[[0, 2, 3, 4, 5]], right[[0, 2, 3, 4, 5]])
    summed = ops.sum_rows(maps(R), maps(R), wrong(ROUTE.inverse, 0, far), K)
    assert broken(summed) == [True, False, False]


OFFSETS = ([0, 2, 1, 4, 6], [-5, 2, 3, 4, 6], [0, 2, 3, 4, 2**40], [6, 6, -(2**40), 9, 1], [2**40, 0, 0, 0, 0])


@pytest.mark.parametrize("offsets", OFFSETS)
def test_offsets_that_cut_no_rows(impl, offsets):
    """Sums are over rows that there are; nothing is asked of which."""
    ops = module_of(EXPERT_BLOCK, impl)
    index = torch.tensor(offsets, device=DEVICE)
    sums = ops.column_sums(maps(R), maps(R), index, None, None, 2)
    whole = maps(R).double().sum((0, 2, 3))
    assert sums.isfinite().all() and bool((sums[0].sum(0) <= whole + 1e-6).all())
    assert ops.scale_shift(maps(R), index, table(1), table(2), True).isfinite().all()
    assert ops.norm_backward(maps(R), maps(R), index, table(1), None, None, None, None).isfinite().all()


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gates_gradient(impl, far, renormalize):
    ops = module_of(GATE, impl)
    logits = torch.rand(B, E, device=DEVICE)
    indices = logits.topk(K).indices
    given = (torch.rand(B, E, device=DEVICE), torch.rand(B, K, device=DEVICE), None, None, None, int(renormalize))
    right = ops.backward(logits, logits.softmax(1), indices, *given)
    index = wrong(indices.flatten(), 3, far).view(B, K)
    got = ops.backward(logits, logits.softmax(1), index, *given)
    assert torch.equal(got[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize("channels", [C, 16])
def test_a_gathered_convolution(far, channels):
    ops = module_of(EXPERT_CONV, "triton")
    weight = torch.rand(E, channels, channels, 3, 3, device=DEVICE)
    offsets, sample = ROUTE.offsets.to(DEVICE), ROUTE.sample.to(DEVICE)
    x, d_out = maps(B, channels), maps(R, channels)
    right = ops.forward(x, weight, offsets, sample, [], UNIT)
    got = ops.forward(x, weight, offsets, wrong(ROUTE.sample, 4, far), [], UNIT)
    assert broken(got) == [row == 4 for row in range(R)]
    assert torch.equal(got[[0, 1, 2, 3, 5]], right[[0, 1, 2, 3, 5]])
    right = ops.wgrad(x, d_out, offsets, sample, weight, UNIT)
    got = ops.wgrad(x, d_out, offsets, wrong(ROUTE.sample, 4, far), weight, UNIT)
    assert broken(got) == [False, False, False, True]  # rows 4 and 5 are the last expert's
    assert torch.equal(got[:3], right[:3])


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("channels", [C, 16])
def test_a_convolution_of_no_rows(offsets, channels):
    ops = module_of(EXPERT_CONV, "triton")
    weight = torch.rand(E, channels, channels, 3, 3, device=DEVICE)
    index = torch.tensor(offsets, device=DEVICE)
    x = maps(R, channels)
    assert ops.forward(x, weight, index, None, [], UNIT).shape == x.shape
    assert ops.dgrad(x, weight, index, [], 4, 3, UNIT).shape == x.shape
    assert ops.wgrad(x, x, index, None, weight, UNIT).isfinite().all()


def test_mlp_of_an_order_that_names_no_pair(far):
    """The row's expert outputs are NaN, and so are the token's that it belongs to and the weights' gradients."""
    ops = module_of(EXPERT_MLP, "triton")
    generator = torch.Generator().manual_seed(1)
    x, d_y, weight1, weight2 = (
        torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((B, C), (B, C), (E, 8, C), (E, C, 8))
    )
    weights, gelu = torch.rand(B, K, generator=generator).to(DEVICE), activation_of("gelu")
    place, inverse, offsets = 2, ROUTE.inverse.to(DEVICE), ROUTE.offsets.to(DEVICE)
    order, lost = wrong(ROUTE.order, place, far), int(ROUTE.order[place])
    y, z = ops.forward(x, weight1, None, weight2, None, weights, order, inverse, offsets, R, gelu)
    assert broken(z) == [row == place for row in range(R)]
    assert broken(y) == [token == lost // K for token in range(B)]
    tables = (weights, order, inverse, offsets)
    z = z.nan_to_num()
    d_x, d_weight1, _, d_weight2, _, d_weights = ops.backward(
        d_y, x, z, weight1, weight2, None, *tables, gelu, (True, True, False, True, False, True)
    )
    assert broken(d_x) == [token == lost // K for token in range(B)]
    assert d_weights.view(-1).isnan().tolist() == [pair == lost for pair in range(R)]
    expert = int((ROUTE.offsets <= place).sum()) - 1
    for gradient in (d_weight1, d_weight2):
        assert broken(gradient) == [e == expert for e in range(E)]


def test_mlp_of_an_inverse_that_names_no_row(far):
    ops = module_of(EXPERT_MLP, "triton")
    x, weight1, weight2 = torch.ones(B, C, device=DEVICE), torch.ones(E, 8, C), torch.ones(E, C, 8)
    tables = (torch.ones(B, K, device=DEVICE), ROUTE.order.to(DEVICE), wrong(ROUTE.inverse, 3, far))
    relu, offsets = activation_of("relu"), ROUTE.offsets.to(DEVICE)
    y, _ = ops.forward(x, weight1.to(DEVICE), None, weight2.to(DEVICE), None, *tables, offsets, R, relu)
    assert broken(y) == [token == 3 // K for token in range(B)]
