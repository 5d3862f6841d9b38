"""The gradient through a ReLU with two readers, against the operations that it takes the place of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robust_moe_kernels.layout import channels_last
from robust_moe_kernels.ops.expert_block import EXPERT_BLOCK, relu_backward

OP = "expert_block"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = {
    (3, 5, 7, 1): "no whole pack of elements",
    (2, 64, 4, 4): "whole packs, two blocks of a GPU's elements",
    (1, 1, 1, 1): "a single element",
    (0, 3, 2, 2): "an empty batch",
}


def maps(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(d, other, out): what a ReLU gives, with a NaN and both zeros, and what its readers send."""
    d, other, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    out = value.relu()
    if out.numel() > 3:
        out.view(-1)[:3] = torch.tensor([math.nan, 0.0, -0.0])
    return d, other, out


@pytest.mark.parametrize("added", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_pytorchs_operations(target, shape, dtype, added, generator, assert_same_bits):
    if EXPERT_BLOCK.module(target.impl).why_not_case(torch.empty(0, dtype=dtype, device=target.device)) is not None:
        return
    d, other, out = (tensor.to(target.device) for tensor in maps(shape, dtype, generator))
    if target.truncates and dtype == torch.bfloat16:
        other = torch.zeros_like(other)  # sums that need no rounding
    wanted = torch.ops.aten.threshold_backward(d + other if added else d, out, 0)
    assert_same_bits(relu_backward(d, other if added else None, out, target.impl), wanted)


def test_the_layout_is_the_outputs(target, generator, assert_same_bits):
    """Whatever that of the gradients is."""
    d, other, out = (tensor.to(target.device) for tensor in maps((2, 6, 3, 5), torch.float32, generator))
    wanted = relu_backward(d, other, out, target.impl)
    for given in ((channels_last(d), other), (d, channels_last(other)), (d[:, :, :1].expand_as(d), other)):
        for like in (out, channels_last(out)):
            found = relu_backward(*given, like, target.impl)
            assert found.stride() == like.stride()
            if given[0].stride(2) != 0:
                assert_same_bits(found, wanted)


def test_thread_count_changes_no_bit(generator, same_bits_for_any_threads):
    d, other, out = maps((40, 128, 8, 8), torch.float32, generator)
    same_bits_for_any_threads(lambda: relu_backward(d, other, out, "native"))


def test_opcheck(target, generator):
    d, other, out = (tensor.to(target.device) for tensor in maps((2, 3, 4, 5), torch.float32, generator))
    for second in (other, None):
        torch.library.opcheck(relu_backward.default, (d, second, channels_last(out), target.impl))
