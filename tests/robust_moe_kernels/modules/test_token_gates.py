"""Gates of tokens: V-MoE's noise and losses, and that a token's result is that token's alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import any_blocks
import torch
from pytest import approx, mark, raises
from timm.layers.mlp import Mlp
from token_layers import BOUND, EXPERTS, HIDDEN, WIDTH, token_layer, tokens
from torch import nn

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE, FusedMLPMoE, balance_loss
from robust_moe_kernels.modules import LinearGate, NoisyTopKGate
from robust_moe_kernels.modules.balance import vmoe_load_loss
from robust_moe_kernels.ops.expert_mlp import EXPERT_MLP

# --- V-MoE ------------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_paper():
    """Softmax of W x + N(0, 1/E^2) in training, its k largest as they are; none in evaluation."""
    moe, x = token_layer(gate="noisy_top_k"), tokens(50)
    assert type(moe.gate) is NoisyTopKGate
    torch.manual_seed(5)
    moe(x)
    record = moe.routing
    torch.manual_seed(5)
    clean = x @ moe.gate.fc.weight.T
    noise = torch.randn(50, EXPERTS, dtype=torch.float64) / EXPERTS
    torch.testing.assert_close(record.clean_logits, clean, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(record.logits, clean + noise, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(record.weights, (clean + noise).softmax(1).topk(2).values, rtol=BOUND, atol=BOUND)
    assert torch.equal(record.noise_scale, torch.full((50, 1), 1 / EXPERTS, dtype=torch.float64))
    moe.eval()(x)
    assert moe.routing.noise_scale is None
    assert torch.equal(moe.routing.logits, moe.routing.clean_logits)


def test_one_score_is_kept_as_it_is():
    moe = token_layer(1, gate="noisy_top_k").eval()
    moe(tokens())
    assert torch.equal(moe.routing.weights[:, 0], moe.routing.scores.amax(1))


def plain_vmoe_loss(moe: FusedMLPMoE) -> float:
    """Appendix A of 2106.05974, an expert and a token at a time."""
    clean, noisy = moe.routing.clean_logits, moe.routing.logits
    normal = torch.distributions.Normal(0.0, 1.0 / EXPERTS)
    importance, load = [0.0] * EXPERTS, [0.0] * EXPERTS
    for token in range(len(clean)):
        threshold = noisy[token].sort(descending=True).values[moe.top_k - 1]
        for expert in range(EXPERTS):
            importance[expert] += clean[token].softmax(0)[expert].item()
            load[expert] += 1 - normal.cdf(threshold - clean[token, expert]).item()

    def variation(values: list[float]) -> float:
        mean = sum(values) / EXPERTS
        return sum((value - mean) ** 2 for value in values) / EXPERTS / mean**2

    return 0.5 * variation(importance) + 0.5 * variation(load)


@mark.parametrize("top_k", [1, 2, EXPERTS])
def test_losses_are_those_of_the_paper(top_k: int):
    moe = token_layer(top_k, gate="noisy_top_k")
    moe(tokens(9))
    loss = balance_loss(moe, "vmoe")
    assert loss.item() == approx(plain_vmoe_loss(moe), rel=1e-12)
    loss.backward()
    assert moe.gate.fc.weight.grad.any()


def test_the_load_is_that_of_the_released_code():
    """The numbers of its own test (vmoe/nn/routing_test.py)."""
    clean = torch.tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]], dtype=torch.float64)
    noise = torch.tensor(
        [[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]], dtype=torch.float64
    )
    scale = torch.full((3, 1), 0.1, dtype=torch.float64)
    assert vmoe_load_loss(clean, clean + noise, scale, 2).item() == approx(0.48573864536489236, abs=1e-6)


@mark.parametrize("kind", ["importance", "load", "vmoe", "entropy", "switch"])
def test_losses_leave_padding_out(kind: str):
    moe, x = token_layer(gate="noisy_top_k", noise_std=0.5), tokens(12)
    padding = torch.arange(12) % 3 == 0
    torch.manual_seed(5)
    moe(x, padding)
    found = balance_loss(moe, kind)
    record = moe.routing
    rows = {name: getattr(record, name)[~padding] for name in ("scores", "logits", "clean_logits", "noise_scale")}
    (gradient,) = torch.autograd.grad(found, moe.gate.fc.weight)
    assert gradient.any()
    twin = copy.deepcopy(moe)  # the record of the others alone
    twin(x[~padding])
    scores = rows["scores"]
    first = torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)
    means = {"mean_scores": scores.mean(0), "argmax_fraction": first.mean(0)}
    twin.routing = replace(twin.routing, **rows, **means, indices=record.indices[~padding])
    assert balance_loss(twin, kind).item() == approx(found.item(), rel=1e-9)


# --- a token alone ----------------------------------------------------------------------------------------------------

NATIVE = EXPERT_MLP.why_not("native", "cpu")


@mark.skipif(NATIVE is not None, reason=f"{NATIVE}: a library sums one row in another order than many")
@mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@mark.parametrize("top_k", [1, 2])
def test_a_token_alone_gives_the_bits_that_it_gives_in_a_batch(top_k: int, dtype: torch.dtype):
    torch.manual_seed(0)
    moe = FusedMLPMoE.from_mlp(Mlp(40, 72), EXPERTS, top_k, init="fresh").to(dtype).eval()
    assert moe.batch_independent
    x = torch.randn(67, 40).to(dtype)
    with torch.no_grad():
        whole = moe(x)
        for token in (0, 1, 33, 66):
            assert torch.equal(moe(x[token]), whole[token])
        assert torch.equal(moe(x[11:40]), whole[11:40])
        assert torch.equal(moe(x.flip(0)), whole.flip(0))


@mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_logits_of_a_token_alone_have_the_bits_that_they_have_in_a_batch(dtype: torch.dtype):
    torch.manual_seed(0)
    gate, x = LinearGate(40, 7).to(dtype), torch.randn(67, 40).to(dtype)
    whole = gate(x)
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    for token in (0, 33, 66):
        assert torch.equal(gate(x[token : token + 1]), whole[token : token + 1])


@mark.parametrize(
    ("options", "training", "evaluation"),
    [
        ({}, True, True),
        ({"gate": "noisy_top_k"}, False, True),
        ({"noise_std": 0.1}, False, True),
        ({"capacity": 2.0}, False, False),
        ({"choice": "expert"}, False, False),
    ],
    ids=str,
)
def test_whether_a_token_depends_on_its_batch(options: dict, training: bool, evaluation: bool):
    moe = token_layer(**options)
    assert moe.train().batch_independent == training
    assert moe.eval().batch_independent == evaluation


def test_dropout_and_batch_norms_mix_rows_in_training():
    from torchvision.models.resnet import BasicBlock

    for moe in (
        FusedMLPMoE.from_mlp(Mlp(WIDTH, HIDDEN, drop=0.1)),
        FusedBlockMoE.from_block(BasicBlock(4, 4)),
        FusedBlockMoE.from_block(any_blocks.drop_path(0.1)),
    ):
        assert not moe.train().batch_independent
        assert moe.eval().batch_independent
    assert FusedConvMoE.from_conv(nn.Conv2d(3, 4, 3)).train().batch_independent


def test_layers_of_maps_have_no_buffers():
    moe = FusedConvMoE.from_conv(nn.Conv2d(3, 4, 3))
    for name, value in (("capacity", 1.0), ("choice", "expert")):
        with raises(ValueError, match="capacity: expected None, with choice 'token', for FusedConvMoE"):
            setattr(moe, name, value)
    assert not moe.route_options.limits
    moe(torch.randn(5, 3, 4, 4))
    assert moe.routing.shape == (5,)
    assert moe.routing.dropped is None
    assert moe.routing.dropped_count() == 0
