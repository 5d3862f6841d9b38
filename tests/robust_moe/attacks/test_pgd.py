"""PGD's choices: losses, targets, the best iterate, averaging over draws; and FGSM. The loop itself is in
test_attacks.py, parity in test_parity_pgd.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks import FGSM, PGD
from robust_moe.attacks.losses import LOSSES, kl_divergence


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", [*LOSSES, "kl"])
def test_each_loss_is_climbed_by_its_own_gradient(victim, loss, norm):
    """The loop written out, from the attack's own start; and it leads upwards."""
    model, x, y = victim
    clean = model(x)

    def losses(images: Tensor) -> Tensor:
        logits = model(images)
        return kl_divergence(logits, clean) if loss == "kl" else LOSSES[loss](logits, y)

    attack = PGD({"Linf": 0.08, "L2": 0.4}[norm], 8, norm=norm, loss=loss, seed=2)
    at = attack.start(x, None, 2, 0)
    for _ in range(8):
        at = at.clone().requires_grad_()
        (grad,) = torch.autograd.grad(losses(at).sum(), at)
        at = attack.step(at.detach(), grad, x)
    assert torch.equal(attack(model, x, y), at)
    assert (losses(at) > losses(x)).float().mean() > 0.95


@pytest.mark.parametrize("loss", LOSSES)
def test_targeted_reaches_the_labels_given(victim, loss):
    """Towards each image's second class, and far more often than an attack that only leaves the first."""
    model, x, _ = victim
    target = model(x).argsort(dim=1)[:, -2]
    attack = PGD(0.3, 20, loss=loss, targeted=True, restarts=2)
    images = attack(model, x, target)
    reached = model(images).argmax(1) == target
    assert reached.float().mean() > 0.8
    # restarts keep what reached its target: one restart alone reaches no more
    assert reached.sum() >= (model(PGD(0.3, 20, loss=loss, targeted=True)(model, x, target)).argmax(1) == target).sum()


def test_targeted_is_the_attack_on_the_negated_loss(victim):
    model, x, y = victim
    grad_x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(grad_x), y, reduction="sum"), grad_x)
    expected = (x + (x - 0.1 * grad.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
    assert torch.equal(FGSM(0.1, targeted=True)(model, x, y), expected)


@pytest.mark.parametrize("restarts", [1, 2])
def test_best_is_each_samples_worst_iterate(victim, restarts):
    """Replayed: of all iterates, starts included, the misclassified one of the highest loss, else the highest."""
    model, x, y = victim
    attack = PGD(0.1, 6, alpha=0.08, restarts=restarts)  # steps long enough to leave maxima again
    iterates = []
    for restart in range(restarts):
        at = attack.start(x, None, 0, restart)
        for _ in range(7):
            iterates.append(at)
            at = at.clone().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)
            at = attack.step(at.detach(), grad, x)
    logits = [model(images) for images in iterates]
    keys = torch.stack([(z.argmax(1) != y) * 1e3 + F.cross_entropy(z, y, reduction="none").double() for z in logits])
    expected = torch.stack(iterates)[keys.argmax(0), torch.arange(len(y))]
    got = PGD(0.1, 6, alpha=0.08, restarts=restarts, best=True)(model, x, y)
    assert torch.equal(got, expected)
    assert not torch.equal(got, attack(model, x, y))


class Noisy(nn.Module):
    """Adds a strong random tilt to the score of the second class; counts forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        tilt = 8 * torch.randn(x.shape, generator=self.generator)
        score = (x * (1 + tilt)).flatten(1).mean(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def test_eot_averages_gradients():
    x, y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    raised = {}
    for draws in (1, 200):
        model = Noisy()
        attack = FGSM(0.1, eot_iter=draws)
        raised[draws] = (attack(model, x, y) > x).float().mean().item()
        assert attack.passes == (draws, draws)
        assert model.forwards == draws
    assert raised[1] < 0.7  # a draw's gradient 1 + 8 n is positive with probability 0.55
    assert raised[200] > 0.9  # the mean of 200 draws is 1 ± 0.57


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, (5, 5)),
        ({"best": True}, (6, 5)),
        ({"restarts": 3}, (18, 15)),
        ({"restarts": 3, "best": True}, (18, 15)),
        ({"loss": "kl"}, (6, 5)),
        ({"eot_iter": 4, "best": True}, (21, 20)),
    ],
    ids=str,
)
def test_passes(settings, passes):
    model = Noisy()
    attack = PGD(0.1, 5, **settings)
    attack(model, torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64))
    assert attack.passes == passes
    assert model.forwards == passes[0]


def test_fast_training_start(victim):
    """Wong et al.: a uniform start, then 1.25 ε: still in the ball, and not on its edge everywhere."""
    model, x, y = victim
    got = FGSM(0.1, alpha=0.125, random_start=True)(model, x, y)
    inside = ((got - x).abs() < 0.0999) & (got > 0) & (got < 1)
    assert (got - x).abs().max() <= 0.1 + 1e-7
    assert 0.01 < inside.float().mean() < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "loss: expected one of ce, margin, dlr, kl, got 'mse'"),
        (
            {"loss": "kl", "random_start": False},
            "random_start: expected True with loss='kl' (no gradient at the image)",
        ),
        ({"loss": "kl", "targeted": True}, "targeted: expected False with loss='kl', which has no labels, got True"),
        ({"eot_iter": 0}, "eot_iter: expected a count >= 1, got 0"),
        ({"eot_iter": 1.0}, "eot_iter: expected an integer, got 1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError) as error:
        PGD(0.1, 2, **settings)
    assert str(error.value).startswith(message)
