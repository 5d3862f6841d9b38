"""The mixture's Jacobian in its two parts, and empirical Lipschitz estimates, against autograd and known functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust_moe.analysis import (
    ball,
    certify_mixture,
    class_margins,
    enclose_probabilities,
    estimate_lipschitz,
    estimate_radius,
    lower,
    mixture_jacobian,
)
from robust_moe.models import ExpertMixture

SHAPE, CLASSES = (1, 3, 3), 4


def parts(seed: int = 0, experts: int = 3, softmax: bool = True) -> tuple[nn.Module, list[nn.Module], Tensor]:
    torch.manual_seed(seed)
    router = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, experts)).double()
    networks = []
    for _ in range(experts):
        layers = [nn.Flatten(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
        networks.append(nn.Sequential(*layers, *([nn.Softmax(1)] if softmax else [])).double())
    return router, networks, torch.rand(5, *SHAPE, dtype=torch.float64)


def whole(router: nn.Module, experts: list[nn.Module], x: Tensor) -> Tensor:
    return (router(x).softmax(1)[:, :, None] * torch.stack([expert(x) for expert in experts], 1)).sum(1)


@pytest.mark.parametrize("softmax", [True, False])
def test_the_two_terms_are_the_jacobian(softmax):
    router, experts, x = parts(softmax=softmax)
    found = mixture_jacobian(router, experts, x)
    rows = torch.arange(len(x))
    expected = torch.autograd.functional.jacobian(lambda z: whole(router, experts, z), x)[rows, :, rows]
    assert torch.allclose(found.total, expected, rtol=1e-10, atol=1e-12)
    # the first is the Jacobian with the route held, so the second is what the route adds
    weights = router(x).softmax(1).detach()
    held = torch.autograd.functional.jacobian(
        lambda z: (weights[:, :, None] * torch.stack([expert(z) for expert in experts], 1)).sum(1), x
    )[rows, :, rows]
    assert torch.allclose(found.experts, held, rtol=1e-10, atol=1e-12)
    assert found.routing.abs().max() > 1e-3


def test_no_routing_term_without_disagreement_or_without_a_slope():
    router, experts, x = parts()
    same = mixture_jacobian(router, [experts[0]] * 3, x)
    assert same.routing.abs().max() < 1e-15
    assert torch.allclose(same.experts, mixture_jacobian(router, [experts[0]] * 3, x).total)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
    flat[1].weight.data.zero_()
    assert mixture_jacobian(flat, experts, x).routing.abs().max() == 0
    shifted = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
    shifted[1].weight.data.copy_(shifted[1].weight.data[:1].expand(3, -1))  # every logit alike moves no weight
    assert mixture_jacobian(shifted, experts, x).routing.abs().max() < 1e-15


def test_bad_mixtures():
    router, experts, x = parts()
    with pytest.raises(ValueError, match=r"^router\(x\): expected shape \[5, 2\], got \[5, 3\]"):
        mixture_jacobian(router, experts[:2], x)
    with pytest.raises(ValueError, match=r"^experts: expected outputs of one shape \[B, C\], got"):
        mixture_jacobian(router, [*experts[:2], router], x)


def test_the_estimate_finds_the_steepest_point_of_a_known_function():
    """sin(20 s) of the pixels' sum s: the largest slope in the ball is 20 · 9, at the image it is less."""

    def wave(x: Tensor) -> Tensor:
        return torch.stack([(20 * x.flatten(1).sum(1)).sin(), 3 * x.flatten(1).sum(1)], 1)

    x = torch.full((4, *SHAPE), 0.5, dtype=torch.float64) + 0.001 * torch.arange(4).view(-1, 1, 1, 1)
    at_x = estimate_lipschitz(wave, x, 0.0)
    found = estimate_lipschitz(wave, x, 0.02, steps=20, restarts=4)
    slope = (20 * (20 * x.flatten(1).sum(1)).cos().abs() * 9).tolist()
    assert at_x[:, 0].tolist() == pytest.approx(slope, rel=1e-9)
    assert (at_x[:, 0] < 100).any()
    assert (found[:, 0] > 170).all()
    assert (found[:, 0] <= 180 * (1 + 1e-12)).all()  # an estimate never exceeds the constant
    assert found[:, 1].tolist() == pytest.approx([27.0] * 4)
    assert torch.equal(found, estimate_lipschitz(wave, x, 0.02, steps=20, restarts=4))


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, CLASSES)).double()


def test_the_estimate_is_below_the_sound_constant_and_above_the_gradient():
    network = small(1)
    with torch.no_grad():
        network[-1].weight.mul_(4)
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = network(x).argmax(1)

    def margins(images: Tensor) -> Tensor:
        return class_margins(network(images).softmax(1), y)

    sound = enclose_probabilities(lower(network, SHAPE), ball(x, 0.1), "crown").margin_lipschitz(y)
    found, least = estimate_lipschitz(margins, x, 0.1, restarts=2), estimate_lipschitz(margins, x, 0.0)
    assert (found <= sound).all()
    assert (found >= least).all()
    assert (found > 1.05 * least).float().mean() > 0.5
    assert (sound < 4 * found).float().mean() > 0.5


def test_the_estimated_radius_is_no_smaller_than_the_certified_one():
    torch.manual_seed(2)
    networks = [small(7) for _ in range(2)]
    networks[1][1].bias.data += 0.2
    gate = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    model = ExpertMixture(gate, networks, 1, mix="probabilities").double().train()
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model.eval()(x).argmax(1)
    model.train()
    estimate = estimate_radius(model, x, y, 0.2, steps=8)
    certified = certify_mixture(model, x, y, kinds=("global", "local"), max_radius=0.2, steps=8)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (estimate > 0).all()
    assert (estimate >= certified.radius).all()
    assert (estimate <= 0.2).all()
    assert (estimate_radius(model, x, (y + 1) % CLASSES, 0.2, steps=1) == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.1, "x": torch.full((2, *SHAPE), 3.0)}, "x: expected pixels in [0, 1], got 3 to 3"),
        ({"eps": 0.1, "x": torch.full((2, *SHAPE), -0.01)}, "x: expected pixels in [0, 1], got -0.01 to -0.01"),
        ({"eps": -0.1}, "eps: expected a finite number >= 0, got -0.1"),
        ({"eps": 0.1, "steps": -1}, "steps: expected a count >= 0, got -1"),
        ({"eps": 0.1, "restarts": 0}, "restarts: expected a count >= 1, got 0"),
        ({"eps": 0.1, "function": lambda x: x.flatten(1).sum(1)}, "function(x): expected shape [2, K], got [2]"),
    ],
)
def test_bad_estimates(settings, message):
    settings = {"function": lambda x: x.flatten(1), "x": torch.zeros(2, *SHAPE), **settings}
    with pytest.raises(ValueError) as error:
        estimate_lipschitz(settings.pop("function"), settings.pop("x"), **settings)
    assert str(error.value).startswith(message)


def test_a_nan_is_loud():
    with pytest.raises(FloatingPointError, match="non-finite gradient"):
        estimate_lipschitz(lambda x: (x.flatten(1) - 1).sqrt(), torch.zeros(2, *SHAPE), 0.1)
