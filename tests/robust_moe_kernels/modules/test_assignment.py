"""Limited buffers, expert choice and padding: which tokens pass by, against the published algorithms as loops."""

from __future__ import annotations

import torch
from pytest import mark, raises
from token_layers import BOUND, EXPERTS, WIDTH, tokens
from token_layers import token_layer as layer
from torch import Tensor

from robust_moe_kernels import FusedMLPMoE, balance_loss
from robust_moe_kernels.modules import BALANCE_LOSSES, FixedRoutes, RouteOptions, SwapTop, last_routes, rerouted

CASES = {  # k, capacity
    "ample": (2, 2.0 * EXPERTS),
    "k=1": (1, 1.0),
    "k=2": (2, 1.0),
    "scarce": (2, 0.4),
    "k=E": (4, 0.5),
}


def served(indices: Tensor, scores: Tensor, buffer: int, priority: str, padding: Tensor | None = None) -> Tensor:
    """Algorithms 1 and 2 of 2106.05974, appendix C: whether each pair [N, k] finds a place."""
    order = list(range(len(indices)))
    if priority == "batch":
        order.sort(key=lambda token: -scores[token].max().item())
    counts, found = [0] * scores.shape[1], torch.zeros_like(indices, dtype=torch.bool)
    for slot in range(indices.shape[1]):
        for token in order:
            expert = int(indices[token, slot])
            if (padding is None or not padding[token]) and counts[expert] < buffer:
                counts[expert] += 1
                found[token, slot] = True
    return found


def assert_equals_kept_pairs(moe: FusedMLPMoE, x: Tensor, kept: Tensor, options: dict) -> None:
    """Output and gradients of the pairs that are left, each expert on its tokens alone."""
    record = moe.routing
    weights = moe.route_options.weigh(record.scores.gather(1, record.indices))
    if options.get("choice") == "expert":
        weights = record.scores.gather(1, record.indices)
    wanted = torch.zeros(len(x), WIDTH, dtype=x.dtype)
    for expert in range(EXPERTS):
        rows, slots = ((record.indices == expert) & kept).nonzero(as_tuple=True)
        wanted = wanted.index_add(0, rows, weights[rows, slots, None] * moe.experts[expert](x[rows]))
    inputs = (x, *moe.parameters())
    direction = torch.randn_like(wanted)
    found = torch.autograd.grad((wanted * direction).sum(), inputs, allow_unused=True, materialize_grads=True)
    out = moe(x)
    torch.testing.assert_close(out, wanted, rtol=BOUND, atol=BOUND)
    got = torch.autograd.grad((out * direction).sum(), inputs)
    for one, other in zip(got, found, strict=True):
        torch.testing.assert_close(one, other, rtol=BOUND, atol=BOUND)


@mark.parametrize("impl", ["auto", "reference"])
@mark.parametrize("priority", ["batch", "vanilla"])
@mark.parametrize("case", CASES)
def test_capacity_equals_the_published_algorithms(case: str, priority: str, impl: str):
    top_k, capacity = CASES[case]
    options = {"capacity": capacity, "priority": priority, "impl": impl}
    moe, x = layer(top_k, **options), tokens().requires_grad_()
    moe(x)
    record = moe.routing
    buffer = round(capacity * top_k * len(x) / EXPERTS)
    kept = served(record.indices, record.scores, buffer, priority)
    assert (case == "ample") == bool(kept.all())
    assert torch.equal(record.dropped, ~kept)
    assert record.dropped_count().item() == (~kept).sum()
    assert not record.weights[~kept].any()
    assert int(record.indices.max()) < EXPERTS
    assert_equals_kept_pairs(moe, x, kept, options)


def test_the_important_are_served_first():
    """One expert, with room for half of the tokens: those with the larger scores, or the first ones."""
    x = tokens(8)
    for priority in ("batch", "vanilla"):
        moe = layer(1, capacity=0.5, priority=priority)
        moe.experts.keep([0, 1])
        moe.gate.fc.weight = torch.nn.Parameter(moe.gate.fc.weight.detach()[:2])
        with torch.no_grad():
            moe.gate.fc.weight[1] = moe.gate.fc.weight[0] - 1e-3 * torch.randn(WIDTH, dtype=torch.float64)
        moe(x)
        first = moe.routing.indices[:, 0]
        for expert in range(2):
            mine = (first == expert).nonzero()[:, 0].tolist()
            best = sorted(mine, key=lambda token: -moe.routing.scores[token].max().item())
            left = set((best if priority == "batch" else mine)[:2])
            assert {token for token in mine if not moe.routing.dropped[token, 0]} == left


@mark.parametrize("impl", ["auto", "reference"])
@mark.parametrize("capacity", [None, 0.5, 100.0])
def test_expert_choice_equals_its_definition(capacity: float | None, impl: str):
    options = {"choice": "expert", "capacity": capacity, "impl": impl}
    moe, x = layer(2, **options), tokens().requires_grad_()
    moe(x)
    record = moe.routing
    buffer = min(round((capacity or 1.0) * 2 * len(x) / EXPERTS), len(x))
    chosen = torch.zeros_like(record.scores, dtype=torch.bool)
    for expert in range(EXPERTS):
        chosen[record.scores[:, expert].topk(buffer).indices, expert] = True
    assert record.indices.sort(1).values.equal(torch.arange(EXPERTS).expand(len(x), -1))
    assert torch.equal(~record.dropped, chosen.gather(1, record.indices))
    assert (record.weights.diff(dim=1) <= 0).all()  # best first, then those that did not choose the token
    assert_equals_kept_pairs(moe, x, ~record.dropped, options)


def test_a_token_that_nobody_computes_gets_zero():
    moe, x = layer(1, capacity=0.01), tokens().requires_grad_()
    out = moe(x)
    nobody = moe.routing.dropped.all(1)
    assert nobody.sum() == len(x) - moe.routing.indices.unique().numel()  # a buffer has one place at least
    assert not out[nobody].any()
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert not gradient[nobody].any()
    assert gradient[~nobody].any(1).all()


def test_imposed_routes_are_computed_whatever_the_buffers_hold():
    moe, x = layer(2, capacity=0.4), tokens()
    out = moe(x)
    routes = last_routes(moe)[""]
    with rerouted(moe, routes):  # a pair that was dropped weighs 0
        torch.testing.assert_close(moe(x), out, rtol=BOUND, atol=BOUND)
        assert moe.routing.dropped is None
    with rerouted(moe, FixedRoutes(routes.indices)):
        assert (moe.routing.weights == 0).any()
        moe(x)
        assert (moe.routing.weights > 0).all()
    with rerouted(moe, SwapTop()):
        assert moe(x).isfinite().all()


@mark.parametrize(
    ("option", "message"),
    [
        ({"capacity": 0}, "capacity: expected a finite number > 0, or None, got 0"),
        ({"capacity": -1.0}, "capacity: expected a finite number > 0, or None, got -1.0"),
        ({"capacity": float("inf")}, "capacity: expected a finite number > 0, or None, got inf"),
        ({"capacity": True}, "capacity: expected a finite number > 0, or None, got True"),
        ({"priority": "random"}, "priority: expected one of batch, vanilla, got 'random'"),
        ({"choice": "both"}, "choice: expected one of token, expert, got 'both'"),
    ],
)
def test_settings_out_of_range_are_refused(option: dict, message: str):
    with raises(ValueError, match=f"^{message}$"):
        RouteOptions(**option)


# --- padding ----------------------------------------------------------------------------------------------------------


LIMITS = [{}, {"capacity": 0.6}, {"capacity": 0.6, "priority": "vanilla"}, {"choice": "expert"}]
STATISTICS = ("mean_scores", "argmax_fraction", "mean_entropy", "mean_square_lse")


@mark.parametrize("options", LIMITS, ids=str)
@mark.parametrize("impl", ["auto", "reference"])
def test_padding_is_as_if_it_were_not_there(options: dict, impl: str):
    """Against the layer on the other tokens alone, whose buffers are made as large: they count all rows."""
    moe, x = layer(2, impl=impl, **options), tokens(24).view(2, 12, WIDTH)
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 5:] = padding[1, 9:] = True
    x = x.masked_fill(padding[..., None], torch.nan).requires_grad_()  # its numbers are not read
    out = moe(x, padding)
    record = moe.routing
    assert not out[padding].any()
    assert record.dropped.view(2, 12, -1)[padding].all()

    alone = layer(2, impl=impl, **options)
    left = x.detach()[~padding].requires_grad_()
    if alone.route_options.limits:
        alone.capacity = (moe.capacity or 1.0) * 24 / len(left)
    wanted = alone(left)
    torch.testing.assert_close(out[~padding], wanted, rtol=BOUND, atol=BOUND)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(record, name), getattr(alone.routing, name), rtol=BOUND, atol=BOUND)
    assert record.dropped_count() == alone.routing.dropped_count()
    (gradient,) = torch.autograd.grad(out.sin().sum(), x)
    (expected,) = torch.autograd.grad(wanted.sin().sum(), left)
    torch.testing.assert_close(gradient[~padding], expected, rtol=BOUND, atol=BOUND)
    assert not gradient[padding].any()


def test_padding_with_a_fixed_expert_and_with_imposed_routes():
    moe, x = layer(), tokens(6)
    padding = torch.tensor([False, True, False, False, True, False])
    x[padding] = torch.nan
    moe.fixed_expert = 2
    out = moe(x, padding)
    assert not out[padding].any()
    torch.testing.assert_close(out[~padding], moe.experts[2](x[~padding]), rtol=BOUND, atol=BOUND)
    record = moe.routing
    assert record.dropped[:, 0].equal(padding)
    moe(x[~padding])
    for name in STATISTICS:
        torch.testing.assert_close(getattr(record, name), getattr(moe.routing, name), rtol=BOUND, atol=BOUND)
    moe.fixed_expert = None
    with rerouted(moe, SwapTop()):
        out = moe(x, padding)
        assert not out[padding].any()
        torch.testing.assert_close(out[~padding], moe(x[~padding]), rtol=BOUND, atol=BOUND)
    with (
        rerouted(moe, FixedRoutes(torch.full((6, 1), EXPERTS), torch.ones(6, 1))),
        raises(ValueError, match="expected experts in"),
    ):
        moe(x, padding)


@mark.parametrize("shape", [(2,), (3, 2), (2, 3, 12), (6,)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]):
    with raises(ValueError, match=r"padding_mask: expected shape \[2, 3\] \(that of x without its channels\)"):
        layer()(tokens(6).view(2, 3, WIDTH), torch.zeros(shape, dtype=torch.bool))


def test_a_mask_of_numbers_is_refused():
    with raises(TypeError, match="padding_mask: expected dtype bool, got int64"):
        layer()(tokens(6), torch.zeros(6, dtype=torch.int64))


def test_nothing_but_padding():
    moe = layer().train()
    x = tokens(5).requires_grad_()
    out = moe(x, torch.ones(5, dtype=torch.bool))
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()
    assert moe.routing.mean_scores.isfinite().all()


@mark.parametrize("kind", BALANCE_LOSSES)
def test_balance_losses_of_nothing_but_padding_are_finite(kind: str):
    moe = layer().train()
    moe.noise, moe.noise_std = "vmoe", 1.0
    moe(tokens(5), torch.ones(5, dtype=torch.bool))
    loss = balance_loss(moe, kind)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(moe.gate.parameters())))


@mark.parametrize(("impl", "masked"), [("auto", True), ("reference", True), ("reference", False)])
def test_the_entropy_s_gradient_is_finite_where_a_score_underflows(impl: str, masked: bool):
    moe, x = layer(impl=impl), tokens(6)
    with torch.no_grad():
        moe.gate.fc.weight *= 1e4
    moe(x, torch.zeros(6, dtype=torch.bool) if masked else None)
    assert (moe.routing.scores == 0).any()
    (gradient,) = torch.autograd.grad(balance_loss(moe, "entropy_released"), moe.gate.fc.weight)
    fused = layer()
    fused.load_state_dict(moe.state_dict())
    fused(x)
    (wanted,) = torch.autograd.grad(balance_loss(fused, "entropy_released"), fused.gate.fc.weight)
    torch.testing.assert_close(gradient, wanted, rtol=BOUND, atol=BOUND)
