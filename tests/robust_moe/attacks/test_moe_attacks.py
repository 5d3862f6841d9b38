"""Attacks on mixtures: closed forms on mixtures of linear networks, and what every attack obeys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations

import attack_models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_networks import linear
from wrapped_models import Counting

from robust_moe.attacks import PGD, ExpertPGD, JointPGD, RouterPGD
from robust_moe.attacks.graph import StepGraphs
from robust_moe.attacks.router import router_margin
from robust_moe.models import BasicBlock, NetworkExperts
from robust_moe_kernels.modules import FusedConvMoE, MoELayer, SwapTop, moe_layers, replace_blocks, rerouted
from robust_moe_kernels.modules.norm_knowledge import KNOWN

ATTACKS: dict[str, Callable[..., PGD]] = {"ra_e": ExpertPGD, "ra_r": RouterPGD, "joint": JointPGD}
EPS = {"Linf": 0.1, "L2": 0.6}


@pytest.fixture(params=ATTACKS)
def attack(request) -> Callable[..., PGD]:
    return ATTACKS[request.param]


def two_experts(top_k: int = 1, **options) -> MoELayer:
    """Router: expert 0 where b > 1/2, else expert 1. Expert 0: class 1 where a > 1/2; expert 1 contradicts it."""
    gate = linear([0, 20, -10], [0, -20, 10])
    agree, contradict = linear([-20, 0, 10], [20, 0, -10]), linear([20, 0, -10], [-20, 0, 10])
    hard = {"renormalize": False, "straight_through": True}  # the score's gradient reaches the router
    return MoELayer(gate, NetworkExperts([agree, contradict], 1), top_k, **{**hard, **options}).eval()


def points(*pixels: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 1, 2] of class 1."""
    return torch.tensor(pixels).view(-1, 1, 1, 2), torch.ones(len(pixels), dtype=torch.int64)


def survives(model: nn.Module, images: Tensor, y: Tensor) -> list[bool]:
    with torch.no_grad():
        return (model(images).argmax(1) == y).tolist()


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    ("pixels", "expert", "router"),
    [((0.55, 0.95), False, True), ((0.95, 0.55), True, False), ((0.55, 0.55), False, False), ((0.9, 0.9), True, True)],
    ids=["weak expert", "weak router", "both weak", "both strong"],
)
def test_each_attack_finds_its_own_weakness_and_no_other(pixels, expert, router, norm):
    """In the ball around an image pixel a alone decides the expert, pixel b alone the route."""
    model = two_experts()
    x, y = points(pixels)
    settings = {"norm": norm, "random_start": False}
    moved = x.clone()
    moved[..., 0] -= 0.1
    by_expert = ExpertPGD(0.1, 10, **settings)(model, x, y)
    torch.testing.assert_close(by_expert, moved)
    assert survives(model, by_expert, y) == [expert]
    moved = x.clone()
    moved[..., 1] -= 0.1
    by_router = RouterPGD(0.1, 10, **settings)(model, x, y)
    torch.testing.assert_close(by_router, moved)
    assert survives(model, by_router, y) == [router]


def test_scored_on_the_whole_model_which_routes_anew():
    """The frozen expert is fooled, but on the way the image is sent to another, which is right: no success."""
    gate = linear([20, 0, -10], [-20, 0, 10])  # by pixel a, like the expert itself
    agree, contradict = linear([-20, 0, 10], [20, 0, -10]), linear([20, 0, -10], [-20, 0, 10])
    model = MoELayer(gate, NetworkExperts([agree, contradict], 1), 1).eval()
    x, y = points((0.55, 0.5))
    images = ExpertPGD(0.1, 10, random_start=False)(model, x, y)
    torch.testing.assert_close(images, torch.tensor([[[[0.45, 0.5]]]]))
    assert survives(agree, images, y) == [False]
    found = ExpertPGD(0.1, 10, random_start=False).find(model, x, y)
    assert found.fooled.tolist() == [False]


def brute_force_margin(h: list[float], selected: list[int], cushion: float) -> float:
    """Lead of the j-th best other over the j-th weakest selected expert, for the first j where it is small."""
    inside = sorted(h[i] for i in selected)
    outside = sorted((value for i, value in enumerate(h) if i not in selected), reverse=True)
    leads = [other - own for own, other in zip(inside, outside, strict=False)]
    return next((lead for lead in leads if lead <= cushion), leads[-1])


@pytest.mark.parametrize("cushion", [0.0, 0.3])
@pytest.mark.parametrize(("experts", "k"), [(2, 1), (4, 1), (4, 2), (4, 3), (7, 5), (7, 2)])
def test_the_routers_margin(experts, k, cushion):
    generator = torch.Generator().manual_seed(0)
    sets = list(combinations(range(experts), k))
    h = torch.randn(60, experts, generator=generator, dtype=torch.float64)
    selected = torch.tensor([sets[i % len(sets)] for i in range(60)])
    got = router_margin(h, selected, cushion)
    expected = [brute_force_margin(*pair, cushion) for pair in zip(h.tolist(), selected.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    top = h.topk(k).indices
    assert (router_margin(h, top, cushion) < 0).all()
    # above the cushion only where as many have left as can
    left = torch.tensor([len(set(a) - set(b)) for a, b in zip(selected.tolist(), top.tolist(), strict=True)])
    assert (left[got > cushion] == min(k, experts - k)).all()
    assert (got > cushion).any()


def test_experts_are_pushed_out_one_after_the_other():
    """The gradient is that of one pair: first the weakest against the best of the others, then the next."""
    h = torch.tensor([[5.0, 3.0, 2.0, 1.0], [5.0, 1.5, 2.0, 1.0]], requires_grad=True)
    selected = torch.tensor([[0, 1], [0, 1]])
    (grad,) = torch.autograd.grad(router_margin(h, selected).sum(), h)
    assert grad.tolist() == [[0, -1, 1, 0], [-1, 0, 0, 1]]
    (grad,) = torch.autograd.grad(router_margin(h, selected, cushion=0.6).sum(), h)
    assert grad.tolist() == [[0, -1, 1, 0], [0, -1, 1, 0]]  # ahead by 0.5 is not enough


def test_no_expert_leaves_where_all_are_chosen():
    assert router_margin(torch.randn(3, 2), torch.tensor([[0, 1]] * 3)).tolist() == [0, 0, 0]


def test_layers_count_alike_whatever_the_scale_of_their_logits():
    """A loud gate that sees one pixel and a quiet one that sees the other: L2 steps go halfway between."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            experts = [linear([1, 0, 0], [0, 1, 0]) for _ in range(4)]
            self.loud = MoELayer(linear([0, 2000, 0], [0, -2000, 0]), NetworkExperts(experts[:2], 1), 1)
            self.quiet = MoELayer(linear([2, 0, 0], [-2, 0, 0]), NetworkExperts(experts[2:], 1), 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + self.quiet(x)

    x, y = points((0.5, 0.5))
    images = RouterPGD(0.1, 1, 0.1, norm="L2", random_start=False)(Two().eval(), x, y)
    torch.testing.assert_close(images, x - 0.1 / 2**0.5)


# --- the definitions, in float64 against models written out -------------------------------------------------------


def soft(top_k: int = 2, experts: int = 4, **options) -> MoELayer:
    """Small networks that look at the whole image, mixed by a router that does too."""
    torch.manual_seed(1)
    gate = nn.Sequential(nn.Flatten(), nn.Linear(72, experts))
    nn.init.normal_(gate[1].weight, 0, 0.4)
    heads = [
        nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)) for _ in range(experts)
    ]
    return MoELayer(gate, NetworkExperts(heads, 2), top_k, **options).double().eval()


def images(count: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    x *= 1.5 * torch.rand(count, 2, 1, 1, generator=generator, dtype=torch.float64)  # routes see brightness
    return x.clamp(0, 1).to(dtype), torch.arange(count) % 5


class Held(nn.Module):
    """``sum_j w_j e_{i_j}(x)`` with experts held as they are at x0, and the weights too or by the gate."""

    def __init__(self, model: MoELayer, x0: Tensor, freeze_weights: bool) -> None:
        super().__init__()
        with torch.no_grad():
            scores, self.indices = model.gate(x0).softmax(1).topk(model.top_k, dim=1)
        self.model, self.freeze_weights = model, freeze_weights
        self.weights = scores / scores.sum(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights
        if not self.freeze_weights:
            weights = self.model.gate(x).softmax(1).gather(1, self.indices)
            weights = weights / weights.sum(1, keepdim=True)
        outputs = torch.stack([network(x) for network in self.model.experts.networks], 1)
        return (weights[:, :, None] * outputs.gather(1, self.indices[:, :, None].expand(-1, -1, 5))).sum(1)


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("freeze_weights", [True, False])
def test_attacking_the_experts_is_pgd_on_the_model_with_its_routes_held(freeze_weights, norm, loss):
    model = soft()
    x, y = images()
    settings = {"norm": norm, "seed": 4, "loss": loss}
    got = ExpertPGD(EPS[norm], 6, freeze_weights=freeze_weights, **settings)(model, x, y)
    expected = PGD(EPS[norm], 6, **settings)(Held(model, x, freeze_weights), x, y)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    other = PGD(EPS[norm], 6, **settings)(Held(model, x, not freeze_weights), x, y)
    assert not torch.allclose(got, other, rtol=0, atol=1e-3)
    if freeze_weights:  # else the same until a route flips
        assert not torch.allclose(got, PGD(EPS[norm], 6, **settings)(model, x, y), rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", EPS)
def test_attacking_the_router_is_pgd_on_the_gate_as_a_classifier(norm):
    """For k = 1: with the margin loss, and the clean expert as the label."""
    model = soft(top_k=1)
    x, y = images()
    settings = {"norm": norm, "seed": 4}
    got = RouterPGD(EPS[norm], 6, **settings)(model, x, y)
    expected = PGD(EPS[norm], 6, loss="margin", **settings)(model.gate, x, model.gate(x).argmax(1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert torch.equal(got, RouterPGD(EPS[norm], 6, soft_gradient=True, **settings)(model, x, y))


def test_the_joint_attack_lies_between_its_two_losses():
    model = soft()
    x, y = images()
    settings = {"eps": 0.6, "steps": 6, "norm": "L2", "seed": 4}
    neither = JointPGD(**settings, router_weight=0.0, soft_gradient=False)(model, x, y)
    assert torch.equal(neither, PGD(**settings)(model, x, y))
    heavy = JointPGD(**settings, router_weight=1e9)(model, x, y)
    torch.testing.assert_close(heavy, RouterPGD(**settings)(model, x, y), rtol=0, atol=1e-6)
    between = JointPGD(**settings, soft_gradient=False)(model, x, y)
    (layer,) = moe_layers(model).values()
    clean = model.gate(x).topk(2, dim=1).indices
    spread = model.gate(x).std(1, correction=0)

    def losses(at: Tensor) -> tuple[float, float]:
        loss = F.cross_entropy(model(at), y).item()
        return loss, (router_margin(layer.routing.logits, clean) / spread).mean().item()

    assert losses(neither)[1] < losses(between)[1] < losses(heavy)[1]
    assert losses(heavy)[0] < losses(between)[0] < losses(neither)[0]


def test_a_hard_router_has_no_gradient_until_it_is_given_one():
    """PGD on the loss sees only expert 0, which nothing in the ball fools; the soft gradient sees that expert 1 would
    be wrong."""
    with pytest.warns(UserWarning, match="the gate gets no gradient"):
        model = two_experts(renormalize=True, straight_through=False)
    x, y = points((0.95, 0.55))
    settings = {"eps": 0.1, "steps": 10, "random_start": False}
    assert survives(model, PGD(**settings)(model, x, y), y) == [True]
    blind = JointPGD(**settings, router_weight=0.0, soft_gradient=False)(model, x, y)
    assert survives(model, blind, y) == [True]
    assert survives(model, JointPGD(**settings, router_weight=0.0)(model, x, y), y) == [False]


# --- what every attack obeys --------------------------------------------------------------------------------------


def network(top_k: int = 2, experts: int = 3) -> nn.Module:
    """A routed block and a routed convolution; in training mode but for its batch norm; one frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        BasicBlock(6, 6),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    replace_blocks(model, ["1", "3"], num_experts=experts, top_k=top_k, init="fresh")
    x, _ = images(16, torch.float32)
    for layer in (model[1], model[3]):  # experts used alike, and routes that an attack can change
        nn.init.normal_(layer.gate.fc.weight, 0, 20)
        model(x)
        layer.gate.fc.bias.data -= layer.routing.logits.detach().mean(0)
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[8].weight.grad = torch.ones_like(model[8].weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norm", EPS)
def test_in_the_ball_and_the_box(attack, norm, dtype):
    x, y = images(dtype=dtype)
    x[0], x[1] = 0.0, 1.0
    got = attack(EPS[norm], 6, norm=norm)(network().to(dtype), x, y)
    assert (got.dtype, got.shape, got.requires_grad) == (dtype, x.shape, False)
    assert got.min() >= 0
    assert got.max() <= 1
    delta = (got - x).flatten(1).double()
    reach = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    assert reach.max() <= EPS[norm] + 8 * torch.finfo(dtype).eps
    assert reach.max() > 0.8 * EPS[norm]


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_the_model_and_the_inputs_stay_as_they_were(attack, fails, state_of):
    model = network()
    x, y = images(dtype=torch.float32)
    before, generator = state_of(model), torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="y: expected labels below 5"):
            attack(0.1, 2)(model, x, y + 3)
    else:
        attack(0.1, 2)(model, x, y)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, images(dtype=torch.float32)[0])


def test_deterministic_and_keyed_by_seed(attack):
    model = network()
    x, y = images(dtype=torch.float32)
    first = attack(0.1, 4, seed=1)(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(0.1, 4, seed=1)(model, x, y), first)
    assert not torch.equal(attack(0.1, 4, seed=2)(model, x, y), first)


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("norm", EPS)
def test_independent_of_batch_size_and_order(attack, norm, restarts):
    """In float64, where a sample's own last bits stay far from any decision."""
    model = network().double().eval()
    x, _ = images(12)
    y, index = model(x).argmax(1), torch.arange(12)
    made = attack(EPS[norm], 6, norm=norm, restarts=restarts)
    whole = made(model, x, y, index)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = torch.empty_like(whole)
    for part in order.split([1, 4, 7]):
        parts[part] = made(model, x[part], y[part], index[part])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "passes"), [({}, (6, 5)), ({"restarts": 2}, (13, 10)), ({"eot_iter": 3}, (16, 15))]
)
def test_passes(attack, settings, passes):
    model = Counting(network())
    made = attack(0.1, 5, **settings)
    x, y = images(dtype=torch.float32)
    made.craft(model, x, y)
    assert made.passes == passes
    assert model.calls == passes[0]


@pytest.mark.parametrize(("top_k", "experts"), [(1, 1), (1, 3), (3, 3)])
def test_any_number_of_experts(attack, top_k, experts):
    model = network(top_k, experts).eval()
    x, y = images(dtype=torch.float32)
    found = attack(0.1, 4).find(model, x, y)
    assert torch.equal(found.fooled, model(found.images).argmax(1) != y)
    if top_k == experts and attack is RouterPGD:  # nothing to push out: the random start, and no NaN
        assert torch.equal(found.images, PGD(0.1, 0).start(x, None, 0, 0))
    if top_k == experts and attack is JointPGD:
        assert torch.equal(found.images, PGD(0.1, 4)(model, x, y))


def test_a_fixed_expert_is_no_route_to_change(attack):
    model = network().eval()
    for layer in moe_layers(model).values():
        layer.fixed_expert = 1
    x, y = images(dtype=torch.float32)
    got = attack(0.1, 4)(model, x, y)
    expected = PGD(0.1, 0 if attack is RouterPGD else 4)
    assert torch.equal(got, expected(model, x, y))


def test_routes_that_the_caller_imposes_are_held_as_they_are():
    """RA-E under imposed routes is RA-E of the model that has them built in."""
    model = network().double().eval()
    x, y = images()
    with rerouted(model, SwapTop()):
        got = ExpertPGD(0.1, 4)(model, x, y)
        model(x)
        swapped = [layer.routing.indices.clone() for layer in moe_layers(model).values()]
        assert [layer.reroute for layer in moe_layers(model).values()] == [SwapTop(), SwapTop()]
    model(x)
    assert not all(torch.equal(a, b.routing.indices) for a, b in zip(swapped, moe_layers(model).values(), strict=True))
    assert not torch.allclose(got, ExpertPGD(0.1, 4)(model, x, y), rtol=0, atol=1e-3)


def test_whole_networks_blocks_and_convolutions_alike(attack):
    x, y = images(dtype=torch.float32)
    conv = FusedConvMoE.from_conv(nn.Conv2d(2, 5, 6), 3, 1, init="fresh")
    for model in (soft().float(), nn.Sequential(conv, nn.Flatten()), network()):
        got = attack(0.1, 3)(model, x, y)
        assert (got - x).abs().max() > 0.05


def test_dense_models_are_refused(attack):
    x, y = images(dtype=torch.float32)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    with pytest.raises(ValueError, match="model: expected at least one mixture-of-experts layer, got none"):
        attack(0.1, 3)(dense, x, y)


def test_nan_stops_the_attack(attack):
    model = soft().float()
    with torch.no_grad():
        model.experts.networks[1][3].weight.fill_(torch.nan)
        model.gate[1].bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    x, y = images(dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="non-finite gradient or loss"):
        attack(0.1, 3)(model, x, y)


class Classes(nn.Module):
    """A model with another number in its logits of the second image's last class."""

    def __init__(self, model: nn.Module, value: float) -> None:
        super().__init__()
        self.model, self.value = model, value

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        logits[1, -1] = self.value
        return logits


def test_nan_of_the_classes_alone_stops_the_attack_and_a_class_ruled_out_does_not(attack):
    """The gates, which the router's attack climbs, see neither."""
    x, y = images(dtype=torch.float32)
    y = y.clamp_max(1)
    with pytest.raises(FloatingPointError, match="non-finite gradient or loss"):
        attack(0.1, 3).find(Classes(soft().float(), torch.nan), x, y)
    assert not attack(0.1, 3).craft(Classes(soft().float(), -torch.inf), x, y).nonfinite


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JointPGD(0.1, 3, router_weight=-1), "router_weight: expected a finite number >= 0, got -1"),
        (lambda: ExpertPGD(0.1, 3, loss="kl"), "loss: expected one of ce, margin, dlr, got 'kl'"),
        (lambda: RouterPGD(-0.1, 3), "eps: expected a finite number >= 0, got -0.1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


# --- as a graph ---------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for CUDA: runs what was captured on static buffers, and on nothing else of a batch, at each replay."""

    def __init__(self) -> None:
        self.replays = 0

    def why_not(self, x: Tensor) -> None:
        return None

    def capture(self, function: Callable, inputs: tuple[Tensor, ...], beside: object) -> Recording:
        return Recording(self, function, inputs)


class Recording:
    def __init__(self, recorder: Recorder, function: Callable, inputs: tuple[Tensor, ...]) -> None:
        self.recorder, self.function = recorder, function
        self.static = tuple(tensor.clone() for tensor in inputs)
        function(*self.static)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.recorder.replays += 1
        for buffer, tensor in zip(self.static, inputs, strict=True):
            buffer.copy_(tensor)
        return tuple(tensor.clone() for tensor in self.function(*self.static))


@pytest.mark.parametrize("restarts", [1, 2])
def test_replays_follow_each_batchs_own_routes(attack, restarts):
    model = network().eval()
    x, y = images(24, torch.float32)
    made, plain, recorder = (
        attack(0.1, 3, restarts=restarts),
        attack(0.1, 3, restarts=restarts, graph=False),
        Recorder(),
    )
    made.graphs = StepGraphs(capturer=recorder)
    routes = set()
    for part in torch.arange(24).split(6):
        model(x[part])
        routes.add(str(model[1].routing.indices.tolist()))
        assert torch.equal(made(model, x[part], y[part], part), plain(model, x[part], y[part], part))
    assert len(routes) > 1
    assert recorder.replays >= 3 * restarts


def test_imposed_routes_are_never_replayed_for_others():
    model = network().eval()
    x, y = images(6, torch.float32)
    attack, recorder = PGD(0.1, 3), Recorder()
    attack.graphs = StepGraphs(capturer=recorder)
    plain = [attack(model, x, y) for _ in range(3)]
    assert recorder.replays == 2
    with rerouted(model, SwapTop()):
        swapped = [attack(model, x, y) for _ in range(3)]
        expected = PGD(0.1, 3, graph=False)(model, x, y)
    assert all(torch.equal(images, expected) for images in swapped)
    assert not torch.equal(swapped[0], plain[0])
    assert recorder.replays == 4  # equal routes are replayed
    assert torch.equal(attack(model, x, y), plain[0])


def test_attacks_are_copied_with_their_settings():
    attack = copy.deepcopy(JointPGD(0.1, 3, router_weight=2.5, soft_gradient=False))
    assert (attack.router_weight, attack.soft_gradient, attack.eps) == (2.5, False, 0.1)


@pytest.mark.parametrize("attack", [ExpertPGD, RouterPGD, JointPGD])
def test_attacks_on_routes_keep_what_is_known_of_the_norms(attack):
    """Neither their hooks nor the routes that they impose make the next attack learn anew which norms may be folded."""
    model = attack_models.network().eval()
    x, y = attack_models.images(), torch.arange(6) % 5
    PGD(0.1, 1)(model, x, y)
    known = KNOWN[model]
    assert known.chains
    attack(0.1, 2)(model, x, y)
    assert KNOWN[model] is known
