"""Steering, and RA-R with a target: closed forms on linear mixtures, what they never do worse than, and their cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from whole_networks import linear

from robust_moe.attacks import PGD, AutoAttack, Counts, ExpertPGD, JointPGD, RouterPGD, Steering
from robust_moe.attacks.base import Attack, Found
from robust_moe.attacks.losses import LOSSES
from robust_moe.attacks.routes import route_lead
from robust_moe.config import load_config
from robust_moe.models import BasicBlock, DualModel, ExpertMixture, NetworkExperts
from robust_moe_kernels.modules import AllExperts, MoELayer, moe_layers, replace_blocks, rerouted

EPS = {"Linf": 0.1, "L2": 0.6}


def hard(gate: nn.Module, experts: list[nn.Module], channels: int = 1) -> MoELayer:
    """A hard choice whose gate gets no gradient from the classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says so
        return MoELayer(gate, NetworkExperts(experts, channels), 1, straight_through=False).eval()


def affine(*rows: tuple[Tensor, float]) -> nn.Sequential:
    """Logits <weight, x - 1/2> + bias in float64, one (weight, bias) each."""
    layer = nn.Linear(rows[0][0].numel(), len(rows)).double()
    layer.weight.data = torch.stack([weight for weight, _ in rows])
    layer.bias.data = torch.tensor([bias for _, bias in rows], dtype=torch.float64) - layer.weight.data.sum(1) / 2
    return nn.Sequential(nn.Flatten(), layer)


def points(*pixels: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 1, 2] of class 1."""
    return torch.tensor(pixels).view(-1, 1, 1, 2), torch.ones(len(pixels), dtype=torch.int64)


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


# --- closed forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", EPS)
def test_found_exactly_where_the_gates_plane_cuts_the_ball(norm, loss):
    """Expert 0 is right in every ball, and its loss rises away from the plane <w, x - 1/2> = 0 behind which expert 1 is
    wrong: the attack can win where <w, x - 1/2> < eps |w|, the norm being the dual one."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, generator=generator, dtype=torch.float64)
    x = 0.5 + 0.4 * (torch.rand(200, 3, 2, 2, generator=generator, dtype=torch.float64) - 0.5)
    score = (x.flatten(1) - 0.5) @ weight
    x, score = x[score > 0], score[score > 0]
    model = hard(
        affine((weight, 0.0), (-weight, 0.0)),
        [
            affine((weight, 0.0), (-weight, 99.0), (0 * weight, 0.0)),
            affine((0 * weight, 5.0), (weight, 0.0), (weight, -9.0)),
        ],
        channels=3,
    )
    y = torch.ones(len(x), dtype=torch.int64)
    eps = 0.5 * score.max().item() / (weight.abs().sum() if norm == "Linf" else weight.norm()).item()
    gap = eps * (weight.abs().sum() if norm == "Linf" else weight.norm()) - score
    # in l2 what is left of the angle to the best direction, and steps of eps / 8 leave that much
    clear = gap.abs() > (1e-9 if norm == "Linf" else 0.06 * eps * weight.norm())
    assert right(model, PGD(eps, 40, norm=norm, loss=loss, random_start=False)(model, x, y), y).all()
    robust = right(model, Steering(eps, norm=norm, loss=loss)(model, x, y), y)
    assert torch.equal(robust[clear], (gap <= 0)[clear])
    assert 0.2 < robust.double().mean() < 0.9
    assert clear.sum() > 0.8 * len(x)


@pytest.mark.parametrize("random_start", [True, False])
def test_the_route_is_kept_while_the_expert_behind_it_is_attacked(random_start):
    """Pixel b decides the route, pixel a the class of expert 1: both are in reach, or the image survives. Expert 0 is
    right whatever happens, and tempts the attack to raise a."""
    model = hard(linear([0, 20, -10], [0, -20, 10]), [linear([1, 0, 0], [0, 0, 9]), linear([-20, 0, 10], [20, 0, -10])])
    pixels = {(0.59, 0.59): False, (0.61, 0.59): True, (0.59, 0.61): True, (0.5, 0.52): False, (0.595, 0.595): False}
    x, y = points(*pixels)
    assert right(model, PGD(0.1, 40, random_start=False)(model, x, y), y).all()  # a random one may cross the plane
    attack = Steering(0.1, random_start=random_start)
    assert right(model, attack(model, x, y), y).tolist() == list(pixels.values())
    # the clean expert as the only goal: nothing to be found there
    assert right(model, Steering(0.1, routes=1)(model, x, y), y).all()
    assert right(model, Steering(0.1, experts=[0])(model, x, y), y).all()
    assert right(model, Steering(0.1, experts=[1])(model, x, y), y).tolist() == list(pixels.values())


class TwoGates(nn.Module):
    """Wrong where both routes have changed: pixel a decides the first, pixel b the second."""

    def __init__(self) -> None:
        super().__init__()
        kept, changed = linear([0, 0, 0], [0, 0, 2]), linear([0, 0, 0], [0, 0, -0.5])
        self.first = hard(linear([20, 0, -10], [-20, 0, 10]), [kept, changed])
        self.second = hard(linear([0, 20, -10], [0, -20, 10]), [kept, changed])

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x) + linear([0, 0, 0], [0, 0, -1])(x)


@pytest.mark.parametrize("attack", [Steering(0.1), RouterPGD(0.1, 40, targeted=True)], ids=["steering", "router"])
def test_layers_are_joined(attack):
    """Neither layer alone makes the image wrong."""
    pixels = {(0.59, 0.59): False, (0.61, 0.59): True, (0.59, 0.61): True, (0.9, 0.9): True}
    model, (x, y) = TwoGates().eval(), points(*pixels)
    found = attack.find(model, x, y)
    assert (~found.fooled).tolist() == list(pixels.values())
    assert right(model, attack(model, x, y), y).tolist() == list(pixels.values())


def test_the_router_driven_to_each_expert_finds_one_that_is_not_the_nearest():
    """Expert 1 is next to the clean one, and right; expert 2, farther but in reach, is wrong."""
    gate = linear([0, 0, 0], [10, 0, -5.3], [0, 10, -5.6])
    model = hard(gate, [linear([0, 0, 0], [0, 0, 9])] * 2 + [linear([0, 0, 9], [0, 0, 0])])
    x, y = points((0.5, 0.5), (0.5, 0.44))
    settings = {"random_start": False}
    assert right(model, RouterPGD(0.1, 20, **settings)(model, x, y), y).tolist() == [True, True]
    assert model(x) is not None and model.routing.indices[:, 0].tolist() == [0, 0]
    aimed = RouterPGD(0.1, 20, targeted=True, **settings)
    assert right(model, aimed(model, x, y), y).tolist() == [False, True]
    nearest = RouterPGD(0.1, 20, targeted=True, routes=1, **settings)
    assert right(model, nearest(model, x, y), y).tolist() == [True, True]


@pytest.mark.parametrize(("experts", "k"), [(2, 1), (4, 1), (4, 2), (4, 3)])
def test_the_lead_of_an_expert_tells_whether_it_is_selected(experts, k):
    h = torch.randn(50, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for expert in range(experts):
        chosen = torch.zeros_like(h).scatter(1, h.topk(k).indices, 1) > 0
        lead = route_lead(h, torch.full((50,), expert), chosen)
        others = h[:, [other for other in range(experts) if other != expert]].sort(1, descending=True).values
        torch.testing.assert_close(lead, h[:, expert] - others[:, k - 1])
        assert torch.equal(lead > 0, (h.topk(k).indices == expert).any(1))


# --- never less than PGD ------------------------------------------------------------------------------------------


def images(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    return (x * 1.5 * torch.rand(count, 2, 1, 1, generator=generator, dtype=torch.float64)).clamp(0, 1)


def routed(layers: list[str], top_k: int = 1, experts: int = 3) -> nn.Module:
    """Convolution, block, convolution, linear layer: of the first three, those named are mixtures."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        BasicBlock(6, 6),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    replace_blocks(model, layers, num_experts=experts, top_k=top_k, init="fresh")
    for layer in moe_layers(model).values():  # experts used alike, and routes that an attack can change
        nn.init.normal_(layer.gate.fc.weight, 0, 20)
        model(images(16).float())
        layer.gate.fc.bias.data -= layer.last_routing().logits.detach().mean(0)
    return model.double().eval()


def networks(routing: str = "hard") -> ExpertMixture:
    torch.manual_seed(1)
    router = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    heads = [nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, 5)) for _ in range(3)]
    return ExpertMixture(router, heads, 2, routing=routing).double().eval()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: routed(["1"]),
    "convolution, k = 2": lambda: routed(["2"], top_k=2),
    "two layers": lambda: routed(["1", "2"]),
    "whole networks": networks,
    "dual model": lambda: DualModel(networks(), routed(["1"]), 0.5),
}
UNSTEERED: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: routed([]),
    "k = E": lambda: routed(["1", "2"], top_k=3),
    "soft networks": lambda: networks("soft"),
    "dual model of dense members": lambda: DualModel(routed([]), routed([]), 0.5),
}


def labelled(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = images()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    return x, y


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_is_left_better_than_pgd_leaves_it(kind):
    model = KINDS[kind]()
    x, y = labelled(model)
    harmed = False
    cases = (("ce", "Linf", False, 1), ("margin", "Linf", True, 2), ("dlr", "L2", False, 1))
    for loss, norm, soft_gradient, restarts in cases:
        settings = {"norm": norm, "loss": loss, "seed": 5, "restarts": restarts}
        plain = PGD(0.2 * EPS[norm], 6, **settings).find(model, x, y)
        found = Steering(0.2 * EPS[norm], 6, soft_gradient=soft_gradient, **settings).find(model, x, y)
        assert (found.fooled >= plain.fooled).all()
        assert (found.fooled | (found.loss >= plain.loss)).all()
        assert torch.equal(found.images[plain.fooled], plain.images[plain.fooled])
        harmed |= not torch.equal(found.images, plain.images)
    assert harmed  # not PGD alone


@pytest.mark.parametrize("kind", UNSTEERED)
def test_without_a_gate_to_steer_it_is_pgd_bit_for_bit_and_says_so(kind):
    model = UNSTEERED[kind]().float()
    x, y = images().float(), torch.arange(12) % 5
    for settings in ({}, {"restarts": 2, "loss": "margin"}, {"norm": "L2", "random_start": False}):
        plain, attack = PGD(0.1, 5, **settings), Steering(0.1, 5, **settings)
        assert attack.most_passes(model) == plain.passes
        with pytest.warns(UserWarning, match="no gate with a choice to steer; this is PGD"):
            got = attack(model, x, y)
        assert torch.equal(got, plain(model, x, y))
        with pytest.warns(UserWarning, match="this is PGD"):
            found = attack.find(model, x, y)
        for one, other in zip(found, plain.find(model, x, y), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("impose", ["fixed expert", "routes"])
def test_imposed_routes_are_left_alone(impose):
    model = networks()
    x, y = labelled(model)
    if impose == "fixed expert":
        model.fixed_expert = 1
        with pytest.warns(UserWarning, match="this is PGD"):
            got = Steering(0.1, 5)(model, x, y)
        assert torch.equal(got, PGD(0.1, 5)(model, x, y))
        return
    with rerouted(model, AllExperts()):
        with pytest.warns(UserWarning, match="this is PGD"):
            got = Steering(0.1, 5, soft_gradient=True)(model, x, y)
        assert torch.equal(got, PGD(0.1, 5)(model, x, y))
        assert model.reroute == AllExperts()


def test_a_ball_of_no_radius():
    model = networks()
    x, y = labelled(model)
    found = Steering(0.0, 4).find(model, x, y)
    assert torch.equal(found.images, x)
    assert found.fooled.tolist() == [True] + [False] * 11


# --- cost, and what does not change the result ----------------------------------------------------------------------


class Rows(nn.Module):
    """Counts the images that go forward, and those whose gradient comes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.counts = model, Counts()

    def forward(self, x: Tensor) -> Tensor:
        self.counts.forward += len(x)
        if x.requires_grad:
            x = x.view_as(x)  # with hooks of its own: another draw has the same images
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, grad: Tensor) -> None:
        self.counts.backward += len(grad)


@pytest.mark.parametrize(
    ("kind", "settings", "passes"),
    [
        ("block", {}, (2 + 5 + 3 * 6, 5 + 3 * 5)),
        ("block", {"routes": None}, (2 + 5 + 3 * 6, 5 + 3 * 5)),
        ("block", {"routes": 2, "restarts": 2}, (2 + 2 * (5 + 1) + 2 * 2 * 6, 2 * 5 + 2 * 2 * 5)),
        ("block", {"experts": [2]}, (2 + 5 + 6, 5 + 5)),
        ("whole networks", {"eot_iter": 2}, (2 + 10 + 3 * 11, 10 + 3 * 10)),
        ("two layers", {}, (2 + 5 + 9 * 6, 5 + 9 * 5)),
        ("dual model", {"routes": 2, "soft_gradient": True}, (2 + 5 + 6 * 6, 5 + 6 * 5)),
    ],
)
def test_the_most_that_it_costs_and_what_it_counts(kind, settings, passes):
    """Nothing is fooled without a radius: every image makes every pass. Otherwise some leave early."""
    model = Rows(KINDS[kind]())
    x, y = images(), model(images()).argmax(1)
    for eps, room in ((0.0, None), (0.0, 50), (0.1, None), (0.1, 50)):
        attack = Steering(eps, 5, **settings)
        model.counts, counts = Counts(), Counts()
        attack(model, x, y, room=room, counts=counts)
        assert counts == model.counts
        most = Counts(*(12 * count for count in passes))
        assert attack.most_passes(model) == passes
        assert counts == most if eps == 0 else counts.forward < most.forward and counts.backward < most.backward
    if kind == "block" and not settings:
        assert Steering(0.1, 5, routes=3).passes == passes


@pytest.mark.parametrize(("kind", "climbs"), [("block", 2), ("convolution, k = 2", 1), ("two layers", 6)])
def test_the_cost_of_the_router_driven_to_each_expert(kind, climbs):
    model = Rows(KINDS[kind]())
    x, y, counts = images(), model(images()).argmax(1), Counts()
    model.counts = Counts()
    attack = RouterPGD(0.0, 5, targeted=True)
    attack(model, x, y, room=30, counts=counts)
    assert counts == model.counts == Counts(12 * (1 + climbs * 6), 12 * climbs * 5)
    if kind == "block":
        assert RouterPGD(0.0, 5, targeted=True, routes=2).passes == (1 + climbs * 6, climbs * 5)


ROUTED: dict[str, Callable[..., Attack]] = {
    "steering": Steering,
    "soft": lambda *a, **s: Steering(*a, soft_gradient=True, **s),
    "router": lambda *a, **s: RouterPGD(*a, targeted=True, **s),
}


@pytest.mark.parametrize("make", ROUTED)
@pytest.mark.parametrize("kind", ["two layers", "whole networks"])
def test_neither_room_nor_batches_nor_reading_the_host_change_what_is_found(kind, make, state_of):
    """In float64, where a sample's last bits, which its batch may change, stay far from any decision."""
    model = KINDS[kind]()
    x, y = labelled(model)
    index, attack = torch.arange(12) + 7, ROUTED[make](0.06, 6, seed=2, restarts=2)
    before = state_of(model)
    whole = attack.find(model, x, y, index)
    assert 1 < whole.fooled.sum() < 12
    others: list[Found] = [attack.find(model, x, y, index, room=30)]
    parts = [attack.find(model, x[rows], y[rows], index[rows]) for rows in torch.arange(12).split([1, 11])]
    others.append(Found(*(torch.cat(parts) for parts in zip(*parts, strict=True))))
    for other in others:
        assert torch.equal(other.fooled, whole.fooled)
        torch.testing.assert_close(other.images, whole.images, rtol=0, atol=1e-9)
    crafted = attack.craft(model, x, y, index)
    torch.testing.assert_close(crafted.images, whole.images, rtol=0, atol=1e-9)
    assert not crafted.nonfinite
    assert torch.equal(attack(model, x, y, index), whole.images)
    assert state_of(model) == before
    assert not torch.equal(ROUTED[make](0.06, 6, seed=3, restarts=2)(model, x, y, index), whole.images)


@pytest.mark.parametrize("make", ROUTED)
def test_a_batch_of_no_images(make):
    model = KINDS["two layers"]()
    x, y = images()[:0], torch.zeros(0, dtype=torch.int64)
    attack = ROUTED[make](0.1, 3)
    assert attack.craft(model, x, y).images.shape == attack.find(model, x, y).images.shape == x.shape


class Branches(nn.Module):
    """Two routed models, of which only the first is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = routed(["1"]), routed(["1"])

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("make", [*ROUTED.values(), RouterPGD, JointPGD, ExpertPGD])
def test_a_layer_that_the_forward_does_not_reach_is_refused(make):
    """Its record is of other images, of as many here."""
    model = Branches()
    x, y = labelled(model)
    model.unused(x)
    with pytest.raises(ValueError, match="model: expected a forward that reaches every routed layer, got none through"):
        make(0.1, 3)(model, x, y)


class Twice(nn.Module):
    """One routed model, used on the image and on its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.used = routed(["1"])

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.used(x.flip(3))


@pytest.mark.parametrize("make", [*ROUTED.values(), RouterPGD, JointPGD, ExpertPGD])
def test_a_layer_that_is_used_twice_is_refused(make):
    """Its record is that of the last use."""
    model = Twice()
    x, y = labelled(model)
    with pytest.raises(
        ValueError, match=r"^model: expected a forward that uses a routed layer once, got 2 uses of 'used\.1'"
    ):
        make(0.1, 3)(model, x, y)
    assert not moe_layers(model)["used.1"]._forward_hooks


def test_as_a_member_of_a_custom_autoattack():
    model = hard(linear([0, 20, -10], [0, -20, 10]), [linear([1, 0, 0], [0, 0, 9]), linear([-20, 0, 10], [20, 0, -10])])
    x, y = points((0.59, 0.59), (0.9, 0.9))
    first = PGD(0.1, 20, random_start=False)
    for attacks, expected in (([first], [True, True]), ([first, Steering(0.1)], [False, True])):
        attacked = AutoAttack(0.1, version="custom", attacks=attacks)(model, x, y)
        assert right(model, attacked, y).tolist() == expected


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_reach_the_attack():
    chosen = ["routes=3", "route_weight=0.5", "soft_gradient=true", "steps=10", "eps=0.2", "loss=dlr"]
    attack = load_config(None, ["eval.attack.name=steering", *(f"eval.attack.{one}" for one in chosen)]).eval.attack
    built = attack.build(seed=4)
    assert (type(built), attack.label, built.seed) == (Steering, "steering10", 4)
    assert (built.routes, built.route_weight, built.soft_gradient, built.loss_name) == (3, 0.5, True, "dlr")
    assert (built.alpha, built.climb_alpha) == (0.05, 0.1)  # halves of five steps each
    assert Steering(0.2, 10, 0.01).climb_alpha == 0.01
    assert Steering.Config().build().steps == 40


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steering(0.1, routes=0), "routes: expected a count >= 1, got 0"),
        (lambda: Steering(0.1, routes=1.5), "routes: expected an integer, got 1.5"),
        (lambda: Steering(0.1, experts=[1, -1]), "experts[1]: expected a number >= 0, got -1"),
        (lambda: Steering(0.1, experts=["1"]), "experts[0]: expected an integer, got '1'"),
        (lambda: Steering(0.1, experts=[]), "experts: expected at least one expert, or None, got []"),
        (lambda: Steering(0.1, route_weight=-1), "route_weight: expected a finite number >= 0, got -1"),
        (lambda: Steering(0.1, loss="kl"), "loss: expected one of ce, margin, dlr, got 'kl'"),
        (lambda: Steering(0.1, restarts=2, random_start=False), "restarts: expected 1 without a random start, got 2"),
        (lambda: RouterPGD(0.1, 3, targeted=1), "targeted: expected True or False, got 1"),
        (lambda: RouterPGD(0.1, 3, routes=0), "routes: expected a count >= 1, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


def test_an_expert_that_a_layer_lacks():
    model = networks()
    x, y = labelled(model)
    with pytest.raises(ValueError, match=r"experts\[1\]: expected an expert below 3, as the layer has them, got 3"):
        Steering(0.1, experts=[0, 3])(model, x, y)
