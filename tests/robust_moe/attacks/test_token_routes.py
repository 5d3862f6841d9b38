"""Attacks on models whose layers route tokens: what is raised, against loops over images and tokens; that images stay
apart; and that an image of one token is an image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graph_recorder import Recorder
from token_models import TokenLayer, TokenModel, images, labelled, token_layer, token_model
from torch import Tensor, nn

from robust_moe.attacks import PGD, Counts, ExpertPGD, JointPGD, RouterPGD, Steering, TransferPGD
from robust_moe.attacks.graph import StepGraphs
from robust_moe.attacks.passes import Passes, Tally
from robust_moe.attacks.router import router_margin
from robust_moe.attacks.routes import CUSHION, CleanGates, Goal, leads, route_lead
from robust_moe.models import DualModel, NetworkExperts
from robust_moe_kernels.modules import (
    FixedRoutes,
    FusedConvMoE,
    MoELayer,
    attack_mode,
    last_routes,
    moe_layers,
    rerouted,
)

EPS = 0.05
ATTACKS: dict[str, Callable[..., PGD]] = {
    "ra_e": ExpertPGD,
    "ra_e, weights free": lambda *args, **rest: ExpertPGD(*args, freeze_weights=False, **rest),
    "ra_r": RouterPGD,
    "ra_r, targeted": lambda *args, **rest: RouterPGD(*args, targeted=True, **rest),
    "joint": JointPGD,
    "transfer": TransferPGD,
    "steering": Steering,
    "steering, soft": lambda *args, **rest: Steering(*args, soft_gradient=True, routes=2, **rest),
}


def clean_passes(model: nn.Module, x: Tensor, y: Tensor, attack: PGD) -> Passes:
    """As an attack has them when it begins to climb."""
    passes = Passes(model, y, attack.loss, attack.fooled, Tally("cpu"))
    return attack.prepare(passes, x)


def rows_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Each layer's gate logits [B, T, E]."""
    with torch.no_grad():
        model(x)
    return [layer.routing.logits.view(len(x), -1, layer.num_experts) for layer in moe_layers(model).values()]


# --- what is raised ---------------------------------------------------------------------------------------------------


def test_the_routers_loss_is_summed_over_layers_and_averaged_over_tokens():
    model = token_model(layers=2)
    x, y = labelled(model)
    moved = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)).clamp(0, 1)
    clean, now = rows_of(model, x), rows_of(model, moved)
    expected, won = torch.zeros(len(x), dtype=torch.float64), 0
    for before, after in zip(clean, now, strict=True):
        for image in range(len(x)):
            parts = []
            for token in range(before.shape[1]):
                h, spread = after[image, token], before[image, token].std(correction=0)
                selected = before[image, token].topk(2).indices
                margin = router_margin(h[None] / spread, selected[None], CUSHION).item()
                parts.append(min(margin, CUSHION))
                won += margin > CUSHION
            expected[image] += sum(parts) / len(parts)
    assert won > 0  # the cap does something
    for attack, of in ((RouterPGD(EPS, 3), lambda loss: loss), (JointPGD(EPS, 3, router_weight=2.0), None)):
        with attack_mode(model):
            passes = clean_passes(model, x, y, attack)
            logits = model(moved)
            found = passes.loss(logits, y, *passes.extras).detach()
        if of is None:  # the joint attack's: λ means the same as of a layer that routes images
            found = (found - attack.loss(logits, y).detach()) / 2
        torch.testing.assert_close(found, expected)


def test_leads_are_those_of_each_token_and_goals_may_leave_layers_free():
    model = token_model(layers=2)
    x, _ = labelled(model)
    logits = rows_of(model, x)
    layers = list(moe_layers(model).values())
    gates = CleanGates.of(layers, len(x))
    aims = torch.randint(4, (len(x), 9), generator=torch.Generator().manual_seed(0))
    found = leads(layers, Goal((aims, torch.full_like(aims, -1)), tuple(gates.spread)))
    assert torch.equal(found[1], torch.full((len(x), 9), CUSHION, dtype=torch.float64))
    for image in range(len(x)):
        for token in range(9):
            h = logits[0][image, token]
            chosen = torch.zeros(4, dtype=torch.bool).index_fill(0, h.topk(2).indices, True)
            lead = route_lead(h[None] / h.std(correction=0), aims[image, token][None], chosen[None])
            assert found[0][image, token] == pytest.approx(lead.item())
            assert (lead > 0) == chosen[aims[image, token]]


def test_candidates_are_ranked_for_each_token():
    model = token_model(layers=1)
    x, _ = labelled(model)
    (logits,) = rows_of(model, x)
    gates = CleanGates.of(list(moe_layers(model).values()), len(x))
    order = logits.sort(dim=2, descending=True).indices
    assert torch.equal(gates.ranked[0], order)  # the first k are the chosen
    assert torch.equal(gates.others()[0], order[:, :, 2:])
    assert torch.equal(gates.chosen[0].sum(2), torch.full((len(x), 9), 2))


def test_routes_are_held_for_each_token():
    """RA-E is PGD on the model whose tokens keep their clean experts and weights."""
    model = token_model()
    x, y = labelled(model)
    with torch.no_grad():
        model(x)
    held = last_routes(model)
    assert all(isinstance(route, FixedRoutes) and len(route.indices) == 9 * len(x) for route in held.values())
    attacked = ExpertPGD(EPS, 4, seed=1)(model, x, y)
    with rerouted(model, held):
        expected = PGD(EPS, 4, seed=1)(model, x, y)
    torch.testing.assert_close(attacked, expected, rtol=0, atol=1e-12)
    assert not torch.equal(attacked, PGD(EPS, 4, seed=1)(model, x, y))


# --- what an attack finds ---------------------------------------------------------------------------------------------


class TwoTokens(nn.Module):
    """An image of two pixels, each of them a token: expert 0 where the pixel is above 1/2, else expert 1. An image is
    wrong where all of its tokens are at expert 1, and the hard choice has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        gate = nn.Linear(1, 2).double()
        gate.weight.data, gate.bias.data = torch.tensor([[20.0], [-20.0]]).double(), torch.tensor([-10.0, 10]).double()
        experts = [nn.Linear(1, 1).double() for _ in range(2)]
        for expert, value in zip(experts, (1.0, -0.75), strict=True):
            expert.weight.data.zero_()
            expert.bias.data.fill_(value)
        with pytest.warns(UserWarning, match="no gradient"):
            self.layer = TokenLayer(gate, NetworkExperts(experts, 1), 1, straight_through=False)

    def forward(self, x: Tensor) -> Tensor:
        score = self.layer(x.flatten(1)[:, :, None]).mean(1)
        return torch.cat([torch.zeros_like(score), score], 1) + 0 * x.flatten(1)


@pytest.mark.parametrize("attack", [Steering(0.1), RouterPGD(0.1, 40, targeted=True), RouterPGD(0.1, 40)])
def test_all_tokens_are_driven_together(attack):
    """One token's route alone does not make the image wrong, nor does PGD, which sees no gradient at all."""
    pixels = {(0.59, 0.59): False, (0.61, 0.59): True, (0.59, 0.61): True, (0.9, 0.9): True}
    model = TwoTokens().eval()
    x = torch.tensor(list(pixels), dtype=torch.float64).view(-1, 1, 1, 2)
    y = torch.ones(len(x), dtype=torch.int64)
    assert not PGD(0.1, 40, random_start=False).find(model, x, y).fooled.any()
    assert (~attack.find(model, x, y).fooled).tolist() == list(pixels.values())


def test_steering_to_an_expert_sends_every_token_there():
    """Also one that is there already, while each token's second choice would send it away."""
    model = TwoTokens().eval()
    x, y = torch.tensor([[0.59, 0.59], [0.55, 0.41]]).double().view(2, 1, 1, 2), torch.ones(2, dtype=torch.int64)
    settings = {"random_start": False}
    assert Steering(0.1, experts=[1], **settings).find(model, x, y).fooled.tolist() == [True, True]
    assert Steering(0.1, experts=[0], **settings).find(model, x, y).fooled.tolist() == [False, False]


@pytest.mark.parametrize("name", ATTACKS)
def test_images_stay_apart(name):
    """An image's tokens are its own: alone, or in another place of the batch, it meets the same attack."""
    model = token_model(layers=2)
    x, y = labelled(model)
    index = torch.arange(len(x))
    whole = ATTACKS[name](EPS, 4, seed=2)(model, x, y, index)
    assert not torch.equal(whole, x)
    turned = index.flip(0)
    again = ATTACKS[name](EPS, 4, seed=2)(model, x[turned], y[turned], turned)
    torch.testing.assert_close(again[turned], whole, rtol=0, atol=1e-9)
    for image in (0, 4):
        at = slice(image, image + 1)
        alone = ATTACKS[name](EPS, 4, seed=2)(model, x[at], y[at], index[at])
        torch.testing.assert_close(alone, whole[at], rtol=0, atol=1e-9)


class OneToken(nn.Module):
    """A layer on vectors [B, C], as it is or as the one token of each image."""

    def __init__(self, layer: MoELayer, dims: int) -> None:
        super().__init__()
        self.layer, self.dims = layer, dims
        self.head = nn.Linear(8, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(self.layer(x[:, None] if self.dims == 3 else x[:, :, None, None]).view(len(x), -1))


class Maps(nn.Module):
    """Takes [B, C, 1, 1] for [B, C]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(1))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_of_one_token_is_an_image(name):
    torch.manual_seed(0)
    experts, gate = [nn.Linear(8, 8) for _ in range(4)], nn.Linear(8, 4)
    nn.init.normal_(gate.weight, 0, 3)
    tokens = OneToken(TokenLayer(gate, NetworkExperts(experts, 8), 2), 3)
    maps = OneToken(MoELayer(Maps(gate), NetworkExperts([Maps(expert) for expert in experts], 8), 2), 4)
    maps.head = tokens.head
    x, y = images(6, 2).double(), torch.arange(6) % 5
    found, expected = (ATTACKS[name](EPS, 6, seed=1).find(model.double().eval(), x, y) for model in (tokens, maps))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class Both(TokenModel):
    """A layer that routes images before the tokens' layers."""

    def __init__(self) -> None:
        super().__init__(token_layer(6), token_layer(6))
        self.whole = FusedConvMoE.from_conv(nn.Conv2d(2, 2, 3, padding=1), 3, 1, init="fresh")
        nn.init.normal_(self.whole.gate.fc.weight, 0, 20)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.whole(x))


@pytest.mark.parametrize("name", ATTACKS)
def test_layers_of_both_kinds_are_attacked_together(name):
    torch.manual_seed(0)
    model = Both().double().eval()
    x, y = labelled(model, 4)
    index = torch.arange(len(x))
    whole = ATTACKS[name](EPS, 3)(model, x, y, index)
    alone = ATTACKS[name](EPS, 3)(model, x[2:3], y[2:3], index[2:3])
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"capacity": 0.5}, {"choice": "expert"}, {"capacity": 0.75, "priority": "vanilla"}]
)
@pytest.mark.parametrize("name", ATTACKS)
def test_experts_without_room_are_no_obstacle(name, options):
    """Of a batch in which some tokens find no place all attacks run, and stay in the ball."""
    model = token_model(layers=1, **options)
    x, y = labelled(model)
    assert model.layers[0].routing.dropped.any()
    if name == "ra_e, weights free":
        with pytest.raises(ValueError, match="freeze_weights: expected True where experts have no room"):
            ATTACKS[name](EPS, 3)(model, x, y)
        return
    found = ATTACKS[name](EPS, 3)(model, x, y)
    assert (found - x).abs().amax() <= EPS + 1e-12
    assert not torch.equal(found, x)


def test_a_token_that_is_held_without_a_place_stays_without_one():
    model = token_model(layers=1, capacity=0.5)
    x, _ = labelled(model)
    with torch.no_grad():
        expected = model(x)
        with rerouted(model, last_routes(model)):
            torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["ra_e", "ra_r", "joint"])
def test_a_replay_has_the_routes_of_its_own_tokens(name):
    model = token_model().float()
    x, y = (each.float() if each.is_floating_point() else each for each in labelled(model.double(), 12))
    model.float()
    made, plain, recorder = ATTACKS[name](EPS, 3), ATTACKS[name](EPS, 3, graph=False), Recorder()
    made.graphs = StepGraphs(capturer=recorder)
    for part in torch.arange(12).split(3):
        assert torch.equal(made(model, x[part], y[part], part), plain(model, x[part], y[part], part))
    assert recorder.replays >= 3


@pytest.mark.parametrize("name", ["ra_e", "ra_r, targeted", "joint", "steering"])
def test_both_members_of_a_dual_model_are_attacked(name):
    model = DualModel(token_model(layers=1), token_model(layers=2), 0.5).double().eval()
    x, y = labelled(model, 4)
    index = torch.arange(len(x))
    whole = ATTACKS[name](EPS, 3)(model, x, y, index)
    assert not torch.equal(whole, x)
    alone = ATTACKS[name](EPS, 3)(model, x[1:2], y[1:2], index[1:2])
    torch.testing.assert_close(alone, whole[1:2], rtol=0, atol=1e-9)


class Odd(TokenModel):
    """Leaves out a token of the last image."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        rest = self.layers[0](tokens.flatten(0, 1)[None, :-1]).mean()
        return self.head(tokens.mean(1)) + rest


@pytest.mark.parametrize("name", ["ra_r", "ra_r, targeted", "joint", "steering"])
def test_rows_that_are_not_shared_out_evenly_are_refused(name):
    torch.manual_seed(0)
    model, x = Odd(token_layer(6)).double().eval(), images(2)
    with pytest.raises(ValueError, match=r"model: expected routed layers with as many rows .* 2 images, got 17 rows"):
        ATTACKS[name](EPS, 3)(model, x, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(("layers", "climbs"), [(1, 2), (2, 6), (3, 10)])
def test_the_most_that_the_targeted_attack_costs_counts_the_layers_joined(layers, climbs):
    """Nothing is fooled without a radius: every image makes every pass, to two experts of each layer."""
    model = token_model(layers=layers)
    x = images()
    counts = Counts()
    attack = RouterPGD(0.0, 3, targeted=True, routes=2)
    attack(model, x, model(x).argmax(1), counts=counts)
    assert attack.most_passes(model) == (1 + 4 * climbs, 3 * climbs)
    assert counts == Counts(*(len(x) * count for count in attack.most_passes(model)))
