"""Batch norm per expert, ReLU, skip and weighted sum between the convolutions, against loops over rows in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from robust_moe_kernels.dispatch import ImplementationUnavailable
from robust_moe_kernels.layout import channels_last
from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.expert_block import (
    EXPERT_BLOCK,
    column_sums,
    head_backward,
    head_forward,
    head_norm_backward,
    norm_backward,
    scale_shift,
    sum_rows,
)

OP = "expert_block"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHARES = 6
triton_kernels = pytest.importorskip("robust_moe_kernels.ops.expert_block.triton_kernels")
triton_norms = pytest.importorskip("robust_moe_kernels.ops.expert_block.triton_norms")


class Case(NamedTuple):
    name: str
    counts: tuple[int, ...]  # rows of each expert
    top_k: int
    channels: int
    size: tuple[int, int]
    reason: str


CASES = (
    Case("ragged", (3, 0, 1, 4), 2, 5, (3, 4), "experts with 0 and 1 rows, H != W"),
    Case("blocks", (4, 2), 2, 131, (5, 4), "more channels and pixels than a program's tile"),
    Case("one_element", (1, 2), 1, 1, (1, 1), "a single element a row, k = 1"),
    Case("shares", (60, 30), 3, 3, (3, 3), "sums in several shares"),
    Case("many_experts", (0,) * 16 + (1, 2, 1), 2, 2, (2, 1), "more experts than one block of offsets"),
    Case("wide_shares", (10, 28, 0), 2, 520, (4, 4), "several shares of more channels than a native task sums"),
    Case("no_rows", (0, 0), 2, 3, (2, 2), "an empty batch"),
)


class Inputs(NamedTuple):
    z: Tensor  # [R, C, H, W]
    other: Tensor  # the same
    x: Tensor  # [B, C, H, W]
    d_out: Tensor  # the same
    tables: Tensor  # [5, E, C] in the accumulation type
    weights: Tensor  # [B, k] in the accumulation type
    offsets: Tensor
    order: Tensor
    inverse: Tensor

    def to(self, device: str) -> Inputs:
        return Inputs(*(tensor.to(device) for tensor in self))


def inputs_of(case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Inputs:
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    rows, experts = sum(case.counts), len(case.counts)
    batch = rows // case.top_k

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps = [channels_last(drawn(n, case.channels, *case.size)).to(dtype) for n in (rows, rows, batch, batch)]
    tables, weights = drawn(5, experts, case.channels).to(kind), drawn(batch, case.top_k).to(kind)
    order = torch.randperm(rows, generator=generator)
    return Inputs(*maps, tables, weights, torch.tensor([0, *case.counts]).cumsum(0), order, order.argsort())


def head(inputs: Inputs, normed: bool) -> tuple[Tensor | None, ...]:
    """The arguments that head_forward and head_backward share."""
    scale, shift, skip_scale, skip_shift, _ = inputs.tables
    skip = (inputs.other, skip_scale, skip_shift) if normed else (inputs.x, None, None)
    return (inputs.z, scale, shift, *skip, inputs.order, inputs.inverse, inputs.offsets, inputs.weights)


def added(shares: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of column_sums: its shares in order."""
    total = shares[:, 0]
    for share in shares.unbind(1)[1:]:
        total = total + share
    return total[0], total[1]


CALLS: dict[str, Callable[[Inputs, str], Tensor | tuple[Tensor, ...]]] = {
    "sums": lambda i, impl: added(column_sums(i.z, i.z, i.offsets, None, None, SHARES, impl)),
    "masked_sums": lambda i, impl: added(column_sums(i.other, i.z, i.offsets, i.tables[0], i.tables[1], SHARES, impl)),
    "scale_shift": lambda i, impl: scale_shift(i.z, i.offsets, i.tables[0], i.tables[1], False, impl),
    "relu": lambda i, impl: scale_shift(i.z, i.offsets, i.tables[0], i.tables[1], True, impl),
    "scaled": lambda i, impl: norm_backward(i.other, i.z, i.offsets, i.tables[2], None, None, None, None, impl),
    "centered": lambda i, impl: norm_backward(i.other, i.z, i.offsets, *i.tables[2:], None, None, impl),
    "masked": lambda i, impl: norm_backward(i.other, i.z, i.offsets, *i.tables[2:], *i.tables[:2], impl),
    "head": lambda i, impl: head_forward(*head(i, False), impl),
    "normed_head": lambda i, impl: head_forward(*head(i, True), impl),
    "head_back": lambda i, impl: head_backward(i.d_out, *head(i, False), impl),
    "normed_head_back": lambda i, impl: head_backward(i.d_out, *head(i, True), impl),
}
EXACT = ("scale_shift", "relu", "scaled", "centered", "masked")


def oracle(name: str, case: Case, inputs: Inputs) -> tuple[np.ndarray, ...]:
    """Loops over rows in long double. Whether a ReLU lets through is decided in the accumulation type, as specified."""
    z, other, x, d_out, tables, weights = (t.double().numpy().astype(np.longdouble) for t in inputs[:6])
    expert = np.repeat(np.arange(len(case.counts)), case.counts)
    kind = np.float64 if inputs.weights.dtype == torch.float64 else np.float32
    order, top_k = inputs.order.tolist(), case.top_k

    def table(i: int, e: int) -> np.ndarray:
        return tables[i, e][:, None, None]

    def is_open(r: int) -> np.ndarray:
        return z[r].astype(kind) * table(0, expert[r]).astype(kind) + table(1, expert[r]).astype(kind) > 0

    if "sums" in name:
        sums, products = np.zeros((2, *inputs.tables.shape[1:]), np.longdouble)
        for r, e in enumerate(expert):
            value = np.where(is_open(r), other[r], 0) if name == "masked_sums" else z[r]
            sums[e] += value.sum((1, 2))
            products[e] += (value * z[r]).sum((1, 2))
        return sums, products
    rows = np.zeros_like(z)
    for r, e in enumerate(expert):
        if name in ("scale_shift", "relu"):
            rows[r] = z[r] * table(0, e) + table(1, e)
        elif name in ("scaled", "centered", "masked"):
            rows[r] = table(2, e) * (np.where(is_open(r), other[r], 0) if name == "masked" else other[r])
            rows[r] += 0 if name == "scaled" else table(3, e) * z[r] + table(4, e)
        else:
            skip = other[r] * table(2, e) + table(3, e) if "normed" in name else x[order[r] // top_k]
            rows[r] = z[r] * table(0, e) + table(1, e) + skip
    if name in EXACT:
        return (np.maximum(rows, 0) if name == "relu" else rows,)
    rows = np.maximum(rows, 0)
    out, d_rows, d_weights = np.zeros_like(x), np.zeros_like(z), np.zeros_like(weights)
    for r, pair in enumerate(order):
        sample, slot = divmod(pair, top_k)
        out[sample] += weights[sample, slot] * rows[r]
        d_rows[r] = np.where(rows[r] > 0, weights[sample, slot] * d_out[sample], 0)
        d_weights[sample, slot] = (rows[r] * d_out[sample]).sum()
    return (d_rows, d_weights) if "back" in name else (out,)


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_oracle(target, case, dtype, generator, assert_same_bits):
    """Each result within the roundings on its way: at most seven in the accumulation type, of terms that are no larger
    than ``size``, then one in its own. What only multiplies and adds equals the reference to the bit in float32."""
    inputs = inputs_of(case, generator, dtype)
    here = inputs.to(target.device)
    magnitude = max((float(t.abs().max()) for t in inputs[:6] if t.numel()), default=0.0)
    for name, call in CALLS.items():
        results = as_tuple(call(here, target.impl))
        for actual, truth in zip(results, oracle(name, case, inputs), strict=True):
            terms = 4 + 3 * case.top_k
            if actual.shape != inputs.z.shape and actual.shape != inputs.x.shape:  # sums over pixels, in float64
                terms = 4 * max(case.counts) * case.size[0] * case.size[1] * max(1, actual.shape != here.weights.shape)
                terms = max(terms, 4 * inputs.z[0:1].numel())
            u = torch.finfo(inputs.weights.dtype).eps
            size = magnitude**3 * (terms if actual.shape != inputs.z.shape else 4)
            error = np.abs(actual.cpu().double().numpy().astype(np.longdouble) - truth)
            allowed = 7 * u * size + torch.finfo(actual.dtype).eps * np.abs(truth)
            assert actual.shape == truth.shape
            assert (error <= allowed + torch.finfo(actual.dtype).tiny).all(), (name, float(error.max()))
        if dtype == torch.float32 and name in EXACT and target.device == "cpu" and target.impl == "triton":
            assert_same_bits(results, as_tuple(call(inputs, "reference")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_as_accurate_as_the_reference(rival, name, dtype, generator, assert_as_accurate):
    case = CASES[0]
    inputs = inputs_of(case, generator, dtype)
    actual, reference = (
        as_tuple(CALLS[name](i, impl)) for i, impl in ((inputs.to(rival.device), rival.impl), (inputs, "reference"))
    )
    for got, wanted, truth in zip(actual, reference, oracle(name, case, inputs), strict=True):
        assert_as_accurate(got, wanted, truth)


@pytest.mark.skipif(EXPERT_BLOCK.why_not("native", "cpu") is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_half_precision_is_float32s_result_rounded_once(case, dtype, generator, assert_same_bits):
    """To the bit, on the same numbers: maps rounded by PyTorch, everything else unrounded. With zeros, numbers below
    the smallest normal one and numbers that overflow among them."""
    inputs = inputs_of(case, generator)
    inputs = Inputs(*(t.to(dtype) if t.dim() == 4 else t for t in inputs))
    for tensor in (inputs.z, inputs.d_out):
        tensor[:, 0] *= torch.tensor([0.0, 1e-7, 6e4])[torch.arange(tensor.shape[0]) % 3, None, None].to(dtype)
    wide = Inputs(*(t.float() if t.dim() == 4 else t for t in inputs))
    calls = CALLS | {
        "through_norms": lambda i, impl: head_norm_backward(i.d_out, *head(i, False), impl),
        "normed_through_norms": lambda i, impl: head_norm_backward(i.d_out, *head(i, True), impl),
        "sum_rows": lambda i, impl: sum_rows(i.z, i.other, i.inverse, case.top_k, impl),
    }
    for call in calls.values():
        results = as_tuple(call(inputs, "native"))
        wanted = (t.to(dtype) if t.dim() == 4 else t for t in as_tuple(call(wide, "native")))
        assert_same_bits(results, tuple(wanted))


def test_the_native_block_refuses_maps_of_two_dtypes(generator):
    inputs = inputs_of(CASES[0], generator)
    mixed = inputs._replace(other=inputs.other.bfloat16())
    with pytest.raises(ImplementationUnavailable, match="the native block computes maps of one dtype"):
        CALLS["scaled"](mixed, "native")


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    inputs = inputs_of(CASES[3], generator).to(target.device)
    for call in CALLS.values():
        assert_same_bits(call(inputs, target.impl), call(inputs, target.impl))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_changes_no_bit(dtype, generator, same_bits_for_any_threads):
    """40 rows of 8192 elements: enough for several threads in each kernel."""
    inputs = inputs_of(Case("", (25, 0, 15), 2, 128, (8, 8), ""), generator, dtype)
    same_bits_for_any_threads(lambda: tuple(CALLS[name](inputs, "native") for name in CALLS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_not_hidden_by_the_relu(target, dtype, generator):
    inputs = inputs_of(CASES[0], generator, dtype)
    inputs.z[0, 0, 0, 0] = float("nan")
    here = inputs.to(target.device)
    assert CALLS["relu"](here, target.impl)[0, 0, 0, 0].isnan()
    sample = inputs.order[0].item() // CASES[0].top_k
    assert CALLS["head"](here, target.impl)[sample, 0, 0, 0].isnan()


def test_any_memory_format_of_the_maps(target, generator, assert_same_bits):
    inputs = inputs_of(CASES[0], generator).to(target.device)
    planes = Inputs(*(tensor.contiguous() for tensor in inputs))
    for call in CALLS.values():
        assert_same_bits(call(planes, target.impl), call(inputs, target.impl))


def test_opcheck(target, generator):
    inputs = inputs_of(Case("", (2, 0, 2), 2, 3, (2, 2), ""), generator).to(target.device)
    z, other, offsets, tables = inputs.z, inputs.other, inputs.offsets, inputs.tables
    arguments = {
        column_sums: (other, z, offsets, tables[0], tables[1], SHARES),
        scale_shift: (z, offsets, tables[0], tables[1], True),
        norm_backward: (other, z, offsets, *tables[2:], None, None),
        head_forward: head(inputs, True),
        head_backward: (inputs.d_out, *head(inputs, False)),
    }
    for op, given in arguments.items():
        torch.library.opcheck(op.default, (*given, target.impl))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nothing_is_read_from_the_gpu(impl, generator, monkeypatch):
    """Fake CUDA tensors have no values: whatever the host needed from them would raise."""
    module = EXPERT_BLOCK.module(impl)
    if impl == "triton":
        launch = type("Launch", (), {"__getitem__": lambda self, grid: lambda *_args, **_options: None})()
        for name in (*triton_kernels.__all__, *triton_norms.__all__):
            monkeypatch.setattr(module, name, launch)
        monkeypatch.setattr(module, "on_device", lambda _: nullcontext())
    real = inputs_of(CASES[0], generator)
    with FakeTensorMode() as mode:
        i = Inputs(*(mode.from_tensor(tensor).to("cuda") for tensor in real))
        tables = tuple(i.tables.unbind(0))
        results = (
            module.column_sums(i.z, i.other, i.offsets, *tables[:2], SHARES),
            module.scale_shift(i.z, i.offsets, *tables[:2], True),
            module.norm_backward(i.other, i.z, i.offsets, *tables[2:], *tables[:2]),
            module.head_forward(*head(i._replace(tables=tables), True)),
            *module.head_backward(i.d_out, *head(i._replace(tables=tables), False)),
        )
    assert {result.device.type for result in results} == {"cuda"}


def test_is_in_the_table():
    assert OPS[OP] is EXPERT_BLOCK
