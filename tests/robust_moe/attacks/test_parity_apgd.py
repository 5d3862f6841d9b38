"""Auto-PGD against the authors' code (pyautoattack), climb by climb from the same start and as a whole.

In float32 and ℓ∞ all is the same to the bit: best losses, images, who is fooled. So it is in ℓ2 once their norms, which
they sum in float32, are rounded as ours are (summed in float64): with their own, the last bits of the iterates differ,
and the ratios of DLR, whose denominator may vanish, carry that to any size, but hardly ever to another verdict.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pyautoattack import autopgd_base as theirs
from torch import Tensor, nn

from robust_moe.attacks import APGD
from robust_moe.attacks.base import Found, per_sample
from robust_moe.attacks.losses import targeted_dlr
from robust_moe.attacks.passes import Tally
from robust_moe_kernels.modules import attack_mode

EPS = {"Linf": 0.15, "L2": 0.9}  # about half of the victim's images survive the first, a fifth the second
STEPS = 100


@pytest.fixture(autouse=True)
def quiet():
    """Their warning about points without a gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Warning)
        yield


def rounded_norm(x: Tensor, keepdim: bool = False) -> Tensor:
    norm = x.double().flatten(1).norm(dim=1).to(x.dtype)
    return per_sample(norm, x) if keepdim else norm


@pytest.fixture
def rounded(monkeypatch) -> None:
    def normalize(self, x: Tensor) -> Tensor:
        length = x.abs().flatten(1).amax(1) if self.norm == "Linf" else rounded_norm(x)
        return x / (per_sample(length, x) + 1e-12)

    monkeypatch.setattr(theirs, "L2_norm", rounded_norm)
    monkeypatch.setattr(theirs.APGDAttack, "normalize", normalize)


def one_climb(victim, norm: str, loss: str, rank: int = 2, steps: int = STEPS, rho: float = 0.75):
    """(what we found, what they found, as ours) from one start."""
    model, x, y = victim
    ours = APGD(EPS[norm], steps, norm, loss, seed=3, rho=rho)
    start = ours.start(x, None, 3, 0)
    settings = {"n_iter": steps, "norm": norm, "eps": EPS[norm], "rho": rho}
    target = model(x).sort(dim=1)[1][:, -rank]
    if loss == "dlr-targeted":
        attack = theirs.APGDAttack_targeted(model, **settings)
        attack.y_target = target
    else:
        attack = theirs.APGDAttack(model, loss=loss, **settings)
    attack.init_hyperparam(x)
    best, robust, best_loss, fooling = attack.attack_single_run(x, y, x_init=start)
    fooled = robust == 0
    expected = Found(torch.where(per_sample(fooled, x), fooling, best), fooled, best_loss)
    with attack_mode(model):
        passes = ours.aim(model, x, y, Tally("cpu"), largest_label=9)
        if loss == "dlr-targeted":
            passes = replace(passes, loss=targeted_dlr, extras=(target,))
        found = ours.climb(passes, start, x)
    return found, Found(*(tensor.detach() for tensor in expected))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("loss", "rank"), [("ce", 0), ("dlr", 0), ("dlr-targeted", 2), ("dlr-targeted", 5)])
def test_a_climb_finds_the_same_to_the_bit(victim, rounded, norm, loss, rank):
    found, expected = one_climb(victim, norm, loss, rank)
    assert 0.1 < expected.fooled.float().mean() < 0.9
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.fooled, expected.fooled)
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize(
    ("steps", "rho"), [(1, 0.75), (2, 0.75), (5, 0.75), (19, 0.75), (40, 0.5), (40, 1.0), (40, 0.0)]
)
def test_any_number_of_steps_and_share_of_rises(victim, steps, rho):
    found, expected = one_climb(victim, "Linf", "ce", steps=steps, rho=rho)
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_l2_with_their_own_norms_gives_the_same_verdicts(victim, loss):
    found, expected = one_climb(victim, "L2", loss)
    assert (found.fooled == expected.fooled).float().mean() >= 0.98
    if loss == "ce":  # bounded slopes: 100 steps of 1e-7 each, gained on by the same ascent
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-3, atol=1e-3)


class RowByRow(nn.Module):
    """A trained two-layer network in sums whose order does not depend on the batch, so that any batching gives the same
    bits."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)) / math.sqrt(shape[1]))
            for shape in ((24, 64), (10, 24))
        )
        optimizer = torch.optim.Adam(self.parameters(), 0.03)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(torch.relu(x.flatten(1) @ self.first.T) @ self.second.T, y).backward()
            optimizer.step()
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu((x.flatten(1)[:, None] * self.first).sum(2))
        return (hidden[:, None] * self.second).sum(2)


@pytest.fixture(scope="module")
def row_by_row(victim) -> nn.Module:
    return RowByRow(victim.x, victim.y)


def starting_like(ours: APGD, x: Tensor, kind: type) -> Callable[..., object]:
    """Their class, starting where ours starts: their climbs are counted, their images found again by their pixels."""

    class Same(kind):
        climbs = 0

        def attack_single_run(self, part, labels, x_init=None):
            index = torch.stack([(x == image).flatten(1).all(1).nonzero()[0, 0] for image in part])
            start = ours.start(part, index, ours.seed, self.climbs)
            self.climbs += 1
            return super().attack_single_run(part, labels, start)

    return Same


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_the_whole_attack_finds_the_same(victim, row_by_row, rounded, norm, loss):
    """All targets and restarts: fooled points drop out on both sides, and ours batches the climbs of the last ones."""
    x, y = victim.x, victim.y
    eps = {"Linf": 0.16, "L2": 0.85}[norm]
    restarts, targets = (1, 9) if loss == "dlr-targeted" else (4, 1)
    ours = APGD(eps, 20, norm, loss, restarts=restarts, seed=5, n_targets=targets)
    settings = {"n_iter": 20, "norm": norm, "eps": eps, "n_restarts": restarts}
    if loss == "dlr-targeted":
        attack = starting_like(ours, x, theirs.APGDAttack_targeted)(row_by_row, n_target_classes=9, **settings)
    else:
        attack = starting_like(ours, x, theirs.APGDAttack)(row_by_row, loss=loss, **settings)
    expected = attack.perturb(x, y)
    found = ours.find(row_by_row, x, y)
    clean = row_by_row(x).argmax(1) == y
    fooled = clean & (row_by_row(expected).argmax(1) != y)
    assert 0.1 < fooled.float().mean() < 0.9
    assert torch.equal(found.fooled[clean], fooled[clean])
    assert torch.equal(found.images[fooled], expected[fooled])
