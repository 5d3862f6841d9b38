"""Global average pool and linear layer as one operation, against NumPy in long double and the gate's own module."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from robust_moe_kernels import FusedBlockMoE
from robust_moe_kernels.layout import channels_last
from robust_moe_kernels.modules import GapFcGate, attack_mode, gates
from robust_moe_kernels.ops.gate import pool_linear

OP = "gate"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    name: str
    batch: int
    channels: int
    size: tuple[int, int]
    experts: int
    reason: str


CASES = (
    Case("odd", 5, 70, (3, 4), 3, "more channels than a tile, no power of two"),
    Case("large_map", 2, 9, (5, 7), 4, "more pixels than a tile"),
    Case("many_experts", 3, 8, (2, 2), 21, "more logits than one program's"),
    Case("one", 1, 1, (1, 1), 1, "a single number"),
    Case("no_rows", 0, 6, (2, 3), 4, "an empty batch"),
)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor

    def to(self, device: str) -> Inputs:
        return Inputs(*(tensor.to(device) for tensor in self))


def inputs_of(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    kind = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = channels_last(drawn(case.batch, case.channels, *case.size)).to(dtype)
    return Inputs(x, drawn(case.experts, case.channels).to(kind), drawn(case.experts).to(kind))


def gradients(inputs: Inputs, upstream: Tensor, impl: str) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(pool_linear(*leaves, impl), leaves, upstream)


def long(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_gradients(rival, case, dtype, generator, assert_as_accurate):
    inputs = inputs_of(case, dtype, generator)
    here = inputs.to(rival.device)
    x, weight, bias = map(long, inputs)
    means = x.mean((2, 3))
    truth = means @ weight.T + bias
    terms = float((np.abs(means) @ np.abs(weight.T)).max(initial=0) + 1)  # of the sums, which may cancel
    reference = pool_linear(*inputs, "reference")
    assert reference.dtype == inputs.weight.dtype
    assert_as_accurate(pool_linear(*here, rival.impl), reference, truth, magnitude=terms)
    upstream = torch.randn(truth.shape, generator=generator, dtype=torch.float64).to(inputs.weight.dtype)
    d = long(upstream)
    pixels = case.size[0] * case.size[1]
    d_x = np.broadcast_to((d @ weight / pixels)[:, :, None, None], x.shape)
    expected = gradients(inputs, upstream, "reference")
    actual = gradients(here, upstream.to(rival.device), rival.impl)
    for got, wanted, true, tensor in zip(actual, expected, (d_x, d.T @ means, d.sum(0)), here, strict=True):
        assert (got.shape, got.dtype) == (tensor.shape, tensor.dtype)
        assert_as_accurate(got, wanted, true, magnitude=float(np.abs(true).max(initial=0) + 4))
    assert actual[0].stride() == here.x.stride() or not case.batch  # no memory, no format


def test_memory_format_and_layout_change_nothing(target, generator):
    inputs = inputs_of(CASES[0], torch.float32, generator).to(target.device)
    wanted = pool_linear(*inputs, target.impl)
    rows = inputs.x.contiguous()
    for x in (rows, rows.repeat_interleave(2, 0)[::2], torch.cat([rows, rows], 3)[..., :4]):
        torch.testing.assert_close(pool_linear(x, *inputs[1:], target.impl), wanted, rtol=1e-6, atol=1e-6)
        (d_x,) = torch.autograd.grad(pool_linear(x.requires_grad_(), *inputs[1:], target.impl).sum(), x)
        assert torch.equal(d_x[0, :, 0, 0], d_x[0, :, 2, 3])
    without = pool_linear(inputs.x, inputs.weight, None, target.impl)
    torch.testing.assert_close(without + inputs.bias, wanted, rtol=1e-6, atol=1e-6)


def test_first_and_second_derivatives(target, generator):
    leaves = [t.requires_grad_() for t in inputs_of(CASES[1], torch.float64, generator).to(target.device)]
    assert torch.autograd.gradcheck(lambda *given: pool_linear(*given, target.impl), leaves)
    assert torch.autograd.gradgradcheck(lambda *given: pool_linear(*given, target.impl), leaves)
    frozen = [leaves[0], *(leaf.detach() for leaf in leaves[1:])]
    assert torch.autograd.gradgradcheck(lambda *given: pool_linear(*given, target.impl).square(), frozen)


def test_opcheck(target, generator):
    inputs = inputs_of(CASES[0], torch.float32, generator).to(target.device)
    ops = torch.ops.robust_moe_kernels
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch.library.opcheck(ops.pool_linear.default, (*leaves, target.impl))
    d_logits = torch.randn(5, 3, generator=generator).to(target.device)
    given = (d_logits, inputs.weight.detach(), 3, 4, True, torch.bfloat16, target.impl)
    torch.library.opcheck(ops.pool_linear_backward.default, given)


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    inputs = inputs_of(CASES[0], torch.float32, generator).to(target.device)
    assert_same_bits(pool_linear(*inputs, target.impl), pool_linear(*inputs, target.impl))


def test_thread_count_changes_no_bit(generator, same_bits_for_any_threads):
    inputs = inputs_of(Case("", 40, 128, (8, 8), 5, ""), torch.float32, generator)
    upstream = torch.randn(40, 5, generator=generator)
    same_bits_for_any_threads(lambda: (pool_linear(*inputs, "native"), gradients(inputs, upstream, "native")[0]))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x: expected shape \[B, C, H, W\] with C, H, W >= 1, got \[2, 3, 4\]"),
        ({"x": torch.zeros(2, 3, 0, 4)}, r"x: expected shape \[B, C, H, W\] with C, H, W >= 1, got \[2, 3, 0, 4\]"),
        ({"weight": torch.zeros(5, 4)}, r"weight: expected shape \[E, 3\] with E >= 1, got \[5, 4\]"),
        ({"weight": torch.zeros(5, 3).half()}, "weight: expected dtype float32 or float64, got float16"),
        ({"bias": torch.zeros(4)}, r"bias: expected shape \[5\] \(\[E\]\), got \[4\]"),
        ({"bias": torch.zeros(5).double()}, "bias: expected dtype float32, got float64"),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_named(changes, error):
    arguments = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(5, 3), "bias": torch.zeros(5)} | changes
    with pytest.raises((TypeError, ValueError), match=error):
        pool_linear(**arguments)


@pytest.fixture
def fused(monkeypatch) -> None:
    """The gate as on a GPU."""
    monkeypatch.setattr(gates, "FUSED", {"cpu", "cuda"})


def step(gate: GapFcGate, x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().clone().requires_grad_()
    logits = gate(leaf)
    upstream = torch.arange(logits.numel(), dtype=logits.dtype, device=logits.device).sin().view_as(logits)
    return (logits.detach(), *torch.autograd.grad(logits, [leaf, *gate.parameters()], upstream))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_the_gate_computes_the_same_either_way(autocast, fused, monkeypatch, generator):
    gate = GapFcGate(12, 4)
    x = channels_last(torch.randn(6, 12, 4, 4, generator=generator))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together = step(gate, x.bfloat16() if autocast else x)
        monkeypatch.setattr(gates, "is_general", lambda: True)
        apart = step(gate, x.bfloat16() if autocast else x)
    assert together[0].dtype == torch.float32
    for got, wanted in zip(together, apart, strict=True):
        assert got.dtype == wanted.dtype
        # the weights' gradient is left to PyTorch, and autocast's then: a product in bfloat16
        bound = 1e-2 if autocast else 2e-6
        torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)


def test_maps_of_another_dtype_are_pooled_without_a_copy(monkeypatch, generator):
    """On a CPU; maps of the gate's own dtype are left to PyTorch there."""
    monkeypatch.setattr(gates, "FUSED", set())
    calls = []
    monkeypatch.setattr(gates, "pool_linear", lambda x, *rest: calls.append(x.dtype) or pool_linear(x, *rest))
    gate, x = GapFcGate(12, 4), torch.randn(6, 12, 4, 4, generator=generator)
    for kind in (torch.bfloat16, torch.float32):
        torch.testing.assert_close(gate(x.to(kind)), gate.fc(x.to(kind).float().mean((2, 3))), rtol=1e-6, atol=1e-6)
    assert calls == [torch.bfloat16]


def test_a_layer_on_the_fused_gate_in_an_attack_and_compiled(fused, generator):
    torch.manual_seed(0)
    layer = FusedBlockMoE.from_block(BasicBlock(8, 8))
    x = torch.randn(6, 8, 4, 4, generator=generator)
    with attack_mode(layer):
        results = []
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_half_precision_gates_stay_pytorchs(fused):
    gate = GapFcGate(8, 3).bfloat16()
    assert gate(torch.randn(2, 8, 4, 4)).dtype == torch.bfloat16
