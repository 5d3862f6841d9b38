"""Routes imposed on layers: against mixtures written out expert by expert, on the engine (float32) and by segments
(float64), for convolutions, residual blocks and whole networks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock
from whole_networks import Networks

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules import (
    AllExperts,
    DropTop,
    FixedRoutes,
    MoELayer,
    RandomRoutes,
    SoftGradient,
    SwapTop,
    attack_mode,
    last_routes,
    rerouted,
)

B, E, C = 6, 4, 8


def networks(top_k: int = 2, experts: int = E, **options) -> MoELayer:
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(C * 25, 3)) for _ in range(experts)]
    gate = nn.Sequential(nn.Flatten(), nn.Linear(C * 25, experts))
    return MoELayer(gate, Networks(heads, C), top_k, **options)


def conv(top_k: int = 2, experts: int = E, **options) -> MoELayer:
    return FusedConvMoE.from_conv(nn.Conv2d(C, 5, 3, padding=1), experts, top_k, init="fresh", **options)


def block(top_k: int = 2, experts: int = E, **options) -> MoELayer:
    layer = FusedBlockMoE.from_block(BasicBlock(C, C), experts, top_k, init="fresh", **options)
    for expert in layer.experts:
        for norm in (expert.bn1, expert.bn2):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
    return layer


LAYERS: dict[str, Callable[..., MoELayer]] = {"networks": networks, "conv": conv, "block": block}


@pytest.fixture(params=LAYERS)
def kind(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request) -> torch.dtype:
    return request.param


def made(kind: str, *args, dtype: torch.dtype = torch.float64, **options) -> MoELayer:
    torch.manual_seed(0)
    layer = LAYERS[kind](*args, **options).to(dtype).eval().requires_grad_(False)
    gate = layer.gate[1] if kind == "networks" else layer.gate.fc
    nn.init.normal_(gate.weight, 0, 0.3 if kind == "networks" else 3.0)  # different samples to different experts
    return layer


def images(count: int = B, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, C, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def by_hand(layer: MoELayer, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights[b, j] * e_{indices[b, j]}(x_b), all experts on all samples."""
    outputs = torch.stack([layer.experts.one(e, x) for e in range(layer.num_experts)], 1)
    picked = outputs[torch.arange(len(x))[:, None], indices]  # [B, n, ...]
    return (picked * weights.view(*weights.shape, *[1] * (picked.ndim - 2))).sum(1)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    (gradient,) = torch.autograd.grad((y * torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)).sum(), x)
    return y.detach(), gradient


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Sums of at most 200 products of two layers: some hundred roundings at the size of the largest value."""
    for a, b in zip(actual, expected, strict=True):
        bound = 500 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * b.abs().max().item())


def scores_of(layer: MoELayer, x: Tensor) -> Tensor:
    return layer.gate(x).softmax(1)


ROUTES = torch.tensor([[0, 1], [1, 0], [3, 2], [3, 0], [2, 1], [0, 3]])
WEIGHTS = torch.tensor([[0.7, 0.3], [0.2, 0.9], [1.0, 0.0], [0.5, 0.5], [-0.4, 0.1], [0.3, 0.3]], dtype=torch.float64)


# --- held ---------------------------------------------------------------------------------------------------------


def test_held_routes_are_a_model_without_a_gate(kind, dtype):
    """Output and gradient: nothing reaches the gate."""
    layer, x, weights = made(kind, dtype=dtype), images(dtype=dtype), WEIGHTS.to(dtype)
    with rerouted(layer, FixedRoutes(ROUTES, weights)):
        got = with_gradient(layer, x)
    assert_close(got, with_gradient(lambda at: by_hand(layer, at, ROUTES, weights), x))
    assert not torch.equal(layer.routing.scores.argmax(1), ROUTES[:, 0])
    assert torch.equal(layer.routing.indices, ROUTES)
    torch.testing.assert_close(layer.routing.scores, scores_of(layer, x))  # what the gate would have said


def kept(scores: Tensor) -> Tensor:
    return scores


def renormalized(scores: Tensor) -> Tensor:
    return scores / scores.sum(1, keepdim=True)


def straight_through(scores: Tensor) -> Tensor:
    return 1 + scores - scores.detach()


RULES = {
    "renormalized": ({"top_k": 2}, renormalized),
    "kept": ({"top_k": 2, "renormalize": False}, kept),
    "straight through": ({"top_k": 1}, straight_through),
    "hard": ({"top_k": 1, "renormalize": False, "straight_through": False}, kept),
}


@pytest.mark.parametrize(("options", "rule"), RULES.values(), ids=RULES)
def test_held_experts_weighted_by_the_gate(kind, options, rule):
    """By the layer's own rule and with its gradient."""
    layer, x = made(kind, **options), images()
    routes = ROUTES[:, : options["top_k"]]
    with rerouted(layer, FixedRoutes(routes)):
        got = with_gradient(layer, x)
    expected = with_gradient(lambda at: by_hand(layer, at, routes, rule(scores_of(layer, at).gather(1, routes))), x)
    assert_close(got, expected)
    with rerouted(layer, FixedRoutes(routes, layer.routing.weights)):
        frozen = with_gradient(layer, x)
    assert torch.equal(frozen[0], got[0])
    assert not torch.allclose(frozen[1], got[1])


def test_a_samples_own_routes_change_nothing(kind, dtype):
    layer, x = made(kind, dtype=dtype), images(dtype=dtype)
    expected = layer(x)
    with rerouted(layer, last_routes(layer)):
        assert torch.equal(layer(x), expected)


def test_last_routes_are_constants_of_the_last_forward(kind):
    layer = made(kind)
    with pytest.raises(RuntimeError, match="model: expected a forward through 'the layer' first, got none"):
        last_routes(layer)
    layer(images().requires_grad_())
    (route,) = last_routes(layer).values()
    assert torch.equal(route.indices, layer.routing.indices)
    assert torch.equal(route.weights, layer.routing.weights)
    assert not route.weights.requires_grad
    assert layer.routing.weights.requires_grad


def test_routes_of_another_batch_are_refused(kind):
    layer = made(kind)
    with (
        pytest.raises(ValueError, match="indices: expected routes for the 5 samples, got 6"),
        rerouted(layer, FixedRoutes(ROUTES)),
    ):
        layer(images(5))
    with pytest.raises(ValueError, match=r"weights: expected shape \[6, 2\], that of indices, got \[6, 1\]"):
        FixedRoutes(ROUTES, WEIGHTS[:, :1])
    with pytest.raises(ValueError, match=r"indices: expected shape \[B, n\], got \[6\]"):
        FixedRoutes(ROUTES[:, 0])


# --- protocols ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_dropping_the_best_expert(kind, top_k):
    """As if its logit were minus infinity."""
    layer, x = made(kind, top_k), images()
    with rerouted(layer, DropTop()):
        got = with_gradient(layer, x)

    def expected(at: Tensor) -> Tensor:
        logits = layer.gate(at)
        logits = logits.masked_fill(logits == logits.amax(1, keepdim=True), -torch.inf)
        top, indices = logits.softmax(1).topk(min(top_k, E - 1), dim=1)
        weights = straight_through(top) if top_k == 1 else top / top.sum(1, keepdim=True)
        if top_k == 1:  # the straight-through gradient is that of the score among all experts
            weights = straight_through(scores_of(layer, at).gather(1, indices))
        return by_hand(layer, at, indices, weights)

    assert_close(got, with_gradient(expected, x))


@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_swapping_the_two_best(kind, top_k):
    layer, x = made(kind, top_k), images()
    layer(x)
    order, weights = scores_of(layer, x).argsort(1, descending=True), layer.routing.weights
    with rerouted(layer, SwapTop()):
        got = layer(x)
    order[:, :2] = order[:, :2].flip(1)
    assert torch.equal(layer.routing.indices, order[:, :top_k])
    assert_close((got,), (by_hand(layer, x, order[:, :top_k], weights),))


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_random_routes(kind, top_k):
    layer, x = made(kind, top_k), images()
    layer(x)
    weights = layer.routing.weights
    index = torch.tensor([5, 9, 0, 2**40, 7, 1])
    with rerouted(layer, RandomRoutes(index, seed=3)):
        got = layer(x)
    routes = layer.routing.indices
    assert all(len(set(row)) == top_k for row in routes.tolist())
    assert_close((got,), (by_hand(layer, x, routes, weights),))
    with rerouted(layer, RandomRoutes(index[2:4], seed=3)):  # of the samples' own numbers, not of the batch
        layer(x[:2])
    assert torch.equal(layer.routing.indices, routes[2:4])


@pytest.mark.parametrize("top_k", [1, 2])
def test_random_routes_are_uniform_and_keyed(top_k):
    layer, count = made("networks", top_k), 4096
    x = torch.zeros(count, C, 5, 5, dtype=torch.float64)
    found = {}
    for key in ((0, 0), (1, 0), (0, 1)):
        with rerouted(layer, RandomRoutes(torch.arange(count), *key)):
            layer(x)
        found[key] = layer.routing.indices
        for place in range(top_k):
            counts = found[key][:, place].bincount(minlength=E)
            # binomial: 1024 ± 28; five deviations
            assert (counts - count / E).abs().max() < 5 * (count * (1 / E) * (1 - 1 / E)) ** 0.5
    for other in ((1, 0), (0, 1)):  # independent: they agree as often as chance has it
        same = (found[other] == found[0, 0]).double().mean().item()
        assert abs(same - 1 / E) < 0.05


def test_all_experts_are_the_soft_mixture(kind, dtype):
    layer, x = made(kind, dtype=dtype), images(dtype=dtype)
    with rerouted(layer, AllExperts()):
        got = with_gradient(layer, x)
    everyone = torch.arange(E).expand(B, E)
    assert_close(got, with_gradient(lambda at: by_hand(layer, at, everyone, scores_of(layer, at)), x))


@pytest.mark.parametrize(("options", "rule"), RULES.values(), ids=RULES)
def test_the_soft_gradient_of_a_hard_choice(kind, dtype, options, rule):
    """Forward what the layer does, on the engine bit for bit; backward the held experts' gradient plus what all experts
    give the gate."""
    layer, x = made(kind, dtype=dtype, **options), images(dtype=dtype)
    plain = layer(x)
    indices, weights = layer.routing.indices, layer.routing.weights
    with rerouted(layer, SoftGradient()):
        got = with_gradient(layer, x)
    assert_close(got[:1], (plain,))
    if kind != "networks" and dtype == torch.float32:
        assert torch.equal(got[0], plain)
    everyone = torch.arange(E).expand(B, E)

    def expected(at: Tensor) -> Tensor:
        scores = scores_of(layer, at)
        outputs = by_hand(layer, at.detach(), everyone, scores)
        return by_hand(layer, at, indices, weights) + outputs - outputs.detach()

    assert_close(got, with_gradient(expected, x))


@pytest.mark.parametrize("reroute", [DropTop(), SwapTop()], ids=["DropTop", "SwapTop"])
def test_one_expert_has_no_other(kind, reroute):
    layer = made(kind, 1, 1)
    name = type(reroute).__name__
    with (
        pytest.raises(ValueError, match=f"{name}: expected a layer with at least 2 experts, got 1"),
        rerouted(layer, reroute),
    ):
        layer(images())


@pytest.mark.parametrize("reroute", [RandomRoutes(torch.arange(B)), AllExperts(), SoftGradient()], ids=str)
def test_one_expert_is_always_chosen(kind, reroute):
    layer = made(kind, 1, 1)
    expected = layer(images())
    with rerouted(layer, reroute):
        assert torch.equal(layer(images()), expected)


# --- scope --------------------------------------------------------------------------------------------------------


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(made("block", dtype=torch.float32), nn.ReLU(), made("block", 1, dtype=torch.float32))


def test_imposed_on_all_or_on_those_named_and_taken_back():
    model, x = stack(), images(dtype=torch.float32)
    plain = model(x)
    outer, inner = SwapTop(), DropTop()
    with rerouted(model, outer):
        assert [model[0].reroute, model[2].reroute] == [outer, outer]
        swapped = model(x)
        with pytest.raises(KeyError), rerouted(model, {"2": inner}):
            assert [model[0].reroute, model[2].reroute] == [outer, inner]
            raise KeyError
        assert torch.equal(model(x), swapped)
    assert [model[0].reroute, model[2].reroute] == [None, None]
    assert torch.equal(model(x), plain)
    assert not torch.equal(swapped, plain)
    with rerouted(model, {}):
        assert torch.equal(model(x), plain)


def test_unknown_names_and_dense_models_are_refused():
    model = stack()
    message = "reroute: expected names of layers ('0', '2'), got '1'"
    with pytest.raises(ValueError) as error, rerouted(model, {"0": SwapTop(), "1": SwapTop()}):
        pass
    assert str(error.value) == message
    assert model[0].reroute is None
    with (
        pytest.raises(ValueError, match="model: expected at least one mixture-of-experts layer, got none"),
        rerouted(nn.ReLU(), SwapTop()),
    ):
        pass


def test_a_fixed_expert_stays(kind):
    layer = made(kind)
    layer.fixed_expert = 2
    expected = layer(images())
    with rerouted(layer, DropTop()):
        assert torch.equal(layer(images()), expected)


def test_copies_made_inside_are_free():
    layer = made("block")
    with rerouted(layer, FixedRoutes(ROUTES, WEIGHTS)):
        clone = copy.deepcopy(layer)
    assert clone.reroute is None
    assert torch.equal(clone(images()), layer(images()))


@pytest.mark.parametrize("inside", ["attack_mode", "rerouted"])
def test_goes_with_attack_mode_in_either_order(inside):
    model, x = stack(), images(dtype=torch.float32)
    with rerouted(model, DropTop()):
        expected = with_gradient(model, x)
    first, second = attack_mode(model), rerouted(model, DropTop())
    outer, inner = (second, first) if inside == "attack_mode" else (first, second)
    before = model[0].routing
    with outer, inner:
        assert model[0].experts.folded is not None
        got = with_gradient(model, x)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert model[0].routing is before
    assert model[0].reroute is None


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "reroute",
    [
        FixedRoutes(ROUTES),
        FixedRoutes(ROUTES, WEIGHTS),
        DropTop(),
        SwapTop(),
        RandomRoutes(torch.arange(B)),
        AllExperts(),
        SoftGradient(),
    ],
    ids=lambda reroute: type(reroute).__name__,
)
def test_nothing_is_read_on_the_host(reroute):
    layer, x = made("block", dtype=torch.float32), images(dtype=torch.float32).requires_grad_()
    with Operations() as ran, rerouted(layer, reroute):
        torch.autograd.grad(layer(x).sum(), x)
        last_routes(layer)
    assert "robust_moe_kernels::head_forward" in ran.names  # the engine
    assert not ran.names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select"}


def test_a_reroute_may_be_a_module_and_is_no_part_of_the_layer():
    class Last(nn.Module):
        def forward(self, options, record):
            index = torch.full_like(record.indices[:, :1], record.scores.shape[1] - 1)
            return index, torch.ones_like(index, dtype=record.weights.dtype)

    layer = FusedConvMoE.from_conv(nn.Conv2d(3, 4, 3, padding=1), num_experts=3)
    before = list(layer.state_dict())
    with rerouted(layer, Last()):
        layer(torch.rand(2, 3, 4, 4))
        assert layer.routing.indices.tolist() == [[2], [2]]
        assert list(layer.state_dict()) == before
    assert layer.reroute is None
