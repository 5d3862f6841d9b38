"""Which implementation runs, and that the package works without Triton, without its extension and without both."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robust_moe_kernels.dispatch import IMPLEMENTATIONS, ImplementationUnavailable, Op
from robust_moe_kernels.ops import OPS

WITHOUT = """
import json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # importing it raises ImportError

import torch
from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.attack_step import pgd_step, random_start
from robust_moe_kernels.ops.gate import top_k_gate
from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import sort_by_expert

torch.manual_seed(0)
x = torch.rand(6, 3, 4, 4, requires_grad=True)
logits = torch.randn(6, 5, requires_grad=True)
results = {}
for impl in ("auto", "reference"):
    gate = top_k_gate(logits, 2, impl=impl)
    route = sort_by_expert(gate.indices, 5, impl)
    y = combine(dispatch(x, route, impl) ** 2, route, gate.weights, impl)
    gradients = torch.autograd.grad(y.sum() + gate.mean_entropy, (x, logits))
    attacked = pgd_step(random_start(x, 0.1, 3, impl=impl), gradients[0], x, 0.1, 0.05, impl=impl)
    results[impl] = [y.detach(), *gradients, attacked.detach()]

print(json.dumps({
    "difference": max((a - b).abs().max().item() for a, b in zip(results["auto"], results["reference"])),
    "attacked": attacked.sum().item(),
    "why_not": {name: {impl: op.why_not(impl, "cpu") for impl in ("reference", "native", "triton")}
                for name, op in OPS.items()},
    "chosen": {name: op.choose("auto", x).__name__.rsplit(".", 1)[-1] for name, op in OPS.items()},
    "imported": [name for name in ("triton", "robust_moe_kernels._C") if sys.modules.get(name)],
}))
"""
TRITON, EXTENSION = "triton", "robust_moe_kernels._C"


def without(*modules: str) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT, json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "blocked", [(), (TRITON,), (EXTENSION,), (TRITON, EXTENSION)], ids=["none", "triton", "extension", "both"]
)
def test_runs_without(blocked):
    seen = without(*blocked)
    assert set(seen["imported"]).isdisjoint(blocked)
    # A forward and backward pass of order-one numbers through five ops, float32 sums in different orders.
    assert seen["difference"] <= (0.0 if EXTENSION in blocked else 4e-6)
    assert seen["attacked"] == pytest.approx(6 * 3 * 16 * 0.5, rel=0.2)
    for name in OPS:
        reasons = seen["why_not"][name]
        assert seen["chosen"][name] == ("reference_impl" if EXTENSION in blocked else "native_impl")
        assert reasons["reference"] is None
        if EXTENSION in blocked:
            assert reasons["native"].startswith("the compiled extension is missing (")
            assert "robust_moe_kernels._C" in reasons["native"]
        else:
            assert reasons["native"] is None
        if TRITON in blocked:
            assert reasons["triton"].startswith("cannot be imported: ")
            assert "triton" in reasons["triton"]
        else:
            assert reasons["triton"] == "Triton needs a GPU (on the CPU only its interpreter, TRITON_INTERPRET=1)"


def test_the_suite_covers_what_is_installed():
    """Tests run over what can run; an extension or a Triton that silently dropped out would leave them green."""
    for op in OPS.values():
        assert op.why_not("native", "cpu") is None
        if importlib.util.find_spec("triton") is not None:
            assert op.why_not("triton", "cuda" if torch.cuda.is_available() else "cpu") is None


@pytest.mark.parametrize("name", OPS)
def test_a_new_op_brings_its_tests(name):
    module = Path(__file__).parent / "ops" / f"test_{name}.py"
    assert f'OP = "{name}"' in module.read_text()


@pytest.mark.parametrize("name", OPS)
def test_implementations_are_interchangeable(name):
    """Every implementation offers the reference's functions, with the same parameters."""
    modules = {impl: importlib.import_module(f"{OPS[name].package}.{impl}_impl") for impl in IMPLEMENTATIONS}
    native = modules["native"]
    functions = [function for function in native.__all__ if function != "why_not"]
    assert functions
    for impl, module in modules.items():
        offered = {item for item in module.__all__ if inspect.isfunction(getattr(module, item))}
        assert offered - {"builds", "philox4x32"} == {*functions, "why_not"}
        for function in functions:
            parameters = list(inspect.signature(getattr(module, function)).parameters)
            assert parameters == list(inspect.signature(getattr(native, function)).parameters), (impl, function)


@pytest.mark.parametrize("name", OPS)
def test_order_of_preference(name):
    """The reference is last everywhere, so that something always runs, and alone where nothing else is written."""
    op = OPS[name]
    for device in ("cpu", "cuda"):
        assert op.order(device)[-1] == "reference"
        assert len(set(op.order(device))) == len(op.order(device))
    assert op.order("cpu")[0] == "native"
    assert op.order("xpu") == op.order("meta") == ("reference",)
    assert op.choose("auto", torch.empty(0, device="meta")).__name__ == f"{op.package}.reference_impl"


def test_auto_takes_the_first_that_can_run(monkeypatch):
    op = Op("robust_moe_kernels.ops.gate", cpu=("triton", "native", "reference"), cuda=("reference",))
    for broken, expected in ((set(), "triton"), ({"triton"}, "native"), ({"triton", "native"}, "reference")):
        fresh = Op(op.package, cpu=op.order("cpu"), cuda=op.order("cuda"))
        monkeypatch.setattr(fresh, "why_not", lambda impl, _, broken=broken: "broken" if impl in broken else None)
        assert fresh.choose("auto", torch.empty(0)).__name__ == f"{op.package}.{expected}_impl"


def only(dtype: torch.dtype):
    """A ``why_not_case`` that computes one dtype."""
    return lambda *operands: None if all(x.dtype == dtype for x in operands) else f"computes {dtype} only"


@pytest.mark.parametrize("name", ["expert_conv", "expert_block"])
def test_operands_decide_in_the_order_of_the_device(name, monkeypatch):
    """What cannot compute them is passed over under "auto", for the next of the order, and refused by name."""
    op = Op(OPS[name].package, cpu=("triton", "native", "reference"), cuda=("reference",))
    for impl, dtype in (("triton", torch.float32), ("native", torch.float64)):
        monkeypatch.setattr(op.module(impl), "why_not_case", only(dtype))
    for dtype, expected in ((torch.float32, "triton"), (torch.float64, "native"), (torch.float16, "reference")):
        x = torch.empty(0, dtype=dtype)
        for operands in ((x,), (None, x, x)):
            assert op.choose("auto", *operands) is op.module(expected)
    with pytest.raises(ImplementationUnavailable) as error:
        op.choose("triton", torch.empty(0), torch.empty(0, dtype=torch.float64))
    assert str(error.value) == f"{name}: impl='triton' cannot run on cpu: computes torch.float32 only"


def test_an_order_that_ends_without_an_answer_gives_every_reason(monkeypatch):
    op = Op(OPS["expert_conv"].package, cpu=("triton", "native"), cuda=("reference",))
    for impl in ("triton", "native"):
        monkeypatch.setattr(op.module(impl), "why_not_case", only(torch.float32))
    with pytest.raises(ImplementationUnavailable) as error:
        op.choose("auto", torch.empty(0, dtype=torch.float64))
    reasons = "computes torch.float32 only; computes torch.float32 only"
    assert str(error.value) == f"expert_conv: impl='auto' cannot run on cpu: {reasons}"


@pytest.mark.parametrize("name", OPS)
def test_reasons_are_sentences_about_the_device(name):
    for device, impl, words in (("xpu", "native", "for the CPU"), ("xpu", "triton", "not xpu")):
        assert words in OPS[name].why_not(impl, device)


def test_the_reference_never_waits_for_a_gpu():
    """Fake CUDA tensors have no values, so an operation that needs one on the host (.item(), nonzero, a boolean index)
    raises: all ops' references forward and backward, without a GPU."""
    modules = {name: op.module("reference") for name, op in OPS.items()}
    with FakeTensorMode(), torch.device("cuda"):
        logits, x = torch.randn(6, 5), torch.rand(6, 3, 4, 4)
        for mode in (0, 1, 2):
            top_k = 1 if mode == 2 else 2
            outputs = modules["gate"].forward(logits, top_k, mode)
            scores, indices, weights, mean_scores, _, entropy, square, nonfinite = outputs
            modules["gate"].backward(logits, scores, indices, scores, weights, mean_scores, entropy, square, mode)
        order, _sample, inverse, _offsets, invalid = modules["routing"].sort_by_expert(indices.flatten(), 5, top_k)
        rows = modules["permute"].dispatch(x, order, inverse, weights, top_k)
        out = modules["permute"].combine(rows, order, inverse, weights, top_k)
        dots = modules["permute"].row_dot(x, rows, order, inverse, top_k)
        for norm in ("Linf", "L2"):
            x = modules["attack_step"].random_start(x, torch.arange(6), 0.1, 3, 0, norm)
            x = modules["attack_step"].pgd_step(x, out, x, 0.1, 0.05, norm)
            x = modules["apgd"].apgd_step(x, x, out, x, torch.ones(6), 0.1, 0.75, norm)
        kept = [torch.empty_like(x) for _ in range(3)]
        modules["apgd"].apgd_track(x, out, nonfinite.expand(6) > 0, nonfinite.expand(6) > 0, *kept)
        assert {tensor.device.type for tensor in (*outputs, rows, out, dots, x, invalid)} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            nonfinite.item()
