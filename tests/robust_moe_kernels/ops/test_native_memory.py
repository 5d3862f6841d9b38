"""Where tensors lie in memory must not matter: 16 bytes are read at once where that is possible, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robust_moe_kernels.ops.apgd import apgd_step, apgd_track
from robust_moe_kernels.ops.attack_step import pgd_step, random_start
from robust_moe_kernels.ops.expert_block import (
    column_sums,
    head_backward,
    head_forward,
    norm_backward,
    scale_shift,
    sum_rows,
)
from robust_moe_kernels.ops.gate import pool_linear, top_k_gate
from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import sort_by_expert

OP = "attack_step"  # whose implementations can run wherever those of the other ops can


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same numbers and strides, ``elements`` further on in memory than an allocation begins."""
    room = tensor.new_empty(tensor.untyped_storage().size() // tensor.element_size() + elements)
    there = room.as_strided(tensor.shape, tensor.stride(), elements)
    return there.copy_(tensor)


def images(generator: torch.Generator) -> list[Tensor]:
    return [torch.rand(5, 3, 8, 4, generator=generator) for _ in range(4)]


def pgd(given: list[Tensor], norm: str, impl: str) -> tuple[Tensor, ...]:
    x, grad, x0, _ = given
    return pgd_step(x, grad - 0.5, x0, 0.1, 0.03, norm, impl), random_start(x0, 0.1, 3, norm=norm, impl=impl)


def apgd(given: list[Tensor], norm: str, impl: str) -> tuple[Tensor, ...]:
    eta = torch.linspace(0.1, 0.3, 5, device=given[0].device)
    return (apgd_step(*given, eta, 0.1, 0.75, norm, impl),)


def track(given: list[Tensor], _: str, impl: str) -> tuple[Tensor, ...]:
    improved = torch.tensor([True, False, True, False, True], device=given[0].device)
    kept = [shifted(tensor, 1) for tensor in given[:3]]
    apgd_track(given[2], given[3], improved, ~improved, *kept, impl)
    return tuple(kept)


def route(device: torch.device, impl: str):
    return sort_by_expert(torch.tensor([[0, 2], [2, 1], [1, 0], [0, 1], [2, 0]], device=device), 3, impl)


def permute(given: list[Tensor], _: str, impl: str) -> tuple[Tensor, ...]:
    where, weights = route(given[0].device, impl), given[1][:, 0, 0, :2].contiguous()
    rows = dispatch(given[0], where, impl)
    there = shifted(rows, 3)
    dot = torch.ops.robust_moe_kernels.row_dot(given[0], there, where.order, where.inverse, 2, impl)
    return rows, combine(there, where, weights, impl), dot


def block(given: list[Tensor], _: str, impl: str) -> tuple[Tensor, ...]:
    where = route(given[0].device, impl)
    x, z, other = (shifted(tensor.contiguous(memory_format=torch.channels_last), 1) for tensor in given[:3])
    z, other = (torch.cat([tensor, tensor.flip(0)]) for tensor in (z, other))
    z, other = (shifted(tensor.contiguous(memory_format=torch.channels_last), 2) for tensor in (z, other))
    scale, shift, p = (shifted(given[3].flatten()[9 * i : 9 * i + 9].view(3, 3) - 0.5, 1) for i in range(3))
    head = (z, scale, shift, x, None, None, where.order, where.inverse, where.offsets, given[1][:, 0, 0, :2])
    return (
        column_sums(z, other, where.offsets, scale, shift, 2, impl).sum(1),
        scale_shift(z, where.offsets, scale, shift, True, impl),
        norm_backward(other, z, where.offsets, p, scale, shift, scale, shift, impl),
        head_forward(*head[:-1], head[-1].contiguous(), impl),
        *head_backward(x, *head[:-1], head[-1].contiguous(), impl),
        sum_rows(z, other, where.inverse, 2, impl),
    )


def gate(given: list[Tensor], _: str, impl: str) -> tuple[Tensor, ...]:
    return tuple(top_k_gate(given[0].flatten(2)[0], 2, impl=impl))[:7]


def pool(given: list[Tensor], _: str, impl: str) -> tuple[Tensor, ...]:
    """24 channels of 20 pixels, in both memory formats, and the gradient in the same."""
    numbers = torch.cat([tensor.flatten() for tensor in given])
    weight, start = numbers[:72].view(3, 24), given[0].storage_offset()
    plain = shifted(numbers[: 2 * 480].view(2, 24, 4, 5), start)
    results = []
    for x in (plain, shifted(plain.contiguous(memory_format=torch.channels_last), start)):
        leaf = x.requires_grad_()
        logits = pool_linear(leaf, weight, None, impl)
        results += [logits.detach(), *torch.autograd.grad(logits.square().sum(), leaf)]
    return tuple(results)


CALLS: dict[str, Callable[[list[Tensor], str, str], tuple[Tensor, ...]]] = {
    "pgd": pgd, "apgd": apgd, "track": track, "permute": permute, "block": block, "gate": gate,
    "pool": pool,
}  # fmt: skip


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", CALLS)
def test_memory_that_begins_anywhere(target, name, norm, generator):
    """One to three floats on from a multiple of 16 bytes: float64 sums in another order move float32's last bit."""
    plain = [tensor.to(target.device) for tensor in images(generator)]
    expected = CALLS[name](plain, norm, target.impl)
    for elements in (1, 2, 3):
        moved = CALLS[name]([shifted(tensor, elements) for tensor in plain], norm, target.impl)
        for got, wanted in zip(moved, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2.4e-7, atol=1.2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2048, 2049])
def test_gates_of_many_rows(target, rows, dtype, generator):
    """Beyond a few thousand rows CUDA spreads them over blocks and adds the blocks' sums."""
    logits = torch.randn(rows, 4, generator=generator).to(dtype)
    got = top_k_gate(logits.to(target.device), 2, impl=target.impl)
    wanted = top_k_gate(logits, 2, impl="reference")
    assert torch.equal(got.indices.cpu(), wanted.indices)
    for name in ("scores", "weights", "mean_scores", "argmax_fraction", "mean_entropy", "mean_square_lse"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(wanted, name), rtol=1e-5, atol=1e-6)
