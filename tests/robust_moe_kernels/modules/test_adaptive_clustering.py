"""The adaptive clustering gate: the paper's formula a token at a time as oracle, its running spreads, and its links."""

from __future__ import annotations

import copy
import pickle
import re

import torch
from linked_layers import (
    EXPERTS,
    FLOOR,
    WIDTH,
    Blocks,
    linked,
    plain_diagonal,
    plain_layer,
    plain_spread,
    tokens,
)
from pytest import mark, raises, warns
from timm.layers.mlp import Mlp
from torch import Tensor

from robust_moe_kernels.modules import (
    AdaptiveClusteringGate,
    FixedRoutes,
    FusedMLPMoE,
    Momentum,
    attack_mode,
    general_path,
    link_layers,
    prune_experts,
    replace_mlps,
    rerouted,
)
from robust_moe_kernels.ops.expert_mlp import EXPERT_MLP

BOUND = 1e4 * torch.finfo(torch.float64).eps
GATE = "adaptive_clustering"


def plain_forward(model: Blocks, x: Tensor, running: dict[tuple[int, int], list[float]] | None) -> Tensor:
    """The network with the spreads of this batch, or with ``running`` ones by layer and cluster."""
    before: list[int] | None = None
    for number, layer in enumerate(model.blocks):
        rows = model.seen(x).reshape(-1, WIDTH)
        factors = None
        if before is not None:
            if running is None:
                spreads = [plain_spread(rows, before, cluster) for cluster in range(EXPERTS)]
            else:
                spreads = [running.get((number, cluster)) for cluster in range(EXPERTS)]
            factors = torch.stack([plain_diagonal(spreads[cluster]) for cluster in before])
        out, before = plain_layer(layer, rows, factors)
        x = x + out.reshape(x.shape)
    return x


def gradients(function, model: Blocks, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5)))
    found = {"out": out.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- what it computes -------------------------------------------------------------------------------------------------


@mark.parametrize("impl", ["auto", "reference"])
@mark.parametrize("top_k", [1, 2])
def test_training_is_the_papers_formula_of_the_batch(top_k: int, impl: str):
    model, x = linked(top_k=top_k, gate=GATE, impl=impl), tokens(4, 6)
    found = gradients(model, model, x)
    wanted = gradients(lambda x: plain_forward(model, x, None), model, x)
    assert {f"blocks.{n}.gate.fc.weight" for n in range(3)} <= wanted.keys() <= found.keys()
    for name, value in found.items():
        other = wanted.get(name, torch.zeros_like(value))  # an expert without rows
        torch.testing.assert_close(value, other, rtol=BOUND, atol=BOUND, msg=lambda t, name=name: f"{name}: {t}")
    assert not torch.allclose(found["out"], linked(top_k=top_k)(x))  # it is another router


def test_evaluation_takes_running_means():
    """Of the first batches the mean, from the 1/rate-th on an exponential one; clusters that a batch has not, keep
    theirs."""
    model = linked(2, 1, gate=lambda width, experts: AdaptiveClusteringGate(width, experts, rate=0.4))
    running: dict[tuple[int, int], list[float]] = {}
    seen = dict.fromkeys(range(EXPERTS), 0)
    first, second = model.layers
    inputs: list[Tensor] = []
    hook = second.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, WIDTH)))
    with torch.no_grad():
        for seed in range(5):
            model(tokens(2, 4, seed=seed))
            rows, clusters = inputs[-1], first.routing.indices[:, 0].tolist()
            for cluster in range(EXPERTS):
                spread = plain_spread(rows, clusters, cluster)
                if spread is None:
                    continue
                seen[cluster] += 1
                weight = max(0.4, 1 / seen[cluster])
                old = running.get((1, cluster), [0.0] * WIDTH)
                running[1, cluster] = [(1 - weight) * a + weight * b for a, b in zip(old, spread, strict=True)]
    hook.remove()
    assert second.gate.seen.tolist() == list(seen.values())
    assert len(set(seen.values())) > 1  # of some cluster some batch had fewer than two tokens
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = tokens(4, 6)
    found = gradients(model, model, x)
    wanted = gradients(lambda x: plain_forward(model, x, running), model, x)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=BOUND, atol=BOUND, msg=lambda t, name=name: f"{name}: {t}")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_gradients_take_m_for_a_constant():
    """The derivative along x of the sum is that of the formula with the spreads held, not of the formula."""
    model, x = linked(2, gate=GATE).eval(), tokens(2, 3)
    assert torch.autograd.gradcheck(model, (x.requires_grad_(),))
    gate = linked(2, gate=GATE).layers[1].gate.train()
    rows = tokens().reshape(-1, WIDTH).requires_grad_()
    clusters = torch.arange(15) % 3
    logits = gate(rows, clusters)
    (found,) = torch.autograd.grad(logits.sum(), rows)
    factors = torch.stack([plain_diagonal(plain_spread(rows.detach(), clusters.tolist(), k)) for k in range(EXPERTS)])
    torch.testing.assert_close(found, gate.fc.weight.sum(0) * factors[clusters], rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(logits, (rows * factors[clusters]) @ gate.fc.weight.T, rtol=BOUND, atol=BOUND)


ROWS = torch.tensor([[1.0, 2, 3, 4, 5, 6], [3.0, 2, 3, 0, 5, 6], [9.0, 9, 9, 9, 9, 9], [7.0, 7, 7, 7, 7, 7]]).double()


@mark.parametrize(
    ("clusters", "diagonals"),
    [
        # two rows: spreads 1, 0, 0, 2, 0, 0, of mean 1/2; the floor is 1/20: 1, 20, 20, 1/2, 20, 20
        ([0, 0, 1, 2], {0: [1.0, 20, 20, 0.5, 20, 20], 1: [1.0] * 6, 2: [1.0] * 6}),  # of one row: the identity
        ([1, 1, 3, 3], {1: [1.0, 20, 20, 0.5, 20, 20], 3: [1.0] * 6}),  # equal spreads: the identity
        ([0, 1, 2, 3], {k: [1.0] * 6 for k in range(4)}),
    ],
)
def test_diagonals_by_hand(clusters: list[int], diagonals: dict[int, list[float]]):
    gate = linked(2, gate=GATE).layers[1].gate
    found = gate._factors(ROWS, torch.tensor(clusters), None)
    for cluster, diagonal in diagonals.items():
        wanted = torch.tensor(diagonal).double()
        torch.testing.assert_close(found[cluster], wanted / wanted.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.mean(1), torch.ones(4).double(), rtol=1e-12, atol=0)
    assert found.max() <= 1 + 1 / FLOOR


@mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
@mark.parametrize("same", [True, False], ids=["equal rows", "different rows"])
def test_no_scale_of_the_tokens_changes_m(scale: float, same: bool):
    gate = linked(2, gate=GATE).layers[1].gate
    rows = ROWS[:1].expand(4, WIDTH) if same else ROWS
    clusters = torch.tensor([0, 0, 1, 1])
    found = gate._factors(rows * scale, clusters, None)
    wanted = torch.ones_like(found) if same else gate._factors(ROWS, clusters, None)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_padding_is_in_no_cluster():
    model, x = linked(2, gate=GATE), tokens(4, 6)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[:, 4:] = True
    other = x.clone()
    other[padding] = torch.nan
    outputs = []
    for given in (x[:, :4], x, other):
        twin_model = copy.deepcopy(model)
        mask = None if given.shape[1] == 4 else padding
        twin_model.layers[0](given, mask)
        out = twin_model.layers[1](given, mask)
        outputs.append((out[:, :4], *(getattr(twin_model.layers[1].gate, name) for name in ("spread", "seen"))))
    for found in outputs[1:]:
        for value, wanted in zip(found, outputs[0], strict=True):
            torch.testing.assert_close(value, wanted, rtol=BOUND, atol=BOUND)


def test_clusters_are_the_routes_that_were_taken():
    """Imposed ones, and a fixed expert, count as what the layer before has chosen."""
    model, x = linked(2, gate=GATE), tokens()
    first, second = model.layers
    routes = FixedRoutes((torch.arange(30) % EXPERTS).reshape(15, 2))
    h = model.seen(x)
    with rerouted(model, {"blocks.0": routes}):
        first(h)
        second(h)
    rows, clusters = h.reshape(-1, WIDTH), routes.indices[:, 0].tolist()
    factors = torch.stack([plain_diagonal(plain_spread(rows, clusters, cluster)) for cluster in clusters])
    wanted = (rows * factors) @ second.gate.fc.weight.T
    torch.testing.assert_close(second.routing.clean_logits, wanted, rtol=BOUND, atol=BOUND)
    first.fixed_expert = 2
    first(h)
    second(h)
    wanted = (rows * plain_diagonal(plain_spread(rows, [2] * 15, 2))) @ second.gate.fc.weight.T
    torch.testing.assert_close(second.routing.clean_logits, wanted, rtol=BOUND, atol=BOUND)
    first.fixed_expert, second.fixed_expert = None, 1
    model(x)  # an expert that is fixed takes what was left, and the next forward begins anew
    assert first.choice_place.chain.handed is None


def test_a_number_that_is_not_finite_stays_out_of_the_running_means():
    gate = linked(2, gate=GATE).layers[1].gate
    rows = ROWS.clone()
    rows[0, 2] = torch.nan
    gate._factors(rows, torch.tensor([0, 0, 1, 1]), None)
    assert gate.spread.isfinite().all()
    gate._factors(ROWS, torch.tensor([0, 0, 1, 1]), None)
    assert gate.seen.tolist() == [1, 1, 0, 0]


# --- batches and modes ------------------------------------------------------------------------------------------------

NATIVE = EXPERT_MLP.why_not("native", "cpu")


def learned(**options) -> Blocks:
    model = linked(gate=GATE, **options)
    with torch.no_grad():
        for seed in range(4):
            model(tokens(6, 6, seed=seed))
    return model


def test_whether_a_token_depends_on_its_batch():
    model = learned()
    assert [layer.batch_independent for layer in model.train().layers] == [True, False, False]
    assert [layer.batch_independent for layer in model.eval().layers] == [True, True, True]
    x = tokens(8, 6)
    alone = torch.cat([model(x[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(alone, model(x), rtol=BOUND, atol=BOUND)
    model.train()
    with attack_mode(model, "train"):
        alone = torch.cat([model(x[i : i + 1]) for i in range(8)])
        assert not torch.allclose(alone, model(x), rtol=1e-3)


@mark.skipif(NATIVE is not None, reason=f"{NATIVE}: a library sums one row in another order than many")
def test_a_token_alone_gives_the_bits_that_it_gives_in_a_batch():
    model = learned(momentum=Momentum()).float().eval()
    x = tokens(8, 6).float()

    def through(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = x + layer(x)
        return x

    assert torch.equal(torch.cat([through(x[i : i + 1]) for i in range(8)]), through(x))


@mark.parametrize("mode", ["eval", "train"])
def test_attacks_leave_the_running_means_alone(mode: str):
    model = learned()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with attack_mode(model, mode):
        with attack_mode(model, mode):
            model(tokens(seed=8))
        x = tokens(seed=9).requires_grad_()
        assert torch.autograd.grad(model(x).sum(), x)[0].any()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model(tokens(seed=9))
    assert not torch.equal(model.layers[1].gate.seen, before["blocks.1.gate.seen"])  # they move again


@mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())], ids=["vmap", "grad"])
def test_running_means_do_not_move_under_transforms(transform):
    model = learned()
    function = transform(lambda each: model(each.reshape(-1, 5, WIDTH)))
    with warns(UserWarning, match="torch.func transforms"), raises(RuntimeError, match="gate: expected eval mode, or"):
        function(tokens())
    with attack_mode(model, "train"), warns(UserWarning, match="torch.func transforms"):
        assert function(tokens()).isfinite().all()


def test_twice_differentiated_mapped_and_in_half_precision():
    model, x = learned().eval(), tokens(3)
    with warns(UserWarning, match="torch.func transforms"):
        found = torch.func.vmap(lambda each: model(each[None])[0])(x)
    torch.testing.assert_close(found, model(x), rtol=BOUND, atol=BOUND)
    with general_path():
        assert torch.autograd.gradgradcheck(model, (tokens(1, 2).requires_grad_(),))
    half = learned().to(torch.bfloat16)
    half(x.to(torch.bfloat16))
    assert half.layers[1].routing.logits.dtype == torch.float32
    single = learned().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single(x.float())
    assert single.layers[1].routing.logits.dtype == torch.float32
    exact = learned()
    exact(x)
    # the gates' inputs went through bfloat16 experts
    torch.testing.assert_close(single.layers[1].gate.spread.double(), exact.layers[1].gate.spread, rtol=0.02, atol=0.02)


@mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_into_one_graph(training: bool):
    plain = learned(depth=2, momentum=Momentum()).train(training)
    compiled = copy.deepcopy(plain)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        assert torch.equal(function(tokens(seed=seed)), plain(tokens(seed=seed)))
    for (name, value), wanted in zip(compiled.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(value, wanted), name


# --- state and links --------------------------------------------------------------------------------------------------


def test_the_state():
    model = learned()
    names = [key for key in model.state_dict() if ".gate." in key]
    assert names == [
        "blocks.0.gate.fc.weight",
        *(f"blocks.{n}.gate.{name}" for n in (1, 2) for name in ("spread", "seen", "fc.weight")),
    ]
    other = linked(gate=GATE)
    other.load_state_dict(model.state_dict())
    for twin_model in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin_model.eval()(tokens()), model.eval()(tokens()))
        twin_model.train()(tokens(seed=3))
        assert not torch.equal(twin_model.layers[1].gate.spread, model.layers[1].gate.spread)


def test_linking_anew_keeps_what_was_learned():
    model = learned()
    before = model.layers[1].gate.spread.clone()
    link_layers(model.layers, Momentum())
    assert torch.equal(model.layers[1].gate.spread, before)
    link_layers(model.layers[1:])
    assert model.layers[1].gate.clusters is None
    assert model.layers[2].gate.clusters == EXPERTS


def test_only_linked_layers_route_by_clusters():
    layer = FusedMLPMoE.from_mlp(Mlp(WIDTH, 8), EXPERTS, gate=GATE)
    with raises(ValueError, match=r"gate: expected a layer that is linked .*, got one alone"):
        layer(torch.randn(3, WIDTH))
    with raises(ValueError, match="layers: expected at least two"):
        replace_mlps(Blocks(1), "blocks.0", gate=GATE)
    gate = AdaptiveClusteringGate(WIDTH, EXPERTS)
    with raises(ValueError, match="gate: expected a gate of its own for each layer, got one of several"):
        link_layers(FusedMLPMoE.from_mlp(Mlp(WIDTH, 8), EXPERTS, gate=gate) for _ in range(2))
    model = learned()
    with raises(RuntimeError, match="layer 1 of the linked ones: expected a forward through layer 0 just before, got"):
        model.part(tokens(), 1, 3)
    model.part(tokens(), 0, 1)
    with raises(ValueError, match=r"x: expected rows of shape \[3, 5\], .*, got \[2, 5\]"):
        model.part(tokens(2), 1, 2)


def test_a_gate_put_into_a_linked_layer_has_to_follow_too():
    model, x = linked(gate="adaptive_clustering"), tokens()
    model.layers[1].gate = AdaptiveClusteringGate(WIDTH, EXPERTS).double()
    with raises(ValueError, match=r"gate: expected one that follows the layer before .*, got one that follows none"):
        model(x)
    link_layers(model.layers)
    assert model(x).isfinite().all()


def test_decisions_without_experts_follow_each_other():
    model = learned().eval()
    h = tokens()
    records = [layer.decide(h)[0] for layer in model.layers]
    first, second, third = model.layers
    first(h), second(h), third(h)
    for record, layer in zip(records, model.layers, strict=True):
        assert torch.equal(record.logits, layer.routing.logits)


@mark.parametrize(
    ("options", "words"),
    [
        ({"floor": 0.0}, "floor: expected a number in (0, 1], got 0.0"),
        ({"floor": 1.5}, "floor: expected a number in (0, 1], got 1.5"),
        ({"rate": 0.0}, "rate: expected a number in (0, 1], got 0.0"),
        ({"rate": "all"}, "rate: expected a number in (0, 1], got 'all'"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, words: str):
    with raises(ValueError, match=re.escape(words)):
        AdaptiveClusteringGate(WIDTH, EXPERTS, **options)


def test_pruned_experts_take_their_clusters_along():
    model = learned().eval()
    x = tokens(6)
    keep = [0, 2, 3]
    pruned = prune_experts(model, keep)
    wanted = replace_mlps(Blocks().double(), [f"blocks.{n}" for n in range(3)], num_experts=3, gate=GATE)
    assert {k: v.shape for k, v in wanted.state_dict().items()} == {k: v.shape for k, v in pruned.state_dict().items()}
    for number in (1, 2):
        mine, theirs = pruned.layers[number].gate, model.layers[number].gate
        assert torch.equal(mine.spread, theirs.spread[keep]) and torch.equal(mine.seen, theirs.seen[keep])
    with torch.no_grad():
        for layer in model.layers:  # the same model whose gates never choose the expert that was pruned
            layer.gate.register_forward_hook(lambda module, args, logits: logits.index_fill(1, torch.tensor([1]), -1e9))
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-9, atol=1e-9)
    part = prune_experts(model, {"blocks.1": [1, 2]})
    assert [layer.gate.clusters for layer in part.layers] == [None, EXPERTS, 2]
    part(x)
