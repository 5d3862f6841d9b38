"""The routed MLP and all of its gradients against a loop over experts of ``nn.Linear``, in float64."""

from __future__ import annotations

import re

import pytest
import torch
from mlp_cases import CASES, Case, Inputs, inputs_of, oracle, route_of, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_moe_kernels import native
from robust_moe_kernels.dispatch import ImplementationUnavailable
from robust_moe_kernels.ops.expert_mlp import ACTIVATIONS, EXPERT_MLP, expert_mlp
from robust_moe_kernels.ops.expert_mlp.activation import activation_of
from robust_moe_kernels.ops.routing import Route, sort_by_expert

OP = "expert_mlp"
RAW = torch.ops.robust_moe_kernels
needs_extension = pytest.mark.skipif(native.why_not_cpu("cpu") is not None, reason="needs the compiled extension")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def computes(target, dtype: torch.dtype) -> bool:
    """Whether the implementation computes this dtype; if not, that it says so by name."""
    module = EXPERT_MLP.module(target.impl)
    reason = module.why_not_case(torch.zeros(1, dtype=dtype))
    if reason is not None:
        with pytest.raises(ImplementationUnavailable, match=re.escape(reason)):
            EXPERT_MLP.choose(target.impl, torch.zeros(1, dtype=dtype, device=target.device))
    return reason is None


def assert_close(got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """At most twice the error of PyTorch's layers in the same dtype, ``plain``, and two units of the largest number;
    all against float64, whose own sums may be 16 units apart. Those of a 16-bit dtype are the units of the weights'
    gradient too: it is a sum of products with 16-bit activations."""
    assert got.keys() == truth.keys() == plain.keys()
    dtype = plain["y"].dtype
    for name, right in truth.items():
        assert got[name].dtype == plain[name].dtype, name
        assert got[name].shape == right.shape, name
        error, allowed, size = (
            t.abs().max().item() if t.numel() else 0.0
            for t in (got[name].cpu().double() - right, plain[name].double() - right, right)
        )
        assert error <= 2 * allowed + (16 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps * size, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_oracle(target, case, dtype, generator):
    if not computes(target, dtype):
        return
    inputs = inputs_of(case, generator, dtype)
    got = run(inputs.to(target.device), case, target.impl)
    assert_close(got, oracle(inputs, case), oracle(inputs, case, dtype))


def test_experts_without_rows_have_gradient_zero(target, generator):
    case = by_name("silent")
    got = run(inputs_of(case, generator).to(target.device), case, target.impl)
    for name in ("d_weight1", "d_bias1", "d_weight2", "d_bias2"):
        assert got[name][: case.used].any(1).all()
        assert not got[name][case.used :].any()


def test_dropped_pairs_are_zero_whatever_they_hold(target, generator, assert_same_bits):
    """NaN in a dropped pair's weight, and in a token of which all pairs are dropped, reaches nothing."""
    case = by_name("dropped")
    inputs = inputs_of(case, generator)
    lost = inputs.indices == case.experts
    assert lost[-4:].all() and lost[-5].tolist() == [False, True]
    expected = run(inputs.to(target.device), case, target.impl)
    weights, x = inputs.weights.clone(), inputs.x.clone()
    weights[lost], x[-4:] = float("nan"), float("nan")
    got = run(inputs._replace(weights=weights, x=x).to(target.device), case, target.impl)
    assert_same_bits(tuple(got.values()), tuple(expected.values()))
    assert not got["d_weights"].cpu()[lost].any()
    assert not got["y"][-4:].any() and not got["d_x"][-4:].any()


def test_rows_bounds_what_is_kept(target, generator, assert_same_bits):
    """An upper bound of offsets[E]: pre-activations of that many rows, 0 behind the last; the same results."""
    case = by_name("dropped")
    inputs = inputs_of(case, generator).to(target.device)
    pairs = case.tokens * case.top_k
    expected = run(inputs, case, target.impl)
    for rows in (pairs - case.dropped, pairs - case.dropped + 3):
        assert_same_bits(tuple(run(inputs, case, target.impl, rows).values()), tuple(expected.values()))
        operands = operands_of(inputs, case, rows, target.impl)
        z = RAW.expert_mlp_forward(*operands)[1]
        assert z.shape == (rows, case.widths[1])
        assert z[: pairs - case.dropped].any(1).all()
        assert not z[pairs - case.dropped :].any()


def operands_of(inputs: Inputs, case: Case, rows: int, impl: str) -> tuple:
    route = route_of(inputs.indices, case.experts)
    tables = (inputs.weights, route.order, route.inverse, route.offsets)
    return (*inputs[:5], *tables, rows, case.activation, impl)


@pytest.mark.parametrize("name", ["uneven", "wide", "glu_silu"])
def test_a_token_does_not_depend_on_the_others(target, name, generator, assert_same_bits):
    """Alone or in a batch, in any place: the same bits of output, input gradient and weights' gradient."""
    if target.impl == "reference":
        pytest.skip("PyTorch's products depend on the number of rows")
    case = by_name(name)
    inputs = inputs_of(case, generator).to(target.device)
    whole = run(inputs, case, target.impl)
    for chosen in ([3], [7, 3], list(range(case.tokens))[::-1], list(range(1, 8))):
        part = [t[chosen] for t in (inputs.x, inputs.weights, inputs.indices, inputs.d_y)]
        few = inputs._replace(x=part[0], weights=part[1], indices=part[2], d_y=part[3])
        got = run(few, case._replace(tokens=len(chosen)), target.impl)
        for key in ("y", "d_x", "d_weights"):
            assert_same_bits(got[key], whole[key][chosen])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["wide", "glu_silu", "dropped"])
def test_thread_count_changes_no_bit(name, dtype, generator, same_bits_for_any_threads):
    case = by_name(name)
    inputs = inputs_of(case, generator, dtype)
    same_bits_for_any_threads(lambda: tuple(run(inputs, case, "native").values()))


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    case = by_name("uneven")
    inputs = inputs_of(case, generator).to(target.device)
    assert_same_bits(*(tuple(run(inputs, case, target.impl).values()) for _ in range(2)))


def test_any_strides(target, generator, assert_same_bits):
    """Transposed and spread operands, an order and offsets with gaps: the numbers of contiguous ones."""
    case = by_name("uneven")
    inputs = inputs_of(case, generator).to(target.device)
    turned = Inputs(*(t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs))
    assert not turned.x.is_contiguous() and not turned.weight1.is_contiguous()
    assert_same_bits(tuple(run(turned, case, target.impl).values()), tuple(run(inputs, case, target.impl).values()))
    operands = operands_of(inputs, case, case.tokens * case.top_k, target.impl)
    spread = [t.repeat_interleave(2, -1)[..., ::2] if isinstance(t, Tensor) else t for t in operands]
    assert_same_bits(RAW.expert_mlp_forward(*spread), RAW.expert_mlp_forward(*operands))


@pytest.mark.parametrize("name", ["silent", "dropped", "plain", "glu_gelu", "glu_sigmoid"])
def test_gradcheck(name, generator):
    case = by_name(name)._replace(widths=(3, 4, 2))
    inputs = inputs_of(case, generator, torch.float64)
    route = route_of(inputs.indices, case.experts)
    leaves = [None if t is None else t.requires_grad_() for t in inputs[:6]]

    def compute(x, weight1, bias1, weight2, bias2, weights):
        return expert_mlp(x, weight1, bias1, weight2, bias2, route, weights, case.activation)

    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


@pytest.mark.filterwarnings("ignore:a derivative of a mixture")
@pytest.mark.parametrize("name", ["silent", "dropped", "plain", "glu_gelu"])
def test_second_derivatives(name, generator):
    case = by_name(name)._replace(widths=(3, 4, 2), tokens=5, dropped=3 if name == "dropped" else 0)
    inputs = inputs_of(case, generator, torch.float64)
    route = route_of(inputs.indices, case.experts)
    leaves = [None if t is None else t.requires_grad_() for t in inputs[:6]]

    def compute(x, weight1, bias1, weight2, bias2, weights):
        return expert_mlp(x, weight1, bias1, weight2, bias2, route, weights, case.activation)

    assert torch.autograd.gradgradcheck(compute, leaves, fast_mode=True)


def test_the_gradient_operation_has_no_derivative(generator):
    case = by_name("one")
    inputs = inputs_of(case, generator)
    operands = operands_of(inputs, case, 9, "reference")
    z = RAW.expert_mlp_forward(*operands)[1]
    x, weight1, _, weight2, bias2, *tables = operands[:9]
    given = (inputs.d_y.requires_grad_(), x, z, weight1, weight2, bias2, *tables, case.activation, [True] * 6)
    d_x = RAW.expert_mlp_backward(*given, "reference")[0]
    with pytest.raises(RuntimeError, match="expert_mlp_backward has no derivative"):
        d_x.sum().backward()


@pytest.mark.parametrize("wanted", [("x", "weights"), ("x",), ("weight2",), ("bias1", "weights"), ("weight1", "bias2")])
def test_only_what_is_asked_for(target, wanted, generator, monkeypatch, assert_same_bits):
    """The implementation is told which gradients are needed, computes those alone, and they are those of all."""
    names = ("x", "weight1", "bias1", "weight2", "bias2", "weights")
    case, module, seen = by_name("uneven"), EXPERT_MLP.module(target.impl), []
    inputs = inputs_of(case, generator).to(target.device)
    expected = run(inputs, case, target.impl)
    backward = module.backward

    def counted(*arguments):
        seen.append(backward(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "backward", counted)
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in zip(names, inputs[:6], strict=True)}
    x, *layers, weights = leaves.values()
    y = expert_mlp(x, *layers, route_of(inputs.indices, case.experts), weights, case.activation, None, target.impl)
    found = torch.autograd.grad(y, [leaves[name] for name in wanted], inputs.d_y)
    assert_same_bits(tuple(found), tuple(expected[f"d_{name}"] for name in wanted))
    assert [gradient is not None for gradient in seen[0]] == [name in wanted for name in names]


def test_opcheck(target, generator):
    for name in ("uneven", "dropped"):
        case = by_name(name)._replace(biases=name == "dropped")
        inputs = inputs_of(case, generator).to(target.device)
        rows = case.tokens * case.top_k - case.dropped
        operands = operands_of(inputs, case, rows, target.impl)
        z = RAW.expert_mlp_forward(*operands)[1]
        torch.library.opcheck(RAW.expert_mlp_forward.default, operands)
        x, weight1, _, weight2, bias2, *tables = operands[:9]
        given = (inputs.d_y, x, z, weight1, weight2, bias2, *tables, case.activation)
        needs = [True] * 6 if case.biases else [True] + [False] * 4 + [True]
        torch.library.opcheck(RAW.expert_mlp_backward.default, (*given, needs, target.impl))


def test_compiles_into_one_graph(target, generator, assert_same_bits):
    """Also for another number of tokens and rows."""
    if target.impl == "reference":
        pytest.skip("the reference reads the segments' sizes on the host")
    case = by_name("uneven")

    def compute(x, weight1, bias1, weight2, bias2, weights, route):
        return expert_mlp(x, weight1, bias1, weight2, bias2, route, weights, case.activation, None, target.impl)

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    for tokens in (13, 5):
        inputs = inputs_of(case._replace(tokens=tokens), generator).to(target.device)
        route = route_of(inputs.indices, case.experts)
        results = []
        for function in (compute, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs[:6]]
            y = function(*leaves, route)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, inputs.d_y)))
        assert_same_bits(*results)


def test_autocast_changes_nothing(target, generator, assert_same_bits):
    case = by_name("uneven")
    inputs = inputs_of(case, generator).to(target.device)
    expected = run(inputs, case, target.impl)
    with torch.autocast(target.device, torch.bfloat16):
        got = run(inputs, case, target.impl)
    assert_same_bits(tuple(got.values()), tuple(expected.values()))


def good() -> dict:
    """Valid arguments: 3 tokens of 4 channels, 2 of 3 experts each, 8 hidden units, 5 outputs."""
    return {
        "x": torch.ones(3, 4), "weight1": torch.ones(3, 8, 4), "bias1": torch.ones(3, 8),
        "weight2": torch.ones(3, 5, 8), "bias2": torch.ones(3, 5),
        "route": sort_by_expert(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3), "weights": torch.ones(3, 2),
        "activation": "gelu",
    }  # fmt: skip


def changed_route(**tables: Tensor) -> dict[str, Route]:
    return {"route": good()["route"]._replace(**tables)}


META = torch.device("meta")
WRONG = {
    "x not a tensor": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "x integers": ({"x": torch.ones(3, 4).long()}, TypeError, "x: expected dtype float32 or float64 or float16 or "),
    "x as a map": ({"x": torch.ones(3, 4, 1)}, ValueError, "x: expected shape [N, C], got [3, 4, 1]"),
    "x channels": ({"x": torch.ones(3, 6)}, ValueError,
                   "weight1: expected shape [3, 8, 6] ([E, H1, C]), got [3, 8, 4]"),
    "x tokens": ({"x": torch.ones(4, 4)}, ValueError, "weights: expected shape [4, 2] ([N, k]), got [3, 2]"),
    "weight1 dtype": ({"weight1": torch.ones(3, 8, 4).half()}, TypeError,
                      "weight1: expected dtype float32, got float16"),
    "weight1 missing": ({"weight1": None}, TypeError, "weight1: expected a tensor, got NoneType"),
    "weight1 device": ({"weight1": torch.ones(3, 8, 4, device=META)}, ValueError,
                       "weight1: expected a tensor on cpu (the device of x), got meta"),
    "bias1 shape": ({"bias1": torch.ones(8)}, ValueError, "bias1: expected shape [3, 8] ([E, H1]), got [8]"),
    "bias1 a number": ({"bias1": 0.0}, TypeError, "bias1: expected a tensor, got float"),
    "weight2 hidden": ({"weight2": torch.ones(3, 5, 4)}, ValueError,
                       "weight1: expected H1 = 4 outputs for gelu and H = 4, got 8"),
    "weight2 experts": ({"weight2": torch.ones(2, 5, 8)}, ValueError,
                        "weight2: expected shape [3, 5, 8] ([E, O, H]), got [2, 5, 8]"),
    "bias2 outputs": ({"bias2": torch.ones(3, 6)}, ValueError, "bias2: expected shape [3, 5] ([E, O]), got [3, 6]"),
    "gated, half as wide": ({"activation": "glu_silu"}, ValueError,
                            "weight1: expected H1 = 16 outputs for glu_silu and H = 8, got 8"),
    "activation unknown": ({"activation": "swish"}, ValueError, "activation: expected one of gelu, gelu_tanh, relu, "),
    "activation not gated": ({"activation": "sigmoid"}, ValueError, "activation: expected one of gelu, "),
    "route a tuple": ({"route": (1, 2)}, TypeError, "route: expected a Route, as sort_by_expert makes it, got tuple"),
    "route of other experts": ({"route": sort_by_expert(torch.tensor([[0, 1], [1, 2], [2, 0]]), 4)}, ValueError,
                               "offsets: expected shape [4] ([E+1]), got [5]"),
    "order out of range": (changed_route(order=torch.tensor([0, 5, 1, 2, 3, 6])), ValueError,
                           "order: expected numbers in [0, 6), got numbers from 0 to 6"),
    "inverse of another": (changed_route(inverse=torch.arange(6)), ValueError,
                           "inverse: expected the inverse of order"),
    "offsets fall": (changed_route(offsets=torch.tensor([0, 3, 2, 6])), ValueError,
                     "offsets: expected numbers that rise from 0 to R, got [0, 3, 2, 6]"),
    "offsets beyond": (changed_route(offsets=torch.tensor([0, 2, 4, 7])), ValueError,
                       "offsets: expected at most rows = 6 rows, got 7"),
    "weights of one slot": ({"weights": torch.ones(3, 1)}, ValueError,
                            "weights: expected shape [3, 2] ([N, k]), got [3, 1]"),
    "weights integers": ({"weights": torch.ones(3, 2).long()}, TypeError, "weights: expected dtype float32 or "),
    "rows too few": ({"rows": 5}, ValueError, "offsets: expected at most rows = 5 rows, got 6"),
    "rows too many": ({"rows": 7}, ValueError, "rows: expected 0 <= rows <= R = 6, got 7"),
    "rows negative": ({"rows": -1}, ValueError, "rows: expected 0 <= rows <= R = 6, got -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments(target, name):
    changes, error, message = WRONG[name]
    if target.device != "cpu":
        pytest.skip("numbers are read on the CPU alone")
    expert_mlp(**good(), impl=target.impl)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        expert_mlp(**good() | changes, impl=target.impl)


def test_weights_of_any_floating_dtype(target, generator):
    case = by_name("uneven")
    inputs = inputs_of(case, generator).to(target.device)
    half = inputs._replace(weights=inputs.weights.half())
    rounded = inputs._replace(weights=inputs.weights.half().float())
    got, expected = run(half, case, target.impl), run(rounded, case, target.impl)
    assert torch.equal(got["y"], expected["y"])
    assert got["d_weights"].dtype == torch.float16


def test_flops_are_those_of_a_dense_mlp_on_every_row(generator):
    """Of PyTorch's own layers on N*k rows, forward and backward; without the weights' gradients less."""
    case = by_name("uneven")
    inputs = inputs_of(case, generator)
    pairs, (channels, hidden, outputs) = case.tokens * case.top_k, case.widths

    def counted(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def dense() -> None:
        x = torch.randn(pairs, channels, requires_grad=True)
        layers = nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, outputs)
        nn.Sequential(*layers)(x).sum().backward()

    assert counted(lambda: run(inputs, case, "reference")) == counted(dense)
    assert counted(dense) == 6 * pairs * hidden * (channels + outputs)
    route = route_of(inputs.indices, case.experts)
    x = inputs.x.clone().requires_grad_()
    attack = counted(
        lambda: expert_mlp(x, *inputs[1:5], route, inputs.weights, case.activation, None, "reference").sum().backward()
    )
    assert attack == 4 * pairs * hidden * (channels + outputs)


def test_names_of_activations():
    assert [name for name, activation in ACTIVATIONS.items() if not activation.gated] == [
        "gelu", "gelu_tanh", "relu", "silu"
    ]  # fmt: skip
    assert activation_of("glu_sigmoid").inputs(3) == 6
    with pytest.raises(ValueError, match=r"^activation: expected one of .*, got 3$"):
        activation_of(3)
