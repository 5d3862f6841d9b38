"""What tests of methods' losses share: small networks in float64, and losses, attacks and mixtures written out."""

from __future__ import annotations

import torch
from torch import nn

from robust_moe.engine.experiment import make_method
from robust_moe.models import ExpertMixture
from robust_moe_kernels.ops.attack_step import random_start

EPS, ALPHA, STEPS, BETA, B, CLASSES = 0.1, 0.04, 3, 2.5, 7, 4
COMMON = (
    f"method.attack.eps={EPS}",
    f"method.attack.alpha={ALPHA}",
    f"method.attack.steps={STEPS}",
    "model.moe.layers=[]",
    "model.moe.balance=none",
)
WEIGHED = (f"method.beta={BETA}",)
MIXTURE = ("model.mixture.num_experts=3", "model.moe.balance=none")


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()


def mixture(routing="hard", experts=3):
    router = nn.Sequential(nn.Flatten(), nn.Linear(16, experts)).double()
    return ExpertMixture(router, [network() for _ in range(experts)], 1, routing=routing, top_k=2)


def update(config, model, batch, number=0):
    """The update of that number, the weights left alone in between; its loss and the gradients."""
    method = make_method(config)
    for count, found in enumerate(method.updates(model.train(), batch, step_seed=5)):
        if count == number:
            model.zero_grad()
            found.loss.backward()
            return method, found
    raise AssertionError(f"no update {number}")


def ce(logits, y):
    """-log p_y of each sample, from probabilities."""
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    return torch.stack([-p[i, y[i]].log() for i in range(len(y))])


def kl(p_logits, q_logits):
    """sum p (log p - log q) of each sample."""
    p, q = p_logits.softmax(1), q_logits.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def ascend(objective, x0, index, seed):
    """PGD by hand: sign steps on a loss of each sample, projected on the ball and on [0, 1]."""
    x = random_start(x0, EPS, seed, index)
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(x).sum(), x)
        x = x.detach() + ALPHA * grad.sign()
        x = torch.min(torch.max(x, x0 - EPS), x0 + EPS).clamp(0, 1)
    return x.detach()


def assert_same_update(model, reference, got, wanted):
    """The same loss and, after a backward of the reference, the same weight gradients."""
    torch.testing.assert_close(got.loss, wanted, rtol=1e-10, atol=1e-12)
    reference.zero_grad()
    wanted.backward()
    for (name, one), two in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12, msg=name)


def assert_dose(got, task, term):
    """The share of the loss that the method's own term contributes is logged."""
    torch.testing.assert_close(got.logs["dose"], (term / (task + term)).detach(), rtol=1e-9, atol=0)


def chosen(model, x, rank):
    """Logits of the expert that the router ranks there, and its number, sample by sample."""
    order = model.gate(x).argsort(1, descending=True)[:, rank].tolist()
    return order, torch.cat([model.experts.networks[e](x[i : i + 1]) for i, e in enumerate(order)])


def through(model, x, order):
    return torch.cat([model.experts.networks[e](x[i : i + 1]) for i, e in enumerate(order)])


def hard(model, x):
    """The hard mixture with its straight-through weight, sample by sample."""
    order, logits = chosen(model, x, 0)
    scores = model.gate(x).softmax(1)
    weight = torch.stack([1 + scores[i, e] - scores[i, e].detach() for i, e in enumerate(order)])
    return weight[:, None] * logits


def soft(model, x):
    scores = model.gate(x).softmax(1)
    return sum(scores[:, e, None] * model.experts.networks[e](x) for e in range(len(model.experts.networks)))
