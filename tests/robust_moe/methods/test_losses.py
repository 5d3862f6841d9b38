"""Every method's loss and attack against its formula written out, sample by sample, in float64 on networks without
batch norm."""

import copy

import pytest
import torch
from method_losses import (
    BETA,
    CLASSES,
    COMMON,
    EPS,
    MIXTURE,
    WEIGHED,
    B,
    ascend,
    assert_dose,
    assert_same_update,
    ce,
    chosen,
    hard,
    kl,
    mixture,
    network,
    soft,
    through,
    update,
)

from robust_moe.data import Batch
from robust_moe.engine.experiment import make_method
from robust_moe.methods.mart import boosted_cross_entropy
from robust_moe.models import DualModel
from robust_moe.seeding import derive_seed
from robust_moe_kernels.ops.attack_step import random_start


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    images = torch.rand(B, 1, 4, 4, dtype=torch.float64)
    return Batch(images, torch.arange(B) % CLASSES, torch.arange(B) + 30)


def test_trades(tiny, batch):
    model = network()
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.name=trades", *WEIGHED, *COMMON), model, batch)
    with torch.no_grad():
        clean = reference(batch.images)
    x = ascend(lambda x: kl(clean, reference(x)), batch.images, batch.index, 5)
    f, g = reference(batch.images), reference(x)
    assert_same_update(model, reference, got, (ce(f, batch.labels) + BETA * kl(f, g)).mean())
    assert_dose(got, ce(f, batch.labels).mean(), BETA * kl(f, g).mean())


def test_mart(tiny, batch):
    model = network()
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.name=mart", *WEIGHED, *COMMON), model, batch)
    x = ascend(lambda x: ce(reference(x), batch.labels), batch.images, batch.index, 5)
    f, g = reference(batch.images), reference(x)
    p, q = f.softmax(1), g.softmax(1)
    terms = []
    for i, y in enumerate(batch.labels.tolist()):
        wrong = max(q[i, k] for k in range(CLASSES) if k != y)
        boosted = -q[i, y].log() - (1 - wrong).log()
        terms.append(boosted + BETA * kl(f, g)[i] * (1 - p[i, y]))
    assert_same_update(model, reference, got, torch.stack(terms).mean())


def test_boosted_cross_entropy_is_finite_where_probabilities_round_to_one():
    logits = torch.tensor([[200.0, 0.0, -3.0], [0.0, 200.0, -3.0]], requires_grad=True)
    loss = boosted_cross_entropy(logits, torch.tensor([1, 1]))
    # a sure mistake costs its margin twice; a right one nothing
    torch.testing.assert_close(loss, torch.tensor([400.0, 0.0]), atol=1e-3, rtol=1e-3)
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_fast_at_trains_on_one_step_of_five_quarters_of_the_radius(tiny, batch):
    model = network()
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.name=fast_at", "method.overfit_guard=false", *COMMON), model, batch)
    x = random_start(batch.images, EPS, 5, batch.index).requires_grad_()
    (grad,) = torch.autograd.grad(ce(reference(x), batch.labels).sum(), x)
    moved = x.detach() + 1.25 * EPS * grad.sign()
    x = torch.min(torch.max(moved, batch.images - EPS), batch.images + EPS).clamp(0, 1)
    assert_same_update(model, reference, got, ce(reference(x), batch.labels).mean())


def test_free_at_moves_the_perturbation_by_the_gradient_of_each_update_and_keeps_it(tiny, batch):
    config = tiny("method.name=free_at", "method.replays=3", *COMMON)
    model = network()
    method = make_method(config)
    delta = torch.zeros_like(batch.images)
    for step in range(2):  # the second batch goes on with the first one's perturbation
        for found in method.updates(model, batch, step_seed=step):
            reference = copy.deepcopy(model)
            x = (batch.images + delta).clamp(0, 1).requires_grad_()
            wanted = ce(reference(x), batch.labels).mean()
            (grad,) = torch.autograd.grad(wanted, x, retain_graph=True)
            model.zero_grad()
            found.loss.backward()
            assert_same_update(model, reference, found, wanted)
            delta = (delta + EPS * grad.sign()).clamp(-EPS, EPS)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        torch.testing.assert_close(method.state_dict()["delta"], delta)
    assert float(delta.abs().max()) == EPS


@pytest.mark.parametrize(("routing", "whole"), [("hard", hard), ("soft", soft)])
def test_rt_er_as_the_paper_defines_it(tiny, batch, routing, whole):
    model = mixture(routing)
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.name=rt_er", *WEIGHED, *COMMON, *MIXTURE), model, batch)
    order, second = chosen(reference, batch.images, 1)
    target = second.detach()

    def joint(x):
        return ce(whole(reference, x), batch.labels) + BETA * kl(through(reference, x, order), target)

    x = ascend(joint, batch.images, batch.index, 5)
    wanted = ce(whole(reference, x), batch.labels) + BETA * kl(through(reference, x, order), second)
    assert_same_update(model, reference, got, wanted.mean())


def test_rt_er_as_released_has_two_adversaries_and_the_other_divergence(tiny, batch):
    model = mixture()
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.name=rt_er", *WEIGHED, "method.form=released", *COMMON, *MIXTURE), model, batch)
    order, second = chosen(reference, batch.images, 1)
    x = ascend(lambda x: ce(hard(reference, x), batch.labels), batch.images, batch.index, 5)
    x2 = ascend(
        lambda x: ce(through(reference, x, order), batch.labels), batch.images, batch.index, derive_seed(5, "second")
    )
    term = BETA * kl(second, through(reference, x2, order))
    assert_same_update(model, reference, got, (ce(hard(reference, x), batch.labels) + term).mean())
    assert_dose(got, ce(hard(reference, x), batch.labels).mean(), term.mean())


def dual():
    return DualModel(network(), mixture(), alpha=0.7)


DUAL = ("model.dual.enabled=true", "method.name=jtdmoe", *WEIGHED, *COMMON, *MIXTURE)


def test_jtdmoe_upper_level_is_the_cross_entropy_of_mixed_probabilities(tiny, batch):
    model = dual()
    reference = copy.deepcopy(model)
    _, got = update(tiny(*DUAL), model, batch, number=1)
    mixed = 0.3 * reference.standard(batch.images).softmax(1) + 0.7 * hard(reference.robust, batch.images).softmax(1)
    wanted = torch.stack([-mixed[i, y].log() for i, y in enumerate(batch.labels.tolist())]).mean()
    assert_same_update(model, reference, got, wanted)


def test_jtdmoe_lower_level_of_the_paper_is_rt_er_of_the_robust_half(tiny, batch):
    model = dual()
    reference = copy.deepcopy(model)
    _, got = update(tiny(*DUAL), model, batch)
    _, wanted = update(tiny("method.name=rt_er", *WEIGHED, *COMMON, *MIXTURE), reference.robust, batch)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=0, atol=0)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad)


def test_jtdmoe_lower_level_as_released_sums_over_experts_with_their_own_adversaries(tiny, batch):
    """CE(F_R(x'), y) + β Σ_e KL(f_e(x) ‖ f_e(x_e)): x' attacks the mixture, x_e attacks the expert e alone."""
    model = dual()
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.form=released", *DUAL), model, batch)
    robust, y = reference.robust, batch.labels
    x = ascend(lambda x: ce(hard(robust, x), y), batch.images, batch.index, 5)
    divergence = 0.0
    for e, expert in enumerate(robust.experts.networks):
        own = ascend(lambda x: ce(expert(x), y), batch.images, batch.index, derive_seed(5, f"expert {e}"))  # noqa: B023
        assert not torch.equal(own, x)
        divergence = divergence + kl(expert(batch.images), expert(own)).mean()
    wanted = ce(hard(robust, x), y).mean() + BETA * divergence
    assert_same_update(model, reference, got, wanted)
    assert_dose(got, ce(hard(robust, x), y).mean(), BETA * divergence)
    assert float(got.logs["expert_loss"]) == pytest.approx(float(divergence.detach()), rel=1e-10)


@pytest.mark.parametrize("level", ["experts", "router"])
def test_advmoe_levels(tiny, batch, level):
    model = mixture()
    reference = copy.deepcopy(model)
    number = ("experts", "router").index(level)
    _, got = update(tiny("method.name=advmoe", *WEIGHED, *COMMON, *MIXTURE), model, batch, number)
    with torch.no_grad():
        clean, routes = hard(reference, batch.images), reference.gate(batch.images)
    x = ascend(
        lambda x: kl(clean, hard(reference, x)) + kl(routes, reference.gate(x)),
        batch.images,
        batch.index,
        derive_seed(5, level),
    )
    for parameter in (reference.gate if level == "experts" else reference.experts).parameters():
        parameter.requires_grad_(False)
    f, g = hard(reference, batch.images), hard(reference, x)
    wanted = ce(f, batch.labels) + BETA * kl(f, g)
    if level == "router":
        wanted = wanted + BETA * kl(routes, reference.gate(x))  # the target is a constant
    assert_same_update(model, reference, got, wanted.mean())
