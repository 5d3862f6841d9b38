"""The routed MLP's engine: what keeps experts off it, one graph under torch.compile, attacks, and nothing for the host
to read."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import torch
from pytest import MonkeyPatch, fixture, mark, raises, warns
from timm.layers.mlp import GluMlp, Mlp
from token_layers import BOUND, EXPERTS, HIDDEN, MLPS, WIDTH, token_layer, tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robust_moe_kernels import FusedMLPMoE, balance_loss
from robust_moe_kernels.modules import (
    AllExperts,
    DropTop,
    RandomRoutes,
    SoftGradient,
    SwapTop,
    attack_mode,
    mlp_experts,
    rerouted,
)
from robust_moe_kernels.modules.casts import CastFilters

LIMITS = {
    "all": {},
    "capacity": {"capacity": 0.7},
    "in order": {"capacity": 0.7, "priority": "vanilla"},
    "expert choice": {"choice": "expert"},
}


@fixture
def together(monkeypatch: MonkeyPatch) -> list[int]:
    """One entry for each forward in which the experts of a layer ran together."""
    calls: list[int] = []
    operation = mlp_experts.expert_mlp

    def counting(x: Tensor, *rest) -> Tensor:
        calls.append(len(x))
        return operation(x, *rest)

    monkeypatch.setattr(mlp_experts, "expert_mlp", counting)
    return calls


@fixture
def fresh_compiler() -> None:
    """Cases share the code of the layer, whose graphs would count against one limit."""
    torch.compiler.reset()


def of_loop(moe: FusedMLPMoE, x: Tensor) -> Tensor:
    record = moe.routing
    every = torch.stack([expert(x) for expert in moe.experts], 1)  # [N, E, O]
    index = record.indices[..., None].expand(-1, -1, every.shape[2])
    return (every.gather(1, index) * record.weights[..., None]).sum(1)


# --- what keeps them off it -------------------------------------------------------------------------------------------


@mark.parametrize("name", MLPS)
def test_experts_run_together(name: str, together: list[int]):
    moe = token_layer(mlp=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe(tokens())
    assert together == [23]


def hooked(moe: FusedMLPMoE) -> None:
    moe.experts[1].fc1.register_forward_hook(lambda module, args, out: 2 * out)


def another_activation(moe: FusedMLPMoE) -> None:
    moe.experts[2].act = nn.ReLU()


def own_forward(moe: FusedMLPMoE) -> None:
    moe.experts[0].forward = lambda x: 3 * x


def approximated(moe: FusedMLPMoE) -> None:
    moe.experts[1].act.approximate = "tanh"


def without_bias(moe: FusedMLPMoE) -> None:
    moe.experts[3].fc2.bias = None


CHANGES = {  # what is changed, and whether that is said
    "a hook": (hooked, "fc1 of expert 1 has hooks|Linear of expert 1 has hooks"),
    "a layer of another class": (another_activation, "expert 2 has other layers"),
    "a forward of its own": (own_forward, "Mlp of expert 0 has a forward of its own"),
    "a setting": (approximated, None),
    "a bias taken away": (without_bias, None),
}


@mark.parametrize("change", CHANGES)
@mark.parametrize("before", [True, False], ids=["after a forward", "before the first"])
def test_a_changed_expert_is_what_it_became(change: str, before: bool, together: list[int]):
    moe, x = token_layer(), tokens()
    if before:
        moe(x)
        assert together.pop() == 23
    changes, words = CHANGES[change]
    changes(moe)
    if words is None:
        out = moe(x)
    else:
        with warns(UserWarning, match=words):
            out = moe(x)
    assert together == []
    torch.testing.assert_close(out, of_loop(moe, x), rtol=BOUND, atol=BOUND)


def test_a_gate_that_moves_to_the_other_half_is_seen(together: list[int]):
    moe, x = token_layer(mlp="timm gated"), tokens()
    moe(x)
    moe.experts[2].gate_last = False
    torch.testing.assert_close(moe(x), of_loop(moe, x), rtol=BOUND, atol=BOUND)
    assert together == [23]


def test_dropout_at_work_is_each_experts_own(together: list[int]):
    torch.manual_seed(0)
    moe, x = FusedMLPMoE.from_mlp(Mlp(WIDTH, HIDDEN, drop=0.5).double(), EXPERTS, init="fresh"), tokens()
    torch.manual_seed(1)
    out = moe(x)
    assert together == []
    record = moe.routing
    torch.manual_seed(1)
    wanted = torch.zeros_like(out)
    for number, expert in enumerate(moe.experts):
        rows, slots = (record.indices == number).nonzero(as_tuple=True)
        wanted = wanted.index_add(0, rows, record.weights[rows, slots, None] * expert(x[rows]))
    torch.testing.assert_close(out, wanted, rtol=BOUND, atol=BOUND)
    moe.eval()(x)
    assert together == [23]
    for expert in moe.train().experts:
        expert.drop1.p = expert.drop2.p = 0.0
    moe(x)
    assert together == [23, 23]


def test_training_that_only_shows_in_the_function_is_each_experts_own(together: list[int]):
    class Noisy(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    moe = FusedMLPMoE.from_mlp(Noisy(WIDTH, HIDDEN).double(), EXPERTS)
    moe.train()(tokens())
    assert together == []
    moe.eval()(tokens())
    assert together == [23]


def test_experts_of_another_dtype_run_one_by_one(together: list[int]):
    moe = token_layer().float()
    moe.experts[1].fc2.double()
    with raises(RuntimeError, match="dtype"):  # as the module by itself
        moe(tokens().float())
    assert together == []


# --- numbers ----------------------------------------------------------------------------------------------------------


REROUTES = (DropTop(), SwapTop(), RandomRoutes(torch.arange(23)), AllExperts(), SoftGradient())


@mark.parametrize("reroute", REROUTES, ids=lambda reroute: type(reroute).__name__)
def test_imposed_routes_are_those_of_each_token(reroute):
    moe, x = token_layer(), tokens().requires_grad_()
    with rerouted(moe, reroute):
        out = moe(x)
    assert len(moe.routing.indices) == 23
    wanted = of_loop(moe, x)
    torch.testing.assert_close(out, wanted, rtol=BOUND, atol=BOUND)
    (found,) = torch.autograd.grad(out.sin().sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted.sin().sum(), x)
    torch.testing.assert_close(found, expected, rtol=BOUND, atol=BOUND)


@mark.parametrize("name", ["timm", "timm SwiGLU", "timm gated"])
def test_weights_changed_before_the_backward_are_noticed(name: str):
    moe = token_layer(mlp=name)
    loss = moe(tokens().requires_grad_()).sum()
    with torch.no_grad():
        next(moe.experts[2].parameters()).mul_(2)
    with raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_checked_by_differences():
    torch.manual_seed(0)
    moe = token_layer(capacity=0.6, mlp="timm gated")
    x = tokens(3).requires_grad_()
    assert torch.autograd.gradcheck(moe, x)
    assert torch.autograd.gradgradcheck(moe, x)


# --- one graph --------------------------------------------------------------------------------------------------------


def step(moe: nn.Module, layer: FusedMLPMoE, *given: Tensor) -> tuple[Tensor, ...]:
    x = given[0].clone().requires_grad_()
    loss = moe(x, *given[1:]).square().mean() + balance_loss(layer)
    return (loss.detach(), *torch.autograd.grad(loss, (x, *layer.parameters())))


@mark.parametrize(("name", "limits"), [("timm", "all"), ("timm", "expert choice"), ("timm SwiGLU", "capacity")])
def test_compiles_into_one_graph(name: str, limits: str, fresh_compiler: None):
    """The same step as without: aot_eager runs the same operations, so the same bits; of any number of tokens."""
    plain = token_layer(mlp=name, **LIMITS[limits]).float()
    compiled = copy.deepcopy(plain)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for shape in ((2, 9), (3, 5)):  # the second compiles for any size
        x = tokens(*shape).float()
        found, wanted = step(function, compiled, x), step(plain, plain, x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert compiled.routing.shape == shape


def test_a_mask_compiles_too(fresh_compiler: None):
    plain = token_layer(capacity=0.7).float()
    compiled = copy.deepcopy(plain)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, padding = tokens(2, 9).float(), torch.arange(18).view(2, 9) % 4 == 0
    torch.testing.assert_close(step(function, compiled, x, padding), step(plain, plain, x, padding), rtol=0, atol=0)


# --- attacks ----------------------------------------------------------------------------------------------------------


class Ran(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each operation ran; and what the routed MLP's backward was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.needs: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += 1
        if func.name() == "robust_moe_kernels::expert_mlp_backward":
            self.needs.append(args[-2])
        return func(*args, **(kwargs or {}))


@mark.parametrize("mode", ["eval", "train"])
def test_an_attack_computes_input_gradients_only(mode: str):
    moe = token_layer().float()
    moe(tokens().float()).sum().backward()
    before, record = [p.grad for p in moe.parameters()], moe.routing
    x = tokens().float().requires_grad_()
    wanted = torch.autograd.grad(copy.deepcopy(moe).train(mode == "train")(x).sum(), x)[0]
    with attack_mode(moe, mode), Ran() as ran:
        (gradient,) = torch.autograd.grad(moe(x).sum(), x)
    assert torch.equal(gradient, wanted)
    assert ran.needs == [[True, False, False, False, False, True]]  # the tokens, and the sum's weights for the gate
    assert all(p.grad is grad for p, grad in zip(moe.parameters(), before, strict=True))
    assert moe.routing is record
    assert all(p.requires_grad for p in moe.parameters())
    assert moe.experts.held is None


@mark.parametrize("name", ["timm", "timm SwiGLU"])
def test_frozen_weights_are_cast_once_an_attack(name: str, monkeypatch: MonkeyPatch):
    made = []
    monkeypatch.setattr(mlp_experts.Experts, "cast", counted(mlp_experts.Experts.cast, made))
    moe = token_layer(mlp=name).float()
    x = tokens().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.autograd.grad(copy.deepcopy(moe).eval()(x).float().sum(), x)[0]
        with attack_mode(moe):
            for _ in range(3):
                assert torch.equal(torch.autograd.grad(moe(x).float().sum(), x)[0], wanted)
            assert len({id(values[0]) for values in made[-3:]}) == 1
            held = moe.experts.held[0]
            assert isinstance(held, CastFilters)
            with torch.no_grad():
                next(moe.experts[1].parameters()).mul_(2)
            changed = torch.autograd.grad(moe(x).float().sum(), x)[0]
            assert moe.experts.held[0] is not held
            assert not torch.equal(changed, wanted)


def counted(cast, made: list):
    def counting(experts, *rest) -> list[Tensor]:
        made.append(cast(experts, *rest))
        return made[-1]

    return counting


@mark.parametrize("limits", LIMITS)
def test_the_host_reads_nothing_from_a_gpu(limits: str):
    """Forward from gate to combine, with and without a mask: whatever needs a value on the host raises."""
    mode = FakeTensorMode()
    moe = token_layer(**LIMITS[limits]).float()
    for module in moe.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = mode.from_tensor(value.detach())
                with mode:
                    module._parameters[name] = nn.Parameter(fake.to("cuda"))
    with mode, torch.no_grad():
        x = torch.randn(2, 9, WIDTH, device="cuda")
        for given in ((x,), (x, torch.zeros(2, 9, device="cuda", dtype=torch.bool))):
            out = moe(*given)
            assert (out.device.type, out.shape) == ("cuda", (2, 9, WIDTH))
        with raises(DataDependentOutputException):
            out[0, 0, 0].item()


def test_gated_halves_are_put_in_order_without_losing_gradients():
    """timm's gate_last has the activated half last: the gradient of fc1 comes back in its own order."""
    torch.manual_seed(0)
    moe = FusedMLPMoE.from_mlp(GluMlp(WIDTH, HIDDEN).double(), 1, 1)
    mlp, x = moe.expert(0), tokens()
    moe(x).square().sum().backward()
    mlp(x).square().sum().backward()
    torch.testing.assert_close(moe.experts[0].fc1.weight.grad, mlp.fc1.weight.grad, rtol=BOUND, atol=BOUND)
