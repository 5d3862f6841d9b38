"""Methods that know routes, on a model that routes tokens: their losses written out by image and by token."""

import copy

import pytest
import torch
from method_losses import BETA, COMMON, MIXTURE, WEIGHED, ascend, assert_same_update, ce, kl, update
from token_models import CLASSES, images, token_model

from robust_moe.data import Batch
from robust_moe.methods.prc import pairwise_consistency
from robust_moe.methods.routed import run_gates
from robust_moe.seeding import derive_seed
from robust_moe_kernels.modules import moe_layers, only_expert

B, T = 5, 9


@pytest.fixture
def batch():
    return Batch(images(B), torch.arange(B) % CLASSES, torch.arange(B) + 30)


def gates(model, x):
    """Each layer's gate logits [B, T, E], on the graph."""
    model(x)
    return [layer.routing.clean_logits.view(len(x), T, -1) for layer in moe_layers(model).values()]


def route_divergence(clean, now):
    """Sum over layers of the mean over an image's tokens, [B]."""
    return torch.stack(
        [
            sum(torch.stack([kl(one[b], other[b]) for b in range(len(one))]).mean(1) for one, other in [pair])
            for pair in zip(clean, now, strict=True)
        ]
    ).sum(0)


@pytest.mark.parametrize("consistency", ["kl", "pairwise"])
def test_prc_compares_tokens_with_themselves(tiny, batch, consistency):
    model = token_model()
    reference = copy.deepcopy(model).train()
    settings = ("method.name=prc", f"method.consistency={consistency}", *WEIGHED, *COMMON, *MIXTURE)
    _, got = update(tiny(*settings), model, batch)
    x = ascend(lambda x: ce(reference(x), batch.labels), batch.images, batch.index, 5)
    pairs = list(zip(gates(reference, batch.images), gates(reference, x), strict=True))
    if consistency == "kl":
        route = sum(torch.cat([kl(r[b], s[b]) for b in range(B)]).mean() for r, s in pairs)
    else:
        route = sum(pairwise_consistency(r.flatten(0, 1), s.flatten(0, 1)) for r, s in pairs)
    task = ce(reference(x), batch.labels).mean()
    assert_same_update(model, reference, got, task + BETA * route)
    flips = torch.stack([(r.argmax(2) != s.argmax(2)).double().mean() for r, s in pairs]).mean()
    assert got.logs["route_flips"].item() == pytest.approx(flips.item())


def test_prcs_own_adversary_raises_the_mean_over_tokens(tiny, batch):
    model = token_model()
    reference = copy.deepcopy(model).train()
    _, got = update(tiny("method.name=prc", "method.adversary=router", *WEIGHED, *COMMON, *MIXTURE), model, batch)
    x = ascend(lambda x: ce(reference(x), batch.labels), batch.images, batch.index, 5)
    clean = [each.detach() for each in gates(reference, batch.images)]
    raised = lambda x: route_divergence(clean, gates(reference, x))  # noqa: E731
    x2 = ascend(raised, batch.images, batch.index, derive_seed(5, "router"))
    route = route_divergence(gates(reference, batch.images), gates(reference, x2)).mean()
    assert_same_update(model, reference, got, ce(reference(x), batch.labels).mean() + BETA * route)


def test_robust_gate_has_one_target_for_all_tokens_of_an_image(tiny, batch):
    model = token_model()
    reference = copy.deepcopy(model)
    settings = ("method.name=robust_gate", "method.temperature=0.3", *COMMON, *MIXTURE)
    _, got = update(tiny(*settings), model, batch, number=1)
    x = ascend(lambda x: ce(reference(x), batch.labels), batch.images, batch.index, 5)
    expected, hits = torch.zeros((), dtype=torch.float64), []
    with torch.no_grad():
        inputs = {name: found.inputs for name, found in run_gates(reference, x).items()}
    for name, layer in moe_layers(reference).items():
        losses = []
        for expert in range(layer.num_experts):
            with only_expert(layer, expert), torch.no_grad():
                losses.append(ce(reference(x), batch.labels))
        target = -torch.stack(losses, 1) / 0.3
        logits = layer.gate(inputs[name]).view(B, T, -1)
        expected = expected + sum(kl(target[b].expand(T, -1), logits[b]).mean() for b in range(B)) / B
        hits.append((logits.argmax(2) == target.argmax(1)[:, None]).double().mean())
    assert_same_update(model, reference, got, expected)
    assert got.logs["gate_hits"].item() == pytest.approx(torch.stack(hits).mean().item())


@pytest.mark.parametrize("level", [0, 1])
def test_advmoe_raises_and_lowers_the_mean_over_tokens(tiny, batch, level):
    model = token_model()
    reference = copy.deepcopy(model)
    _, got = update(tiny("method.name=advmoe", *WEIGHED, *COMMON, *MIXTURE), model, batch, number=level)
    with torch.no_grad():
        logits = reference(batch.images)
        clean = gates(reference, batch.images)
    raised = lambda x: kl(logits, reference(x)) + route_divergence(clean, gates(reference, x))  # noqa: E731
    x = ascend(raised, batch.images, batch.index, derive_seed(5, ("experts", "router")[level]))
    task, robust = ce(reference(batch.images), batch.labels).mean(), kl(reference(batch.images), reference(x)).mean()
    loss = task + BETA * robust
    if level:
        loss = loss + BETA * route_divergence(clean, gates(reference, x)).mean()
    torch.testing.assert_close(got.loss.detach(), loss.detach())


def test_rt_er_holds_each_token_at_its_second_expert(tiny, batch):
    model = token_model(top_k=1)
    reference = copy.deepcopy(model)
    settings = ("method.name=rt_er", "method.form=paper", *WEIGHED, *COMMON, *MIXTURE)
    _, got = update(tiny(*settings), model, batch)
    with torch.no_grad():
        second = [each.topk(2, 2).indices[:, :, 1] for each in gates(reference, batch.images)]

    def along(x):
        """The network whose tokens are at their second experts, token by token."""
        tokens = reference.patches(x).flatten(2).transpose(1, 2)
        for layer, experts in zip(reference.layers, second, strict=True):
            inputs = tokens + tokens.mean(1, keepdim=True)
            moved = [layer.experts.networks[e](inputs[b, t]) for b in range(B) for t, e in enumerate(experts[b])]
            tokens = tokens + torch.stack(moved).view_as(tokens)
        return reference.head(tokens.mean(1))

    with torch.no_grad():
        clean = along(batch.images)
    raised = lambda x: ce(reference(x), batch.labels) + BETA * kl(along(x), clean)  # noqa: E731
    x = ascend(raised, batch.images, batch.index, 5)
    loss = ce(reference(x), batch.labels).mean() + BETA * kl(along(x), along(batch.images)).mean()
    assert_same_update(model, reference, got, loss)
