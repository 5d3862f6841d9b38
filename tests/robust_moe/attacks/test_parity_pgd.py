"""PGD and FGSM against foolbox, which walks the same path from the same start."""

from __future__ import annotations

import copy

import foolbox
import pytest
import torch
from torch import nn

from robust_moe.attacks import FGSM, PGD
from robust_moe.models import BasicBlock
from robust_moe_kernels.modules import replace_blocks


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 50), nn.GELU(), nn.Linear(50, 10))


def batch_norm_cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    model(torch.rand(32, 1, 8, 8))  # statistics that are not the identity
    return model


def routed() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)
    )
    return replace_blocks(model, "1", num_experts=3, top_k=2, init="fresh")


NETWORKS = {"mlp": mlp, "batch_norm_cnn": batch_norm_cnn, "routed": routed}


def theirs(attack, model, x, labels, eps, targeted=False):
    """Their iterate itself, not clipped again."""
    criteria = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    return attack.run(foolbox.PyTorchModel(model, bounds=(0, 1)), x, criteria(labels), epsilon=eps)


@pytest.fixture(params=[*NETWORKS, "trained"])
def model(request, victim) -> nn.Module:
    torch.manual_seed(1)
    return (victim.model if request.param == "trained" else NETWORKS[request.param]()).eval()


@pytest.mark.parametrize("targeted", [False, True])
def test_linf_pgd_is_the_same_to_the_bit(model, victim, targeted):
    x, y = victim.x, (victim.y + targeted) % 10
    for eps, alpha, steps in ((0.1, 0.02, 10), (8 / 255, 2 / 255, 7), (0.3, 0.5, 3)):
        attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False)
        ours = PGD(eps, steps, alpha, random_start=False, targeted=targeted)(model, x, y)
        assert torch.equal(ours, theirs(attack, model, x, y, eps, targeted))
        assert not torch.equal(ours, x)


def test_fgsm_is_the_same_to_the_bit(model, victim):
    attack = foolbox.attacks.LinfFastGradientAttack()
    expected = theirs(attack, model, victim.x, victim.y, 0.1)
    assert torch.equal(FGSM(0.1)(model, victim.x, victim.y), expected)


def test_l2_pgd_is_the_same_to_rounding(model, victim):
    """In float64: norms are summed in another order, one unit each. Five steps through a smooth enough network amplify
    1e-16 to far below 1e-11; a step of another kind would differ by 1e-2."""
    if any(hasattr(module, "routing") for module in model.modules()):
        pytest.skip("a unit may change a route")
    model, x = copy.deepcopy(model).double(), victim.x.double()
    attack = foolbox.attacks.L2PGD(abs_stepsize=0.2, steps=5, random_start=False)
    ours = PGD(0.7, 5, 0.2, "L2", random_start=False)(model, x, victim.y)
    torch.testing.assert_close(ours, theirs(attack, model, x, victim.y, 0.7), rtol=0, atol=1e-11)
    assert (ours - x).flatten(1).norm(dim=1).min() > 0.5
