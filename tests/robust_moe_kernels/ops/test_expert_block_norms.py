"""What the sums of a batch norm become, and the gradient through a block's end in evaluation, against NumPy in long
double and against the operations that they take the place of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_moe_kernels.layout import channels_last
from robust_moe_kernels.ops.expert_block import (
    EXPERT_BLOCK,
    column_sums,
    head_backward,
    head_norm_backward,
    norm_backward,
    norm_finalise,
    norm_finalise_backward,
    share_count,
    sum_rows,
)

OP = "expert_block"
EPS, MOMENTUM = 1e-3, 0.1
DTYPES = (torch.float32, torch.float64)


class Case(NamedTuple):
    name: str
    counts: tuple[int, ...]  # rows of each expert
    channels: int
    size: tuple[int, int]
    shares: int
    reason: str


CASES = (
    Case("ragged", (3, 0, 1, 4), 5, (3, 4), 1, "experts with 0 and 1 rows"),
    Case("shares", (9, 40, 0), 131, (2, 2), 4, "more than a program's norms, sums in shares"),
    Case("single_values", (1, 2, 1), 3, (1, 1), 2, "one value a channel: no deviation"),
    Case("no_rows", (0, 0), 2, (2, 2), 3, "an empty batch moves nothing"),
)


class Norm(NamedTuple):
    """A batch norm of rows z and the gradient after it."""

    z: Tensor
    d: Tensor
    offsets: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    tracked: Tensor

    def to(self, device: str) -> Norm:
        return Norm(*(tensor.to(device) for tensor in self))


def norm_of(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Norm:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    experts, rows = len(case.counts), sum(case.counts)
    maps = [channels_last(drawn(rows, case.channels, *case.size) + 2).to(dtype) for _ in range(2)]
    tables = [drawn(experts, case.channels).to(dtype) for _ in range(4)]
    offsets = torch.tensor([0, *case.counts]).cumsum(0)
    return Norm(*maps, offsets, *tables[:3], tables[3].abs() + 0.5, torch.arange(experts))


def finalised(norm: Norm, case: Case, impl: str, momentum: float = MOMENTUM) -> tuple[Tensor, ...]:
    shares = column_sums(norm.z, norm.z, norm.offsets, None, None, case.shares, impl)
    pixels = case.size[0] * case.size[1]
    return norm_finalise(shares, norm.offsets, pixels, *norm[3:], EPS, momentum, impl)


def backward(norm: Norm, case: Case, impl: str, training: bool) -> list[Tensor]:
    """From tables that are the reference's, so that only this operation differs."""
    on_cpu = norm.to("cpu")
    scale, _, mean, rstd = (table.to(norm.z.device) for table in finalised(on_cpu, case, "reference")[:4])
    shares = column_sums(norm.d, norm.z, norm.offsets, None, None, case.shares, impl)
    pixels = case.size[0] * case.size[1]
    return norm_finalise_backward(shares, norm.offsets, pixels, scale, mean, rstd, training, impl)


def long(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def oracle(norm: Norm, case: Case) -> tuple[np.ndarray, ...]:
    """Each expert's batch norm by its definition, on its own rows."""
    z, weight, bias, running_mean, running_var = map(long, (norm.z, *norm[3:7]))
    mean, rstd = np.zeros_like(weight), np.zeros_like(weight)
    next_mean, next_var = running_mean.copy(), running_var.copy()
    ends = np.cumsum((0, *case.counts))
    for e, rows in enumerate(case.counts):
        values = z[ends[e] : ends[e + 1]].transpose(1, 0, 2, 3).reshape(case.channels, -1)
        count = values.shape[1]
        variance = np.zeros(case.channels, np.longdouble)
        if count:
            mean[e], variance = values.mean(1), values.var(1)
            next_mean[e] += MOMENTUM * (mean[e] - running_mean[e])
        if count > 1:
            next_var[e] += MOMENTUM * (variance * count / (count - 1) - running_var[e])
        rstd[e] = 0 if count == 1 else 1 / np.sqrt(variance + EPS)
        assert count == rows * case.size[0] * case.size[1]
    return weight * rstd, bias - mean * weight * rstd, mean, rstd, next_mean, next_var


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_finalise_is_the_batch_norm_of_each_experts_rows(target, case, dtype, generator):
    """Sums in float64, so what is left in float32 is each result's own rounding, and two of moving a statistic; a
    difference of float64 sums of numbers around 2 costs some 1e-15 of their square, 1e-12 of the deviation squared."""
    norm = norm_of(case, dtype, generator)
    *actual, tracked = finalised(norm.to(target.device), case, target.impl)
    u = torch.finfo(dtype).eps
    for got, wanted in zip(actual, oracle(norm, case), strict=True):
        assert got.dtype == dtype
        size = np.abs(wanted) + np.abs(long(norm.bias))
        assert (np.abs(long(got) - wanted) <= (4 * u + 1e-11) * size).all()
    assert tracked.tolist() == [before + (rows > 0) for before, rows in enumerate(case.counts)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_autograds(target, case, generator):
    """Against autograd through PyTorch's own batch norm of each expert's rows, in float64."""
    norm = norm_of(case, torch.float32, generator)
    pixels = case.size[0] * case.size[1]
    d_weight, d_bias, q, r = (t.double().cpu() for t in backward(norm.to(target.device), case, target.impl, True))
    scale, *_ = (table.double() for table in finalised(norm, case, "reference"))
    ends = np.cumsum((0, *case.counts))
    for e, rows in enumerate(case.counts):
        if rows * pixels == 1:
            assert not q[e].any()  # no deviation, no gradient
            continue
        part = slice(ends[e], ends[e + 1])
        z = norm.z[part].double().requires_grad_()
        weight, bias = (table[e].double().requires_grad_() for table in (norm.weight, norm.bias))
        if not rows:
            assert not d_weight[e].any() and not d_bias[e].any()
            continue
        out = torch.nn.functional.batch_norm(z, None, None, weight, bias, True, 0.0, EPS)
        d = norm.d[part].double()
        wanted = torch.autograd.grad(out, (z, weight, bias), d)
        d_z = scale[e, :, None, None] * d + q[e, :, None, None] * z + r[e, :, None, None]
        for got, true in zip((d_z, d_weight[e], d_bias[e]), wanted, strict=True):
            # float32 tables: a few roundings of the largest terms, which are summed over the pixels in d_weight
            terms = 1 + float(d.abs().max()) * (1 if got.dim() > 1 else rows * pixels)
            torch.testing.assert_close(got, true.detach(), rtol=1e-5, atol=4e-6 * terms)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_the_reference(rival, case, generator):
    """float32 results to the last place but one: only how a statistic is moved may round once or twice."""
    norm = norm_of(case, torch.float32, generator)
    here = norm.to(rival.device)
    for momentum in (0.1, 0.9, 1.0):
        for got, wanted in zip(
            finalised(here, case, rival.impl, momentum), finalised(norm, case, "reference", momentum), strict=True
        ):
            torch.testing.assert_close(got.cpu(), wanted, rtol=2.5e-7, atol=1e-7)
    for training in (True, False):
        got = backward(here, case, rival.impl, training)
        wanted = backward(norm, case, "reference", training)
        assert len(got) == len(wanted) == (4 if training else 2)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2.5e-7, atol=1e-6)


def test_the_native_finalise_has_the_bits_of_pytorch(generator, assert_same_bits):
    """Whole vectors of channels, so that torch.lerp rounds its product and sum once, as the native code does."""
    case = Case("", (3, 2, 5), 64, (4, 4), 1, "")
    norm = norm_of(case, torch.float32, generator)
    shares = column_sums(norm.z, norm.z, norm.offsets, None, None, 1, "native")
    for momentum in (0.1, 0.9):
        results = [
            norm_finalise(shares, norm.offsets, 16, *norm[3:], EPS, momentum, i) for i in ("native", "reference")
        ]
        assert_same_bits(*results)
    tables = results[0][0], results[0][2], results[0][3]
    results = [
        tuple(norm_finalise_backward(shares, norm.offsets, 16, *tables, True, i)) for i in ("native", "reference")
    ]
    assert_same_bits(*results)


class Head(NamedTuple):
    d_out: Tensor
    z: Tensor
    scale: Tensor
    shift: Tensor
    x: Tensor
    skip_scale: Tensor | None
    skip_shift: Tensor | None
    order: Tensor
    inverse: Tensor
    offsets: Tensor
    weights: Tensor


def head(generator: torch.Generator, normed: bool, device: str, dtype: torch.dtype = torch.float32) -> Head:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    offsets, order = torch.tensor([0, 3, 3, 5, 10]), torch.randperm(10, generator=generator)
    d_out, x, z, other = (channels_last(drawn(n, 130, 3, 4)).to(device, dtype) for n in (5, 5, 10, 10))
    scale, shift, skip_scale, skip_shift = drawn(4, 4, 130).to(device)
    skip = (other, skip_scale, skip_shift) if normed else (x, None, None)
    where = (order.to(device), order.argsort().to(device), offsets.to(device))
    return Head(d_out, z, scale, shift, *skip, *where, drawn(5, 2).to(device))


@pytest.mark.parametrize("normed", [False, True], ids=["identity", "normed"])
def test_through_the_end_and_its_norms_at_once(target, normed, generator, assert_same_bits):
    """The same bits in float32 as one after the other."""
    case = head(generator, normed, target.device)
    d_rows, d_weights = head_backward(*case, target.impl)
    maps = [norm_backward(d_rows, case.z, case.offsets, case.scale, None, None, None, None, target.impl), d_rows]
    if normed:
        maps[1] = norm_backward(d_rows, case.z, case.offsets, case.skip_scale, None, None, None, None, target.impl)
    assert maps[0].abs().sum() > 0
    assert_same_bits(head_norm_backward(*case, target.impl), (*maps, d_weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sum_rows(target, dtype, generator, assert_same_bits):
    rows, other = (channels_last(torch.randn(9, 7, 5, 6, generator=generator).to(dtype)) for _ in range(2))
    inverse = torch.randperm(9, generator=generator)
    got = sum_rows(rows.to(target.device), other.to(target.device), inverse.to(target.device), 3, target.impl).cpu()
    wanted = (rows.double() + other.double())[inverse].unflatten(0, (3, 3)).sum(1)
    bound = (
        6 * torch.finfo(dtype).eps * (rows.double().abs() + other.double().abs())[inverse].unflatten(0, (3, 3)).sum(1)
    )
    assert ((got.double() - wanted).abs() <= bound).all()
    if dtype == torch.float32 and target.device == "cpu":
        assert_same_bits(got, sum_rows(rows, other, inverse, 3, "reference"))


def test_shares_are_for_gpus():
    offsets = torch.arange(5)
    assert share_count(torch.empty(256, 512, 4, 4), offsets) == 1
    assert share_count(torch.empty(256, 512, 4, 4, device="meta"), offsets) == 16  # 1024 pixels an expert, 64 a share
    assert share_count(torch.empty(4096, 512, 4, 4, device="meta"), offsets) == 33  # 16 programs, of 528
    assert share_count(torch.empty(2**16, 64, 4, 4, device="meta"), offsets) == 64
    assert share_count(torch.empty(0, 512, 4, 4, device="meta"), offsets) == 1


def test_thread_count_changes_no_bit(generator, same_bits_for_any_threads):
    rows, other = (channels_last(torch.randn(40, 128, 8, 8, generator=generator)) for _ in range(2))
    inverse = torch.randperm(40, generator=generator)
    same_bits_for_any_threads(lambda: sum_rows(rows, other, inverse, 2, "native"))


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    case = CASES[1]
    norm = norm_of(case, torch.float32, generator).to(target.device)
    assert_same_bits(finalised(norm, case, target.impl), finalised(norm, case, target.impl))


def test_opcheck(target, generator):
    case = CASES[0]
    norm = norm_of(case, torch.float32, generator).to(target.device)
    shares = column_sums(norm.z, norm.z, norm.offsets, None, None, 2, target.impl)
    scale, _, mean, rstd, *_ = finalised(norm, case, target.impl)
    arguments = {
        norm_finalise: (shares, norm.offsets, 12, *norm[3:], EPS, MOMENTUM),
        norm_finalise_backward: (shares, norm.offsets, 12, scale, mean, rstd, True),
        head_norm_backward: head(generator, True, target.device),
        sum_rows: (norm.z, norm.d, torch.arange(8, device=target.device), 2),
    }
    for op, given in arguments.items():
        torch.library.opcheck(op.default, (*given, target.impl))


@pytest.mark.skipif(EXPERT_BLOCK.why_not("native", "cpu") is not None, reason="needs the compiled extension")
def test_native_counts_do_not_overflow(generator):
    """Rows times pixels is beyond 64 bits; found by the fuzzer under the sanitizer."""
    shares = torch.rand(2, 1, 1, 5, generator=generator, dtype=torch.float64) * 1e19
    tables = [torch.rand(1, 5, generator=generator) for _ in range(4)]
    rest = (torch.tensor([0, 2**61]), 12, *tables, torch.tensor([3]), EPS, MOMENTUM)
    for got, wanted in zip(
        norm_finalise(shares, *rest, "native"), norm_finalise(shares, *rest, "reference"), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=2.5e-7, atol=0)
