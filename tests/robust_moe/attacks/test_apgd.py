"""Auto-PGD: schedule, start, cost, restarts and targets, and what it does with odd models. Parity with the authors'
code is in test_parity_apgd.py."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robust_moe.attacks import APGD, FGSM, PGD
from robust_moe.attacks.apgd import checkpoints
from robust_moe.attacks.passes import Tally
from robust_moe_kernels.modules import attack_mode

LOSSES = ("ce", "margin", "dlr", "dlr-targeted")


class Counting(nn.Module):
    """Counts images that go forward, and those whose gradient comes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)  # hooks on the image itself would add up over draws
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def test_checkpoints_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1]
    assert checkpoints(0) == []
    for steps in range(2, 60):  # windows shrink to a smallest one
        windows = [b - a for a, b in zip([0, *checkpoints(steps)], checkpoints(steps), strict=False)]
        assert windows == sorted(windows, reverse=True)
        assert min(windows) >= max(int(0.06 * steps), 1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_start_is_on_the_balls_surface(norm):
    x = torch.full((50, 3, 4, 4), 0.5, dtype=torch.float64)
    attack = APGD(0.25, norm=norm)
    start = attack.start(x, torch.arange(50), 1, 0)
    delta = (start - x).flatten(1)
    reach = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
    torch.testing.assert_close(reach, torch.full_like(reach, 0.25), rtol=1e-9, atol=0)
    assert delta.mean().abs() < 0.25 * 4 / math.sqrt(delta.numel())  # no side is preferred
    torch.testing.assert_close(attack.start(x[7:9], torch.tensor([7, 8]), 1, 0), start[7:9], rtol=0, atol=0)
    for other in (attack.start(x, torch.arange(50), 2, 0), attack.start(x, torch.arange(50), 1, 1)):
        assert not torch.isclose(other, start).flatten(1).all(1).any()
    black = attack.start(torch.zeros_like(x), torch.arange(50), 1, 0)
    assert black.min() == 0  # clamped
    assert black.max() <= 0.25


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("eot_iter", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_exact_pass_counts(loss, eot_iter, steps):
    """Of a model that nothing fools, image by image; and never more with one that is fooled."""
    always = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with torch.no_grad():
        always[1].weight.mul_(1e-3)
        always[1].bias.copy_(torch.tensor([9.0, 0.0, 1.0, 2.0, 3.0]))
    model = Counting(always)
    x, y = torch.rand(6, 3, 2, 2), torch.zeros(6, dtype=torch.int64)
    attack = APGD(0.1, steps, loss=loss, restarts=2, eot_iter=eot_iter, n_targets=4)
    found = attack.find(model, x, y)
    assert not found.fooled.any()
    assert (model.forwards, model.backwards) == tuple(6 * count for count in attack.passes)
    climbs = 8 if loss == "dlr-targeted" else 2
    assert attack.passes == (climbs * (steps * eot_iter + 1) + (loss == "dlr-targeted"), climbs * steps * eot_iter)
    model.forwards = model.backwards = 0
    y[:3] = 1  # fooled before anything is done
    assert attack.find(model, x, y).fooled.tolist() == [True] * 3 + [False] * 3
    most = tuple(6 * count for count in attack.passes)
    assert model.forwards < most[0]
    assert model.backwards < most[1] or not steps


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", LOSSES)
def test_find_and_craft_agree(victim, norm, loss):
    """Dropping fooled samples and batching the climbs of the others changes verdicts and losses by the model's own
    dependence on the batch, here the last bits of a float64."""
    model, x, y = copy.deepcopy(victim.model).double(), victim.x.double(), victim.y
    attack = APGD({"Linf": 0.15, "L2": 0.9}[norm], 8, norm, loss, restarts=2, n_targets=3)
    found = attack.find(model, x, y)
    assert 0.2 < found.fooled.double().mean() < 1
    assert torch.equal(attack(model, x, y), found.images)
    torch.testing.assert_close(attack.craft(model, x, y).images, found.images, rtol=0, atol=1e-6)
    assert torch.equal(model(found.images).argmax(1) != y, found.fooled)
    if loss in ("ce", "margin"):
        assert (attack.loss(model(found.images), y) <= found.loss + 1e-9).all()


def test_more_restarts_and_targets_only_add(victim):
    model, x, y = victim
    one = APGD(0.12, 6, loss="ce").find(model, x, y)
    three = APGD(0.12, 6, loss="ce", restarts=3).find(model, x, y)
    assert (three.fooled >= one.fooled).all()
    assert (three.loss >= one.loss).all()
    few = APGD(0.12, 6, loss="dlr-targeted", n_targets=1).find(model, x, y)
    many = APGD(0.12, 6, loss="dlr-targeted", n_targets=9).find(model, x, y)
    assert (many.fooled >= few.fooled).all()
    assert many.fooled.sum() > few.fooled.sum()
    assert torch.equal(many.images[few.fooled], few.images[few.fooled])  # the first success stays


def test_climbs_higher_than_pgd_of_the_same_cost(victim):
    model, x, y = victim
    found = APGD(0.15, 40, loss="ce").find(model, x, y)
    assert found.loss.mean() > F.cross_entropy(model(PGD(0.15, 40)(model, x, y)), y)


class Halving(nn.Module):
    """Gives the mean of a random half of the logits' noise: one draw tells little, many tell the direction."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        noise = 12 * torch.randn(x.shape, generator=self.generator)
        score = (x * (1 + noise)).flatten(1).sum(1) / x[0].numel()
        return torch.stack([torch.zeros_like(score), score], 1)


def test_eot_averages_the_gradient_of_a_random_model():
    x, y = torch.full((8, 3, 8, 8), 0.5), torch.zeros(8, dtype=torch.int64)
    means = [(APGD(0.1, 5, eot_iter=draws)(Halving(), x, y) - x).mean() for draws in (1, 60)]
    assert means[1] > means[0] + 0.01  # up is where the expected score rises


@pytest.mark.parametrize("classes", [1, 2, 3, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_few_classes(classes, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    x, y = torch.rand(5, 3, 2, 2), torch.arange(5) % classes
    found = APGD(0.5, 12, loss=loss).find(model, x, y)
    assert torch.equal(found.fooled, model(found.images).argmax(1) != y)
    assert found.fooled.any() == (classes > 1)
    assert found.loss.isfinite().all()


def test_three_classes_reach_the_closed_form_of_a_linear_model():
    """Against class t, the best that ε in ℓ∞ can do to z_t − z_y is ε‖w_t − w_y‖₁; targets cover every t."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 12, generator=generator))
    x = 0.3 + 0.4 * torch.rand(200, 3, 2, 2, generator=generator, dtype=torch.float64)
    y = model(x).argmax(1)
    weight, logits = model[1].weight, model(x)
    gains = (weight[None] - weight[y][:, None]).abs().sum(2) * 0.1 + logits - logits.gather(1, y[:, None])
    best = gains.masked_fill(F.one_hot(y, 3).bool(), -math.inf).amax(1)
    found = APGD(0.1, 10, loss="dlr-targeted").find(model, x, y)
    clear = best.abs() > 1e-9
    assert 0.2 < found.fooled.double().mean() < 0.8
    assert torch.equal(found.fooled[clear], (best > 0)[clear])
    survived = ~found.fooled
    torch.testing.assert_close(found.loss[survived], best[survived], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    "attack",
    [
        *(partial(APGD, 0.1, 12, loss=loss, restarts=2, n_targets=3, eot_iter=2) for loss in LOSSES),
        partial(PGD, 0.1, 3, loss="kl", best=True, restarts=2),
        partial(PGD, 0.1, 3, loss="dlr", targeted=True, best=True, random_start=False),
        partial(FGSM, 0.1),
    ],
    ids=str,
)
def test_the_loop_reads_no_value_on_the_host(attack, norm):
    """Fake tensors have none, so that .item(), nonzero or a boolean index would raise."""
    attack = attack(norm=norm)
    with FakeTensorMode():
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        with attack_mode(model):
            x, tally = torch.rand(6, 3, 2, 2), Tally("cpu")
            passes = attack.aim(model, x, torch.arange(6) % 5, tally)
            assert attack.run(passes, x, None, 0).shape == (6, 3, 2, 2)
        with pytest.raises(DataDependentOutputException):
            attack.refuse_nonfinite(tally.nonfinite)


def test_empty_batch(victim):
    found = APGD(0.1).find(victim.model, victim.x[:0], victim.y[:0])
    assert [len(part) for part in found] == [0, 0, 0]


@pytest.mark.parametrize("when", [1, 2, 4])  # at the start, on the way, at the last forward
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_nan_stops_the_attack(victim, when, loss):
    class Breaking(nn.Module):
        forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            return victim.model(x) * (math.nan if self.forwards >= when else 1.0)

    attack = APGD(0.1, 3, loss=loss, n_targets=1)
    with pytest.raises(FloatingPointError, match="APGD: the model gave a non-finite"):
        attack(Breaking(), victim.x, victim.y)
    assert bool(attack.craft(Breaking(), victim.x, victim.y).nonfinite)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, "eps: expected a finite number >= 0, got -0.1"),
        ({"eps": "8/255"}, "eps: expected a number, got '8/255'"),
        ({"norm": "L1"}, "norm: expected one of Linf, L2, got 'L1'"),
        ({"loss": "cw"}, "loss: expected one of ce, margin, dlr, dlr-targeted, got 'cw'"),
        ({"rho": 1.5}, "rho: expected a number in [0, 1], got 1.5"),
        ({"n_targets": 0}, "n_targets: expected a count >= 1, got 0"),
        ({"n_targets": 2.0}, "n_targets: expected an integer, got 2.0"),
        ({"eot_iter": 0}, "eot_iter: expected a count >= 1, got 0"),
        ({"steps": -1}, "steps: expected a count >= 0, got -1"),
        ({"restarts": 0}, "restarts: expected a count >= 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as error:
        APGD(**{"eps": 0.1} | settings)
    assert str(error.value) == message


def test_bad_inputs(victim):
    with pytest.raises(ValueError, match=r"x: expected finite pixels in \[0, 1\], got values from 0 to 255"):
        APGD(0.1, 1)(victim.model, victim.x * 255, victim.y)
    with pytest.raises(ValueError, match="y: expected labels below 10, the number of logits, got a label of 11"):
        APGD(0.1, 1)(victim.model, victim.x, victim.y + 2)
