"""Balance losses: closed forms, derivatives, an estimate by sampling, and their sum over a model."""

from __future__ import annotations

import math

import torch
from pytest import approx, mark, raises
from torch import Tensor, nn
from torch.autograd import gradcheck

from robust_moe_kernels import FusedConvMoE, balance_loss
from robust_moe_kernels.modules import BALANCE_LOSSES, RoutingRecord
from robust_moe_kernels.modules.balance import (
    entropy_loss,
    importance_loss,
    kl_loss,
    load_loss,
    released_entropy_loss,
    switch_loss,
    z_loss,
)
from robust_moe_kernels.ops.gate import top_k_gate

LN4 = math.log(4.0)
FEW_ROUNDINGS = 64 * torch.finfo(torch.float64).eps  # sums of at most 16 numbers of magnitude at most 4


def record(logits: Tensor, top_k: int = 1, noise: Tensor | None = None, scale: Tensor | None = None) -> RoutingRecord:
    """The record of a forward with these logits, computed by the gate."""
    noisy = logits if noise is None else logits + scale * noise
    out = top_k_gate(noisy, top_k)
    shape = (len(logits),)
    return RoutingRecord(logits=noisy, clean_logits=logits, noise_scale=scale, shape=shape, **out._asdict())


UNIFORM = torch.zeros(4, 4, dtype=torch.float64)
BALANCED = 1000.0 * torch.eye(4, dtype=torch.float64)  # exp(-1000) is 0 in double precision: exactly one-hot scores
COLLAPSED = BALANCED[[2, 2, 2, 2]]
TABLE = {  # the table of the module's docstring and of the specification
    "entropy": (-LN4, -LN4, 0.0),
    "kl": (0.0, 0.0, LN4),
    "switch": (0.0, 0.0, 3.0),
    "entropy_released": (0.0, -LN4, 0.0),
    "importance": (0.0, 0.0, 3.0),
    "vmoe": (0.0, 0.0, 1.5),
}


@mark.parametrize("kind", TABLE)
def test_closed_forms(kind: str):
    got = [BALANCE_LOSSES[kind](record(logits)).item() for logits in (UNIFORM, BALANCED, COLLAPSED)]
    assert got == approx(TABLE[kind], abs=FEW_ROUNDINGS)


def test_the_table_names_every_loss_but_those_of_logits():
    assert BALANCE_LOSSES.keys() == TABLE.keys() | {"load", "z"}


def test_z_loss_in_closed_form():
    # logsumexp of E equal logits c is c + ln E.
    logits = torch.tensor([[1.0] * 4, [-3.0] * 4], dtype=torch.float64)
    wanted = ((1.0 + LN4) ** 2 + (-3.0 + LN4) ** 2) / 2
    assert BALANCE_LOSSES["z"](record(logits)).item() == approx(wanted, abs=FEW_ROUNDINGS)


def test_losses_equal_their_formulas_on_ordinary_scores():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64)
    routing = record(logits)
    s = logits.softmax(1)
    p, f = s.mean(0), torch.zeros(5, dtype=torch.float64)
    for b in range(6):
        f[s[b].argmax()] += 1 / 6
    entropy = -(p * p.log()).sum()
    importance = s.sum(0)
    wanted = {
        "entropy": -entropy,
        "kl": math.log(5) - entropy,
        "switch": 5 * (f * p).sum() - 1,
        "entropy_released": -(s * s.log()).sum(1).mean() - entropy,
        "importance": ((importance - importance.mean()) ** 2).mean() / importance.mean() ** 2,
        "z": logits.logsumexp(1).square().mean(),
    }
    for kind, value in wanted.items():
        assert BALANCE_LOSSES[kind](routing).item() == approx(value.item(), abs=FEW_ROUNDINGS), kind


def _mean_entropy(s: Tensor) -> Tensor:
    return -(s * s.log()).sum(1).mean()


SHARE = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
OF_LOGITS = {
    "entropy": lambda x: entropy_loss(x.softmax(1).mean(0)),
    "kl": lambda x: kl_loss(x.softmax(1).mean(0)),
    "switch": lambda x: switch_loss(x.softmax(1).mean(0), SHARE),
    "entropy_released": lambda x: released_entropy_loss(x.softmax(1).mean(0), _mean_entropy(x.softmax(1))),
    "importance": lambda x: importance_loss(x.softmax(1).mean(0)),
    "z": lambda x: z_loss(x.logsumexp(1).square().mean()),
}


@mark.parametrize("kind", OF_LOGITS)
def test_derivatives(kind: str):
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(OF_LOGITS[kind], logits)


@mark.parametrize("kind", [kind for kind in BALANCE_LOSSES if kind != "load"])
def test_derivatives_through_the_gate(kind: str):
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: BALANCE_LOSSES[kind](record(x, 2)), logits)


def test_the_share_of_samples_is_a_constant():
    scores = torch.rand(4, dtype=torch.float64, requires_grad=True)
    share = torch.rand(4, dtype=torch.float64, requires_grad=True)
    switch_loss(scores, share).backward()
    assert share.grad is None
    assert torch.equal(scores.grad, 4 * share.detach())


@mark.parametrize("kind", [kind for kind in BALANCE_LOSSES if kind != "load"])
def test_gradients_stay_finite_when_a_score_is_exactly_zero(kind: str):
    """A collapsed gate: exp(-200) is 0 in single precision, so P_i = 0, where the derivative of P ln P is infinite."""
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0]] * 2, requires_grad=True)
    routing = record(logits)
    assert routing.mean_scores.tolist() == [1.0, 0.0, 0.0, 0.0]
    BALANCE_LOSSES[kind](routing).backward()
    assert logits.grad.isfinite().all()


# --- load -------------------------------------------------------------------------------------------------------------


def noisy_case(top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(top_k)
    clean = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    scale = torch.tensor([[0.3], [1.0], [2.0]], dtype=torch.float64)
    return clean, clean + scale * torch.randn(3, 4, dtype=torch.float64, generator=generator), scale


@mark.parametrize("top_k", [1, 2, 3])
def test_load_agrees_with_sampling(top_k: int):
    """Draw an expert's own noise anew, keep the others', count how often it is among the k highest.

    With shares p over N draws an expert's load is off by at most d_i = 5 sqrt(sum_b p(1-p)/N) (five deviations). The
    coefficient of variation is |l - m|/(sqrt(E) m): by the triangle inequality its numerator changes by at most
    d = |d_i|/sqrt(E), its mean m by at most d as well, so the quotient by (1 + CV) d/(m - d).
    """
    draws = 50_000
    clean, noisy, scale = noisy_case(top_k)
    generator = torch.Generator().manual_seed(7)
    shares = torch.zeros_like(clean)
    for b in range(3):
        for i in range(4):
            trial = noisy[b].repeat(draws, 1)
            trial[:, i] = clean[b, i] + scale[b] * torch.randn(draws, dtype=torch.float64, generator=generator)
            shares[b, i] = (trial.topk(top_k, dim=1).indices == i).any(1).double().mean()
    load = shares.sum(0)
    variation = (load.std(correction=0) / load.mean()).item()
    d = 5 * ((shares * (1 - shares)).sum(0) / draws).sqrt().norm().item() / 2
    bound = (1 + variation) * d / (load.mean().item() - d)
    assert variation > 4 * bound, "the case must tell loads apart"
    assert math.sqrt(load_loss(clean, noisy, scale, top_k).item()) == approx(variation, abs=bound)


@mark.parametrize("top_k", [1, 2, 3])
def test_derivative_of_load(top_k: int):
    clean, noisy, scale = noisy_case(top_k)
    noise = noisy - clean
    assert gradcheck(lambda x: load_loss(x, x + noise, scale, top_k), clean.requires_grad_())


def test_load_of_all_experts_is_zero():
    clean, noisy, scale = noisy_case(1)
    clean.requires_grad_()
    loss = load_loss(clean, noisy, scale, top_k=4)
    loss.backward()
    assert loss.item() == 0.0
    assert not clean.grad.any()


def test_load_of_a_row_of_equal_logits_is_even_and_flat():
    """Noise comes in units of a row's spread: none here. The row must not contribute a division by zero."""
    clean = torch.zeros(2, 4, dtype=torch.float64)
    scale = torch.zeros(2, 1, dtype=torch.float64)
    clean[1], scale[1] = torch.tensor([1.0, 0.0, -1.0, -2.0]), 0.5
    clean.requires_grad_()
    load_loss(clean, clean * 1.0, scale, top_k=2).backward()
    assert not clean.grad[0].any()
    assert clean.grad[1].isfinite().all()
    assert clean.grad[1].any()
    assert load_loss(clean[:1], clean[:1], scale[:1], top_k=2).item() == 0.0


# --- over a model -----------------------------------------------------------------------------------------------------


def two_layers(noise_std: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1).double()
    return nn.Sequential(*(FusedConvMoE.from_conv(conv, 4, 2, init="fresh", noise_std=noise_std) for _ in range(2)))


@mark.parametrize("kind", BALANCE_LOSSES)
def test_a_model_s_loss_is_the_sum_over_its_layers(kind: str):
    model = two_layers(noise_std=0.5)
    model(torch.randn(6, 4, 5, 5, dtype=torch.float64))
    loss = balance_loss(model, kind)
    wanted = [BALANCE_LOSSES[kind](layer.routing) for layer in model]
    assert wanted[0].item() != wanted[1].item()
    assert loss.item() == approx(sum(wanted).item(), abs=FEW_ROUNDINGS)
    loss.backward()
    assert all(layer.gate.fc.weight.grad.any() for layer in model)


def test_entropy_is_the_default():
    model = two_layers()
    model(torch.randn(6, 4, 5, 5, dtype=torch.float64))
    assert torch.equal(balance_loss(model), balance_loss(model, "entropy"))


def test_a_loss_of_one_s_own():
    model = two_layers()
    model(torch.randn(6, 4, 5, 5, dtype=torch.float64))
    wanted = [layer.routing.mean_scores.square().sum() for layer in model]
    assert torch.equal(balance_loss(model, lambda routing: routing.mean_scores.square().sum()), wanted[0] + wanted[1])


@mark.parametrize("kind", TABLE)
def test_a_fixed_expert_counts_as_collapse(kind: str):
    model = two_layers()
    model[0].fixed_expert = model[1].fixed_expert = 3
    model(torch.randn(6, 4, 5, 5, dtype=torch.float64))
    assert balance_loss(model, kind).item() == approx(2 * TABLE[kind][2], abs=FEW_ROUNDINGS)


def test_a_model_without_layers_has_no_loss():
    assert balance_loss(nn.Linear(2, 2)).item() == 0.0


def test_errors_say_what_is_wrong():
    model = two_layers()
    with raises(ValueError, match=r"kind: expected one of entropy, kl, .*, got 'entrpy'; did you mean 'entropy'\?"):
        balance_loss(model, "entrpy")
    with raises(ValueError, match=r"kind: expected one of .*, got None$"):
        balance_loss(model, None)
    with raises(RuntimeError, match="model: expected a forward through '0' first"):
        balance_loss(model)
    model[0](torch.randn(2, 4, 5, 5, dtype=torch.float64))
    with raises(RuntimeError, match="through '1' first"):
        balance_loss(model)
    with raises(RuntimeError, match="through 'the layer' first"):
        balance_loss(model[1])
    with raises(ValueError, match=r"load balance loss needs score noise; expected noise_std > 0 and training mode"):
        balance_loss(model[0], "load")
