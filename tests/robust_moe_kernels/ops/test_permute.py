"""Dispatch and combine against loops over pairs in NumPy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.permute import PERMUTE, combine, dispatch
from robust_moe_kernels.ops.routing import Route, sort_by_expert

OP = "permute"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    name: str
    batch: int
    shape: tuple[int, ...]  # of one sample
    experts: int
    top_k: int
    reason: str


CASES = (
    Case("empty_batch", 0, (3, 2, 2), 4, 2, "nothing to launch, shapes still right"),
    Case("one_row", 1, (3, 4, 4), 4, 2, "the smallest batch"),
    Case("one_element", 5, (1,), 4, 2, "D = 1: one element a row"),
    Case("empty_maps", 4, (0, 2), 3, 2, "D = 0: rows without elements"),
    Case("one_expert", 6, (2, 3, 3), 1, 1, "E = k = 1: a copy"),
    Case("all_chosen", 4, (2, 2, 2), 3, 3, "k = E: the longest sum"),
    Case("prime", 11, (3, 5, 7), 7, 3, "odd everything: 105 elements a row"),
    Case("blocks", 3, (1025,), 4, 2, "one element more than a block: of 1024 in Triton, two of 512 in C++"),
    Case("few_rows", 2, (8, 2, 2), 9, 2, "more experts than rows: most have none"),
    Case("three_dimensions", 4, (3, 5), 4, 2, "sequences [B, C, T]"),
    Case("five_dimensions", 3, (2, 2, 3, 2), 4, 2, "videos [B, C, T, H, W]"),
)


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def move(route: Route, device: str) -> Route:
    return Route(*(part.to(device) for part in route[:5]), route.top_k)


class Inputs(NamedTuple):
    x: Tensor  # [B, ...]
    y: Tensor  # [R, ...]
    weights: Tensor  # [B, k] in the accumulation type
    route: Route

    def to(self, device: str) -> Inputs:
        return Inputs(self.x.to(device), self.y.to(device), self.weights.to(device), move(self.route, device))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs_of(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    indices = torch.rand(case.batch, case.experts, generator=generator).argsort(1)[:, : case.top_k].contiguous()
    route = sort_by_expert(indices, case.experts, "reference")

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, y = drawn(case.batch, *case.shape), drawn(case.batch * case.top_k, *case.shape)
    return Inputs(x.to(dtype), y.to(dtype), drawn(case.batch, case.top_k).to(accumulator(dtype)), route)


def long_double(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(np.longdouble)


def oracle_dispatch(x: Tensor, weights: Tensor | None, route: Route) -> np.ndarray:
    samples = long_double(x)
    rows = np.zeros((route.order.numel(), *samples.shape[1:]), np.longdouble)
    for row, pair in enumerate(route.order.tolist()):
        sample, slot = divmod(pair, route.top_k)
        rows[row] = samples[sample] * (1 if weights is None else np.longdouble(weights[sample, slot].item()))
    return rows


def oracle_combine(y: Tensor, weights: Tensor, route: Route) -> np.ndarray:
    rows = long_double(y)
    out = np.zeros((weights.shape[0], *rows.shape[1:]), np.longdouble)
    for row, pair in enumerate(route.order.tolist()):
        sample, slot = divmod(pair, route.top_k)
        out[sample] += np.longdouble(weights[sample, slot].item()) * rows[row]
    return out


def oracle_row_dot(x: Tensor, y: Tensor, route: Route) -> np.ndarray:
    samples, rows = long_double(x), long_double(y)
    out = np.zeros((samples.shape[0], route.top_k), np.longdouble)
    for row, pair in enumerate(route.order.tolist()):
        sample, slot = divmod(pair, route.top_k)
        out[sample, slot] = (samples[sample] * rows[row]).sum()
    return out


def rows_and_weights(inputs: Inputs) -> tuple[Tensor, Route, Tensor]:
    return inputs.y, inputs.route, inputs.weights


def row_dot(inputs: Inputs, impl: str) -> Tensor:
    route = inputs.route
    return torch.ops.robust_moe_kernels.row_dot(inputs.x, inputs.y, route.order, route.inverse, route.top_k, impl)


def weighted_dispatch(inputs: Inputs, impl: str) -> Tensor:
    route, ops = inputs.route, torch.ops.robust_moe_kernels
    return ops.dispatch(inputs.x, route.order, route.inverse, inputs.weights, route.top_k, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dispatch_copies_bits(target, case, dtype, generator, assert_same_bits):
    inputs = inputs_of(case, dtype, generator)
    rows = dispatch(inputs.x.to(target.device), move(inputs.route, target.device), target.impl)
    expected = torch.from_numpy(oracle_dispatch(inputs.x, None, inputs.route).astype(np.float64)).to(dtype)
    assert_same_bits(rows.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_combine_is_the_slot_order_sum_to_the_bit(target, case, dtype, generator, assert_same_bits):
    """Each product and each sum rounds once, in slot order, nothing contracted: NumPy does the same by hand."""
    inputs = inputs_of(case, dtype, generator)
    here = inputs.to(target.device)
    out = combine(here.y, here.route, here.weights, target.impl)
    rows, weights = inputs.y.numpy(), inputs.weights.numpy()
    expected = np.zeros((case.batch, *case.shape), rows.dtype)
    for sample in range(case.batch):
        slots = inputs.route.inverse[sample * case.top_k : (sample + 1) * case.top_k].tolist()
        total = weights[sample, 0] * rows[slots[0]]
        for slot, row in enumerate(slots[1:], 1):
            total = total + weights[sample, slot] * rows[row]
        expected[sample] = total
    assert_same_bits(out.cpu(), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_oracle(target, case, dtype, generator, assert_as_accurate, assert_same_bits):
    """Combine, weighted dispatch (combine's gradient) and row_dot (the weights' gradient)."""
    inputs = inputs_of(case, dtype, generator)
    here = inputs.to(target.device)
    x, y, weights, route = inputs
    pairs = (
        (combine(here.y, here.route, here.weights, target.impl), combine(y, route, weights, "reference")),
        (weighted_dispatch(here, target.impl), weighted_dispatch(inputs, "reference")),
        (row_dot(here, target.impl), row_dot(inputs, "reference")),
    )
    truths = (oracle_combine(y, weights, route), oracle_dispatch(x, weights, route), oracle_row_dot(x, y, route))
    # Products of a sum that may cancel: the unit is that of the largest term.
    largest = float(np.abs(long_double(weights)).max(initial=0)) * float(np.abs(long_double(y)).max(initial=0))
    dots = float(oracle_row_dot(x.abs(), y.abs(), route).max(initial=0))
    for (actual, reference), truth, terms in zip(pairs, truths, (largest, None, dots), strict=True):
        assert_as_accurate(actual, reference, truth, terms)
        if target.impl == "reference":  # alone against the truth: k products and sums, then the stored dtype
            units = (2 * case.top_k + 1) * torch.finfo(actual.dtype).eps
            magnitude = np.abs(truth).max(initial=0) if terms is None else terms
            assert np.abs(long_double(actual) - truth).max(initial=0) <= units * magnitude
        elif not target.truncates and actual.dtype in (torch.float16, torch.bfloat16):
            assert_same_bits(actual.cpu(), reference)  # rounded once, to nearest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_on_one_expert(target, dtype, generator, assert_same_bits):
    """The routing of a collapsed gate is the identity; so are dispatch, and combine with weights of one."""
    x = torch.randn(5, 3, 4, 4, generator=generator).to(dtype).to(target.device)
    route = move(sort_by_expert(torch.full((5, 1), 2), 4), target.device)
    rows = dispatch(x, route, target.impl)
    assert_same_bits(rows, x)
    assert_same_bits(combine(rows, route, torch.ones(5, 1, device=target.device), target.impl), x)


def test_signed_zero_and_nan_pass_through(target, assert_same_bits):
    """A NaN weight or element reaches its own sample only; 1 * -0.0 stays -0.0, as in a plain sum."""
    y = torch.tensor([[-0.0, 1.0], [-0.0, 2.0], [float("nan"), 3.0], [4.0, float("inf")]], device=target.device)
    route = move(sort_by_expert(torch.tensor([[0, 1], [0, 1]]), 2), target.device)  # rows: samples 0, 1, 0, 1
    out = combine(y, route, torch.ones(2, 2, device=target.device), target.impl)
    assert out[0].isnan().tolist() == [True, False]
    assert out[1].tolist() == [4.0, float("inf")]
    y[2:] = -0.0
    out = combine(y, route, torch.ones(2, 2, device=target.device), target.impl)
    assert torch.signbit(out[:, 0]).tolist() == [True, True]
    assert out[:, 1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_survives(target, dtype, assert_same_bits):
    """All 65536 patterns: loaded, multiplied in float32 and stored again, subnormals, infinities and NaN included."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for scale in (1.0, -1.0, 1 / 3, 1.0009765625, 3.0e-5, 7.0e4):
        weights = torch.full((1, 1), scale)
        route = sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 1)
        inputs = Inputs(numbers[None], numbers[None], weights, route).to(target.device)
        expected = (scale * torch.ones(1) * numbers.float()).to(dtype)
        rows, out = weighted_dispatch(inputs, target.impl)[0].cpu(), combine(*rows_and_weights(inputs), target.impl)
        for actual in (rows, out[0].cpu()):
            assert torch.equal(actual.isnan(), expected.isnan())
            compare = ~expected.isnan()
            if target.truncates and dtype == torch.bfloat16:
                # The interpreter flushes bfloat16 subnormals to zero, and is one unit off where it truncates: in the
                # order of the bits, a neighbour.
                smallest = torch.finfo(dtype).smallest_normal
                compare &= (numbers.abs() >= smallest) & (expected.float().abs() > smallest)
                steps = actual.view(torch.int16).int() - expected.view(torch.int16).int()
                assert steps[compare].abs().max() <= (0 if abs(scale) == 1 else 1)
            else:
                assert_same_bits(actual[compare], expected[compare])


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "every_other": lambda t: t.repeat_interleave(2, 0)[::2],
    "channel_slice": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "offset_storage": lambda t: torch.cat([t[:1], t])[1:],
    "expanded": lambda t: t[:1, :, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_formats(target, layout, generator, assert_same_bits):
    """Any strides give the same numbers; channels-last comes back channels-last, with its gradients."""
    case = Case("", 6, (5, 4, 3), 4, 2, "")
    inputs = inputs_of(case, torch.float32, generator).to(target.device)
    change, route = LAYOUTS[layout], inputs.route
    x, y = change(inputs.x), change(inputs.y)
    rows, out = dispatch(x, route, target.impl), combine(y, route, inputs.weights, target.impl)
    assert_same_bits(rows, dispatch(x.contiguous(), route, target.impl))
    assert_same_bits(out, combine(y.contiguous(), route, inputs.weights, target.impl))
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert rows.is_contiguous(memory_format=wanted)
    assert out.is_contiguous(memory_format=wanted)
    results = []
    for data in (y, y.contiguous()):
        leaf, weights = data.detach().requires_grad_(), inputs.weights.clone().requires_grad_()
        out = combine(leaf, route, weights, target.impl)
        upstream = change(inputs.x)
        results.append(torch.autograd.grad(out, (leaf, weights), upstream))
    assert_same_bits(results[0][0], results[1][0])
    # A dot product over the map in its memory order: fp64 sums, so the orders agree to a unit of float32.
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-7, atol=1e-6)


def test_weights_of_any_layout_and_dtype(target, generator, assert_same_bits):
    inputs = inputs_of(by_name("prime"), torch.float32, generator).to(target.device)
    expected = combine(inputs.y, inputs.route, inputs.weights, target.impl)
    strided = inputs.weights.t().contiguous().t()
    assert_same_bits(combine(inputs.y, inputs.route, strided, target.impl), expected)
    assert_same_bits(combine(inputs.y, inputs.route, inputs.weights.double(), target.impl), expected)


@pytest.mark.parametrize("name", ["prime", "blocks", "all_chosen"])
def test_adjoint(target, name, generator):
    """<dispatch(x), y> = <x, combine(y, 1)>, for the sums of which order only the last digits depend."""
    inputs = inputs_of(by_name(name), torch.float64, generator).to(target.device)
    left = (dispatch(inputs.x, inputs.route, target.impl) * inputs.y).sum()
    ones = torch.ones_like(inputs.weights)
    right = (inputs.x * combine(inputs.y, inputs.route, ones, target.impl)).sum()
    terms = inputs.y.abs().sum().item() * inputs.x.abs().max().item()
    assert abs((left - right).item()) <= terms * torch.finfo(torch.float64).eps


def test_round_trip_is_the_identity(target, generator):
    """Weights that sum to one merge a sample's copies into the sample."""
    inputs = inputs_of(by_name("prime"), torch.float64, generator).to(target.device)
    weights = inputs.weights.softmax(1)
    back = combine(dispatch(inputs.x, inputs.route, target.impl), inputs.route, weights, target.impl)
    torch.testing.assert_close(back, inputs.x, rtol=0, atol=4 * torch.finfo(torch.float64).eps * inputs.x.abs().max())


GRAD_CASE = Case("", 3, (2, 2), 4, 2, "")


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"])
@pytest.mark.parametrize("kind", ["dispatch", "weighted_dispatch", "combine", "row_dot"])
def test_gradients(target, kind, check, generator):
    """All four linear maps, first and second derivatives in every argument."""
    x, y, weights, route = inputs_of(GRAD_CASE, torch.float64, generator).to(target.device)
    for tensor in (x, y, weights):
        tensor.requires_grad_()
    functions = {
        "dispatch": (lambda x: dispatch(x, route, target.impl), (x,)),
        "weighted_dispatch": (lambda x, w: weighted_dispatch(Inputs(x, y, w, route), target.impl), (x, weights)),
        "combine": (lambda y, w: combine(y, route, w, target.impl), (y, weights)),
        "row_dot": (lambda x, y: row_dot(Inputs(x, y, weights, route), target.impl), (x, y)),
    }
    function, arguments = functions[kind]
    assert check(function, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_dtypes(target, dtype, generator, assert_as_accurate):
    """Gradients come in the dtype of what they belong to, and are as accurate as the reference's."""
    case = by_name("prime")
    inputs = inputs_of(case, dtype, generator)
    upstream = inputs.x
    gradients = {}
    for name, here, impl in (("actual", inputs.to(target.device), target.impl), ("reference", inputs, "reference")):
        y, weights = here.y.clone().requires_grad_(), here.weights.clone().requires_grad_()
        out = combine(y, here.route, weights, impl)
        gradients[name] = torch.autograd.grad(out, (y, weights), upstream.to(out.device))
    truths = (
        oracle_dispatch(upstream, inputs.weights, inputs.route),
        oracle_row_dot(upstream, inputs.y, inputs.route),
    )
    terms = (None, float(oracle_row_dot(upstream.abs(), inputs.y.abs(), inputs.route).max()))
    for actual, reference, truth, magnitude in zip(
        gradients["actual"], gradients["reference"], truths, terms, strict=True
    ):
        assert_as_accurate(actual, reference, truth, magnitude)
    assert gradients["actual"][0].dtype == dtype


def test_no_gradient_that_was_not_asked_for(target, generator, monkeypatch):
    """An attack wants the gradient of the maps alone: the weights' dot products must not run."""
    _x, y, weights, route = inputs_of(GRAD_CASE, torch.float32, generator).to(target.device)
    module = PERMUTE.module(target.impl)
    monkeypatch.setattr(module, "row_dot", lambda *_: pytest.fail("row_dot ran"))
    out = combine(y.requires_grad_(), route, weights, target.impl)
    (gradient,) = torch.autograd.grad(out.sum(), y)
    for row, pair in enumerate(route.order.tolist()):
        assert (gradient[row] == weights.flatten()[pair]).all()


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    inputs = inputs_of(by_name("blocks"), torch.float32, generator).to(target.device)
    for function in (lambda: combine(*rows_and_weights(inputs), target.impl), lambda: row_dot(inputs, target.impl)):
        assert_same_bits(function(), function())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_changes_no_bit(dtype, generator, same_bits_for_any_threads):
    """37 maps of 8192 elements: enough for four threads in each kernel."""
    case = Case("", 37, (32, 16, 16), 4, 2, "")
    inputs = inputs_of(case, dtype, generator)

    def compute() -> tuple[Tensor, ...]:
        return (
            dispatch(inputs.x, inputs.route, "native"),
            weighted_dispatch(inputs, "native"),
            combine(*rows_and_weights(inputs), "native"),
            row_dot(inputs, "native"),
        )

    same_bits_for_any_threads(compute)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(target, layout, generator):
    case = Case("", 4, (3, 2, 2), 4, 2, "")
    x, y, weights, route = inputs_of(case, torch.float32, generator).to(target.device)
    if layout == "channels_last":
        x, y = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, y))
    for tensor in (x, y, weights):
        tensor.requires_grad_()
    ops, rest = torch.ops.robust_moe_kernels, (route.top_k, target.impl)
    for given in (None, weights):
        torch.library.opcheck(ops.dispatch.default, (x, route.order, route.inverse, given, *rest))
        torch.library.opcheck(ops.combine.default, (y, route.order, route.inverse, given, *rest))
    torch.library.opcheck(ops.row_dot.default, (x, y, route.order, route.inverse, *rest))


def test_autocast_keeps_the_dtype_of_the_maps(target, generator, assert_same_bits):
    """Gather and weighted sum are memory traffic: inside autocast bfloat16 maps stay bfloat16, summed in float32."""
    inputs = inputs_of(by_name("prime"), torch.bfloat16, generator).to(target.device)
    expected = combine(*rows_and_weights(inputs), target.impl)
    with torch.autocast(target.device, torch.bfloat16):
        assert_same_bits(combine(*rows_and_weights(inputs), target.impl), expected)
        assert dispatch(inputs.x, inputs.route, target.impl).dtype == torch.bfloat16
        assert dispatch(inputs.x.float(), inputs.route, target.impl).dtype == torch.float32


def test_compiles_without_graph_breaks(target, generator):
    inputs = inputs_of(Case("", 4, (3, 2, 2), 4, 2, ""), torch.float32, generator).to(target.device)
    indices = inputs.route.order.new_tensor([[0, 1], [2, 0], [3, 2], [1, 3]])

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        route = sort_by_expert(indices, 4)
        return combine(dispatch(x, route, target.impl).relu(), route, weights, target.impl).square().mean()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
        loss = function(x, weights)
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, weights))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_routes_of_another_size_are_seen_by_the_fake_kernel(target):
    """Shapes under FakeTensorMode follow the route, not the data: what torch.export and compile rely on."""
    case = Case("", 4, (3, 2, 2), 4, 2, "")
    inputs = inputs_of(case, torch.float32, torch.Generator().manual_seed(0))
    with torch._subclasses.FakeTensorMode() as mode:
        x, order = mode.from_tensor(inputs.x), mode.from_tensor(inputs.route.order)
        rows = torch.ops.robust_moe_kernels.dispatch(x, order, order, None, 2, target.impl)
    assert math.prod(rows.shape) == inputs.y.numel()
    assert rows.stride() == inputs.y.stride()


def test_is_in_the_table():
    assert OPS[OP] is PERMUTE
