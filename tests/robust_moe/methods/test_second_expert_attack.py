"""RT-ER's attack on a model and its second expert: what it counts, and how its images are scored."""

from __future__ import annotations

import pytest
import torch
from graph_recorder import Recorder
from graphed_attacks import batch, network
from torch import Tensor, nn

from robust_moe.attacks import Counts, attack_mode
from robust_moe.attacks.graph import StepGraphs
from robust_moe.attacks.losses import cross_entropy, kl_divergence
from robust_moe.methods.moe_attacks import SecondExpertPGD, clean_second_experts, held
from robust_moe_kernels.modules import rerouted

BETA = 3.0
SETTINGS = ({}, {"restarts": 2}, {"best": True}, {"best": True, "restarts": 2, "eot_iter": 2})


def attack(**settings) -> SecondExpertPGD:
    return SecondExpertPGD(beta=BETA, eps=0.1, steps=3, **settings)


@torch.no_grad()
def judged(model: nn.Module, images: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(fooled, loss) of ``images``, by the definition."""
    second = held(clean_second_experts(model, x))
    with attack_mode(model):
        logits = model(images)
        with rerouted(model, second):
            divergence = kl_divergence(model(images), model(x))
    return logits.argmax(1) != y, cross_entropy(logits, y) + BETA * divergence


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_images_are_scored_by_the_loss_that_they_raise(settings):
    """The labels are among all classes, which the logits of both models together have twice."""
    model, (x, _, index) = network(), batch(0, 12)
    y = torch.arange(12) % 5
    found = attack(**settings).find(model, x, y, index)
    fooled, loss = judged(model, found.images, x, y)
    assert torch.equal(found.fooled, fooled)
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-5)  # fp32 sums, the KL's terms cancel
    assert torch.equal(attack(**settings)(model, x, y, index), found.images)


def test_more_restarts_and_iterates_find_no_better_images():
    model, (x, y, index) = network(), batch(0, 12)
    plain = attack().find(model, x, y, index)
    for settings in SETTINGS[1:3]:
        found = attack(**settings).find(model, x, y, index)
        assert (found.fooled >= plain.fooled).all()
        assert ((found.loss >= plain.loss) | (found.fooled & ~plain.fooled)).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_pass_is_counted_also_of_a_graph(settings):
    model, (x, y, index) = network(), batch(0)
    one, recorder = attack(**settings), Recorder()
    one.graphs = StepGraphs(capturer=recorder)
    forwards, backwards = one.passes
    for _ in range(3):
        counts = Counts()
        one(model, x, y, index, counts=counts)
        assert counts == Counts(len(x) * forwards, len(x) * backwards)
    assert recorder.replays > 0
