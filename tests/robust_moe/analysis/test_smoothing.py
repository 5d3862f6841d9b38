"""Randomised smoothing against a linear classifier, whose smoothed radius is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor, nn

from robust_moe.analysis import ABSTAIN, Smoothed, clopper_pearson_lower

SIGMA, F64 = 0.25, torch.float64


def linear(pixels: int = 4) -> nn.Module:
    """Class 1 where the mean pixel is above 1/2: smoothing leaves the distance to that plane as it is."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 2)).double()
    model[1].weight.data = torch.tensor([[0.0] * pixels, [1.0 / pixels] * pixels], dtype=torch.float64)
    model[1].bias.data = torch.tensor([0.0, -0.5], dtype=torch.float64)
    return model


def at_distance(distances: list[float], pixels: int = 4) -> Tensor:
    """Images at given ℓ2 distances to the plane, [B, 1, 2, pixels / 2]: pixels 1/2 + distance / sqrt(pixels)."""
    offsets = torch.tensor(distances, dtype=torch.float64)[:, None] / math.sqrt(pixels)
    return (0.5 + offsets.expand(-1, pixels)).reshape(-1, 1, 2, pixels // 2)


def test_the_radius_is_below_the_true_one_as_often_as_promised():
    """400 estimates at a confidence of 90 %: too large in about 40, surely in fewer than 65 and more than 15."""
    distance, alpha = 0.3, 0.1
    x = at_distance([distance]).expand(400, -1, -1, -1)
    found = Smoothed(linear(), 2, SIGMA, seed=3).certify(x, select=20, samples=200, alpha=alpha)
    right = found.classes == 1
    assert right.float().mean() > 0.99
    exceeds = (found.radius[right] > distance).sum().item()
    # (the binomial is discrete: the chance of a bound above the truth is a known number, at most alpha)
    truth = norm.cdf(distance / SIGMA)
    chance = sum(binom.pmf(k, 200, truth) for k in range(201) if clopper_pearson_lower(k, 200, alpha) > truth)
    assert chance <= alpha
    assert abs(exceeds - 400 * chance) < 4 * math.sqrt(400 * chance * (1 - chance)) + 1


def test_the_radius_approaches_the_distance_and_the_class_is_kept_inside_it():
    distances = [0.05, 0.2, 0.5, -0.3]
    x = at_distance(distances)
    found = Smoothed(linear(), 2, SIGMA, seed=1).certify(x, samples=4000, alpha=0.001)
    assert found.classes.tolist() == [1, 1, 1, 0]
    for radius, distance in zip(found.radius.tolist(), distances, strict=True):
        assert 0.6 * abs(distance) - 0.02 < radius < abs(distance)
    assert found.radius_linf.tolist() == pytest.approx((found.radius / 2).tolist(), rel=1e-9)
    assert (found.radius_linf <= found.radius / 2).all()
    expected = [SIGMA * norm.ppf(p) for p in found.probability.tolist()]
    assert found.radius.tolist() == pytest.approx(expected, rel=1e-6)


def test_it_abstains_where_the_classes_are_even():
    smoothed = Smoothed(linear(), 2, SIGMA)
    found = smoothed.certify(at_distance([0.0, 1.0]), select=10, samples=100, alpha=0.01)
    assert found.classes.tolist() == [ABSTAIN, 1]
    assert found.radius[0] == 0
    assert found.radius_linf[0] == 0
    assert smoothed.predict(at_distance([0.0, 1.0, -1.0]), samples=100).tolist() == [ABSTAIN, 1, 0]


def test_predict_is_wrong_as_rarely_as_promised():
    x = at_distance([0.01]).expand(300, -1, -1, -1)
    classes = Smoothed(linear(), 2, SIGMA, seed=5).predict(x, samples=50, alpha=0.05)
    assert (classes == 0).float().mean() <= 0.05
    assert (classes == ABSTAIN).any()


def test_noise_depends_on_seed_and_index_alone():
    x = at_distance([0.1, 0.15, 0.2])
    settings = {"select": 40, "samples": 150, "alpha": 0.05}
    first = Smoothed(linear(), 2, SIGMA, seed=2, batch_size=7).certify(x, **settings)
    other = Smoothed(linear(), 2, SIGMA, seed=2, batch_size=1000).certify(x, **settings)
    assert torch.equal(first.probability, other.probability)
    index = torch.tensor([2])
    alone = Smoothed(linear(), 2, SIGMA, seed=2).certify(x[2:], index=index, **settings)
    assert alone.probability.item() == first.probability[2].item()
    reseeded = Smoothed(linear(), 2, SIGMA, seed=4).certify(x, **settings)
    assert not torch.equal(first.probability, reseeded.probability)
    smoothed, state = Smoothed(linear(), 2, SIGMA), torch.get_rng_state()
    smoothed.predict(x, samples=10)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_below_the_pixels_resolution_is_refused():
    """Rounded to the pixels' grid it is no Gaussian: at 1/2 half of it is lost, and the tie became a certificate."""
    x = torch.full((1, 1, 2, 2), 0.5)
    for sigma, kind, least in (
        (9.9e-5, torch.float32, "0.0001"),
        (1e-8, torch.float32, "0.0001"),
        (1e-13, F64, "1e-12"),
    ):
        with pytest.raises(ValueError, match=rf"^sigma: expected at least {least}, below which noise is lost"):
            Smoothed(linear().to(kind), 2, sigma).certify(x.to(kind))
        with pytest.raises(ValueError, match=r"^sigma: expected at least"):
            Smoothed(linear().to(kind), 2, sigma).predict(x.to(kind))
    with pytest.raises(ValueError, match=r"^sigma: expected at least 0.005"):
        Smoothed(linear().float(), 2, 1e-3).certify(100 * x)
    for sigma, kind in ((1e-4, torch.float32), (1e-12, F64)):
        even = Smoothed(linear().to(kind), 2, sigma).certify(x.to(kind), select=20, samples=1000)
        assert even.classes.tolist() == [ABSTAIN]


class Counting(nn.Module):
    """Sees how many copies came, of what mean and spread."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(x)
        return torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], 1)


def test_every_copy_is_used_once_with_noise_of_the_right_size():
    model = Counting().train()
    x = torch.full((1, 1, 4, 4), 0.5)
    Smoothed(model, 2, SIGMA, batch_size=48).certify(x, select=100, samples=1000)
    assert [len(batch) for batch in model.seen] == [48, 48, 4] + [48] * 20 + [40]
    copies = torch.cat(model.seen)
    assert len(copies.flatten(1).unique(dim=0)) == 1100
    assert copies.mean().item() == pytest.approx(0.5, abs=0.01)
    assert copies.std().item() == pytest.approx(SIGMA, rel=0.02)
    assert model.training


@pytest.mark.parametrize("trials", [1, 20, 1000])
@pytest.mark.parametrize("alpha", [0.001, 0.1])
def test_clopper_pearson_is_the_inverse_of_the_binomial_tail(trials, alpha):
    for successes in sorted({0, 1, trials // 2, trials - 1, trials}):
        bound = clopper_pearson_lower(successes, trials, alpha)
        if successes == 0:
            assert bound == 0
        else:
            assert binom.sf(successes - 1, trials, bound) == pytest.approx(alpha, rel=1e-6)
            assert binom.sf(successes - 1, trials, bound) <= alpha


def nan_model() -> nn.Module:
    model = linear()
    model[1].bias.data[0] = math.nan
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Smoothed(linear(), 2, 0.0), ValueError, "sigma: expected a finite number > 0, got 0.0"),
        (lambda: Smoothed(linear(), 1, 0.5), ValueError, "num_classes: expected a count >= 2, got 1"),
        (lambda: Smoothed(linear(), 2, 0.5, batch_size=0), ValueError, "batch_size: expected a count >= 1, got 0"),
        (
            lambda: Smoothed(linear(), 3, 0.5).predict(at_distance([1.0]), samples=9),
            ValueError,
            "model: expected logits",
        ),
        (
            lambda: Smoothed(linear(), 2, 0.5).certify(at_distance([1.0]), alpha=1.0),
            ValueError,
            "alpha: expected a number",
        ),
        (
            lambda: Smoothed(linear(), 2, 0.5).certify(at_distance([1.0]), samples=0),
            ValueError,
            "samples: expected a count",
        ),
        (
            lambda: Smoothed(linear(), 2, 0.5).predict(at_distance([1.0]), index=torch.tensor([1, 2])),
            ValueError,
            "index: expected int64 positions [1], got torch.int64 [2]",
        ),
        (lambda: clopper_pearson_lower(3, 2, 0.1), ValueError, "successes: expected at most trials = 2, got 3"),
        (
            lambda: Smoothed(nan_model(), 2, 0.5).predict(at_distance([1.0]), samples=9),
            FloatingPointError,
            "Smoothed: the model gave non-finite logits",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)
