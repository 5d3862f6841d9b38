"""What a layer decides: its routing record, score noise, checks of the gate, refused arguments."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import torch
from pytest import mark, raises, warns
from torch import Tensor, nn

from robust_moe.models.resnet import BasicBlock
from robust_moe_kernels import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules import GATES, DropTop, RouteOptions, TwoConvGate, attack_mode, check_finite
from robust_moe_kernels.modules.gates import score_noise_scale

EPS = torch.finfo(torch.float64).eps
CLOSE = {"rtol": 64 * EPS, "atol": 64 * EPS}  # softmax and means over at most 8 numbers: some 30 roundings


class TableGate(nn.Module):
    """A gate with its logits as a parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def conv_layer(num_experts: int = 4, top_k: int = 2, **options) -> FusedConvMoE:
    torch.manual_seed(0)
    return FusedConvMoE.from_conv(nn.Conv2d(4, 4, 3, padding=1).double(), num_experts, top_k, init="fresh", **options)


def images(batch: int = 6, side: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, side, side, dtype=torch.float64, generator=generator)


# --- options ----------------------------------------------------------------------------------------------------------


def test_attributes_read_and_replace_the_options():
    moe = conv_layer(4, 2, noise_std=0.5)
    before = moe.route_options
    assert before == RouteOptions(top_k=2, renormalize=True, straight_through=True, noise_std=0.5)
    for name, value in {"top_k": 3, "renormalize": False, "fixed_expert": 1, "reroute": DropTop()}.items():
        setattr(moe, name, value)
        assert getattr(moe, name) == getattr(moe.route_options, name) == value
    changed = RouteOptions(3, renormalize=False, noise_std=0.5, fixed_expert=1, reroute=DropTop())
    assert moe.route_options == changed
    assert hash(moe.route_options) == hash(changed)
    assert before.top_k == 2  # whoever holds it holds what was
    with raises(dataclasses.FrozenInstanceError):
        moe.route_options.top_k = 1


@mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", 5, "top_k: expected 1 <= k <= num_experts = 4, got 5"),
        ("top_k", 2.0, "top_k: expected an integer, got 2.0"),
        ("noise_std", -1.0, "noise_std: expected a number >= 0, got -1.0"),
        ("noise", "scores", "noise: expected one of logits, released, vmoe, got 'scores'"),
        ("fixed_expert", 4, "fixed_expert: expected an expert in 0..3, got 4"),
    ],
)
def test_an_option_out_of_range_changes_nothing(name, value, message):
    moe = conv_layer(4, 2)
    before = moe.route_options
    with raises(ValueError, match=re.escape(message)):
        setattr(moe, name, value)
    assert moe.route_options is before


@dataclasses.dataclass(frozen=True)
class Tempered(RouteOptions):
    temperature: float = 1.0


def test_an_option_of_a_subclass_is_printed_and_survives_other_changes():
    moe = conv_layer(4, 2)
    moe.route_options = Tempered(top_k=2, temperature=0.5)
    moe.top_k = 1
    assert moe.route_options == Tempered(top_k=1, temperature=0.5) != Tempered(top_k=1)
    assert moe.route_options != RouteOptions(top_k=1)
    assert moe.extra_repr().startswith("num_experts=4, top_k=1, renormalize=True, straight_through=True, noise_std=0.0")
    assert "temperature=0.5" in moe.extra_repr()


# --- the record -------------------------------------------------------------------------------------------------------


@mark.parametrize("top_k", [1, 2, 5])
def test_the_record_holds_what_the_forward_decided(top_k: int):
    moe = conv_layer(5, top_k)
    assert moe.routing is None
    moe(images())
    r = moe.routing
    logits = images().mean((2, 3)) @ moe.gate.fc.weight.T + moe.gate.fc.bias
    scores = logits.softmax(1)
    kept, indices = scores.topk(top_k, dim=1)
    torch.testing.assert_close(r.logits, logits, **CLOSE)
    torch.testing.assert_close(r.scores, scores, **CLOSE)
    assert torch.equal(r.indices, indices)
    weights = torch.ones_like(kept) if top_k == 1 else kept / kept.sum(1, keepdim=True)
    torch.testing.assert_close(r.weights, weights, **CLOSE)
    torch.testing.assert_close(r.mean_scores, scores.mean(0), **CLOSE)
    torch.testing.assert_close(r.argmax_fraction, indices[:, 0].bincount(minlength=5).double() / 6, **CLOSE)
    torch.testing.assert_close(r.mean_entropy, -(scores * scores.log()).sum(1).mean(), **CLOSE)
    torch.testing.assert_close(r.mean_square_lse, logits.logsumexp(1).square().mean(), **CLOSE)
    assert r.clean_logits is r.logits
    assert r.noise_scale is None
    assert r.nonfinite.item() == 0
    with raises(dataclasses.FrozenInstanceError):
        r.scores = scores


def test_the_record_is_on_the_graph_of_its_forward_and_the_next_one_replaces_it():
    moe = conv_layer()
    moe(images())
    first = moe.routing
    first.scores[:, 0].sum().backward()
    assert moe.gate.fc.weight.grad.any()
    moe(images(2))
    assert moe.routing is not first
    assert moe.routing.scores.shape == (2, 4)
    with torch.no_grad():
        moe(images())
    assert not moe.routing.scores.requires_grad


def test_single_precision_statistics_of_low_precision_gates():
    """bfloat16 parameters: logits are bfloat16, what is computed from them is not."""
    moe = conv_layer().bfloat16()
    moe(images().bfloat16())
    r = moe.routing
    assert r.logits.dtype == torch.bfloat16
    for name in ("scores", "weights", "mean_scores", "argmax_fraction", "mean_entropy", "mean_square_lse"):
        assert getattr(r, name).dtype == torch.float32, name
    assert torch.equal(r.indices, r.logits.float().sort(dim=1, descending=True, stable=True).indices[:, :2])


# --- score noise ------------------------------------------------------------------------------------------------------


def test_noise_comes_in_training_only():
    moe = conv_layer(noise_std=0.5)
    moe.eval()
    moe(images())
    quiet = moe.routing
    assert quiet.noise_scale is None
    assert torch.equal(quiet.logits, quiet.clean_logits)
    moe.train()
    state = torch.get_rng_state()
    moe(images())
    assert moe.routing.noise_scale is not None
    assert not torch.equal(moe.routing.logits, moe.routing.clean_logits)
    assert torch.equal(moe.routing.clean_logits, quiet.logits)
    assert not torch.equal(torch.get_rng_state(), state)
    moe.noise_std = 0.0
    state = torch.get_rng_state()
    moe(images())
    assert moe.routing.noise_scale is None
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_torch_s_normal_noise_in_units_of_each_row_s_spread():
    moe = conv_layer(noise_std=0.25)
    torch.manual_seed(5)
    moe(images())
    r = moe.routing
    centred = r.clean_logits - r.clean_logits.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()  # population deviation, as standardisation divides by
    torch.testing.assert_close(r.noise_scale, 0.25 * spread, **CLOSE)
    assert not r.noise_scale.requires_grad
    torch.manual_seed(5)
    noise = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(r.logits, r.clean_logits + r.noise_scale * noise, **CLOSE)
    assert torch.equal(r.scores.argmax(1), r.logits.argmax(1))  # scores and routes are of the noisy logits
    assert torch.equal(r.indices, r.logits.topk(2, dim=1).indices)


def test_the_same_seed_gives_the_same_noise():
    moe = conv_layer(noise_std=1.0)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(moe(images()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_routes_do_not_depend_on_a_row_s_scale_or_shift():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64)
    indices = []
    for scaled in (logits, 8.0 * logits + 2.0):
        moe = conv_layer(gate=TableGate(scaled), noise_std=1.0)
        torch.manual_seed(9)
        moe(images())
        indices.append(moe.routing.indices)
    assert torch.equal(*indices)
    assert not torch.equal(indices[0], logits.topk(2, dim=1).indices), "the noise must have changed a route"


def test_a_row_without_spread_gets_no_noise():
    logits = torch.tensor([[2.0] * 4, [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    scale = score_noise_scale(logits, 1.0)
    assert scale.tolist() == [[0.0], [math.sqrt(1.25)]]


def test_noise_has_the_deviation_asked_for():
    torch.manual_seed(0)
    moe = conv_layer(8, gate=TableGate(torch.randn(512, 8, dtype=torch.float64)), noise_std=0.1)
    moe(images(512, 1))
    noise = (moe.routing.logits - moe.routing.clean_logits) / (moe.routing.noise_scale / 0.1)
    n = noise.numel()  # mean within 5 std/sqrt(n), deviation within 5 std/sqrt(2n)
    assert noise.mean().abs() < 5 * 0.1 / math.sqrt(n)
    assert abs(noise.std() - 0.1) < 5 * 0.1 / math.sqrt(2 * n)


@mark.parametrize(
    ("top_k", "straight_through", "renormalize"),
    [(1, True, True), (1, False, False), (2, True, True), (2, True, False)],
)
def test_released_noise_chooses_experts_and_changes_nothing_else(top_k, straight_through, renormalize):
    """Chosen by softmax / its deviation in the whole batch + N(0, 0.7); the weights are of the plain softmax."""
    torch.manual_seed(2)
    gate = TableGate(torch.randn(64, 4, dtype=torch.float64))
    options = {"straight_through": straight_through, "renormalize": renormalize, "noise_std": 0.7}
    moe, x = conv_layer(4, top_k, gate=gate, **options), images(64)
    moe.noise = "released"
    torch.manual_seed(5)
    y = moe(x)
    r = moe.routing

    scores = gate.logits.softmax(1)
    torch.manual_seed(5)
    noisy = scores / scores.std() + 0.7 * torch.randn(64, 4, dtype=torch.float64)
    indices = noisy.topk(top_k, dim=1).indices
    assert torch.equal(r.indices, indices)
    assert not torch.equal(indices, scores.topk(top_k, dim=1).indices), "the noise must have changed a route"
    kept = scores.gather(1, indices)
    weights = kept / kept.sum(1, keepdim=True) if renormalize else kept
    if top_k == 1 and straight_through:
        weights = 1 + kept - kept.detach()
    torch.testing.assert_close(r.weights, weights, **CLOSE)
    assert r.logits is r.clean_logits
    assert r.noise_scale is None
    torch.testing.assert_close(r.scores, scores, **CLOSE)
    fraction = scores.argmax(1).bincount(minlength=4).double() / 64  # of the balance losses: without noise
    torch.testing.assert_close(r.argmax_fraction, fraction, **CLOSE)

    outputs = torch.stack([moe.expert(e)(x) for e in range(4)], 1)
    mixed = (weights[..., None, None, None] * outputs[torch.arange(64)[:, None], indices]).sum(1)
    torch.testing.assert_close(y, mixed, rtol=1e-10, atol=1e-12)
    (got,) = torch.autograd.grad(y.square().sum(), gate.logits)
    (wanted,) = torch.autograd.grad(mixed.square().sum(), gate.logits)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


def test_released_noise_is_drawn_in_training_alone_and_anew_from_the_seed():
    moe = conv_layer(8, gate=TableGate(torch.randn(64, 8, dtype=torch.float64)), noise_std=1.0)
    moe.noise = "released"
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        moe(images(64))
        found.append(moe.routing.indices)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    state = torch.get_rng_state()
    moe.eval()(images(64))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(moe.routing.indices, moe.gate.logits.topk(2, dim=1).indices)


def test_equal_scores_get_no_released_noise():
    moe = conv_layer(gate=TableGate(torch.zeros(6, 4, dtype=torch.float64)), noise_std=1.0)
    moe.noise = "released"
    moe(images())
    assert moe.routing.indices.tolist() == [[0, 1]] * 6


def test_a_reroute_replaces_what_released_noise_chose():
    moe = conv_layer(noise_std=1.0)
    moe.noise, moe.reroute = "released", DropTop()
    moe(images())
    assert torch.equal(moe.routing.indices, moe.routing.logits.topk(3, dim=1).indices[:, 1:])


# --- checks -----------------------------------------------------------------------------------------------------------


def test_check_finite_names_the_layers():
    model = nn.Sequential(conv_layer(), nn.ReLU(), conv_layer(), conv_layer())
    with raises(RuntimeError, match="expected a forward through '0' first"):
        check_finite(model)
    model(images())
    check_finite(model)
    for name, rows in (("2", 3), ("3", 1)):  # as a GPU reports them, where nothing raises at once
        layer = model.get_submodule(name)
        layer.routing = dataclasses.replace(layer.routing, nonfinite=torch.tensor(rows, dtype=torch.int32))
    with raises(FloatingPointError, match=re.escape("got NaN or infinity in 2 (3 rows), 3 (1 rows)")):
        check_finite(model)
    check_finite(nn.Linear(2, 2))


@mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_raise_at_once_on_the_cpu(value: float):
    moe = conv_layer()
    moe(images())
    before = moe.routing
    with torch.no_grad():
        moe.gate.fc.bias[1] = value
    with raises(ValueError, match=r"logits: expected finite gate scores, got NaN or infinity in 6 row\(s\)"):
        moe(images())
    assert moe.routing is before


def test_a_constant_weight_leaves_the_gate_without_gradient():
    with warns(UserWarning, match="the gate gets no gradient from the task"):
        stuck = conv_layer(4, 1, straight_through=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.ModuleDict(
            {
                "straight": conv_layer(4, 1),
                "score": conv_layer(4, 1, straight_through=False, renormalize=False),
                "two": conv_layer(4, 2, straight_through=False),
                "single": conv_layer(1, 1, straight_through=False),  # nothing to learn
                "fixed": conv_layer(4, 2),
                "frozen": conv_layer(4, 2),
            }
        )
    model["stuck"] = stuck
    model["fixed"].fixed_expert = 0
    model["frozen"].gate.requires_grad_(False)
    for layer in model.values():
        layer(images()).square().sum().backward()
    gradients = {name: layer.gate.fc.weight.grad for name, layer in model.items()}
    learning = {name for name, gradient in gradients.items() if gradient is not None and bool(gradient.any())}
    assert learning == {"straight", "score", "two"}
    assert gradients["stuck"] is not None


# --- arguments --------------------------------------------------------------------------------------------------------


@mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0, "top_k": 1}, "num_experts: expected an integer E >= 1, got 0"),
        ({"num_experts": -2}, "num_experts: expected an integer E >= 1, got -2"),
        ({"num_experts": 3, "top_k": 4}, "top_k: expected 1 <= k <= num_experts = 3, got 4"),
        ({"top_k": 0}, "top_k: expected 1 <= k <= num_experts = 4, got 0"),
        ({"noise_std": -0.1}, "noise_std: expected a number >= 0, got -0.1"),
        ({"noise_std": math.nan}, "noise_std: expected a number >= 0, got nan"),
        ({"gate": "fc"}, "gate: expected one of gap_fc, conv_gap, two_conv, fixed or a module, got 'fc'"),
        ({"init": "zero"}, "init: expected one of copy, fresh, got 'zero'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_refused(options: dict, message: str):
    with raises(ValueError, match=f"^{re.escape(message)}$"):
        FusedBlockMoE.from_block(BasicBlock(4, 4), **options)
    with raises(ValueError, match=f"^{re.escape(message)}$"):
        FusedConvMoE.from_conv(nn.Conv2d(4, 4, 1), **options)


@mark.parametrize("shape", [(2, 3, 5, 5), (4, 5, 5), (2, 4, 5), (2, 4, 5, 5, 5)], ids=str)
@mark.parametrize("fixed", [None, 0])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...], fixed: int | None):
    moe = conv_layer()
    moe.fixed_expert = fixed
    with raises(ValueError, match=re.escape(f"x: expected shape [B, 4, H, W] with H, W >= 1, got {list(shape)}")):
        moe(torch.zeros(shape, dtype=torch.float64))
    assert moe.routing is None


def test_a_gate_of_another_shape_is_refused():
    moe = conv_layer(gate=TableGate(torch.zeros(6, 3, dtype=torch.float64)))
    with raises(ValueError, match=re.escape("gate(x): expected logits of shape [6, 4], got [6, 3]")):
        moe(images())


def test_maps_too_small_for_the_convolution_of_a_gate_are_refused():
    moe = conv_layer(gate="conv_gap")
    assert moe(images(2, 3)).shape == (2, 4, 3, 3)
    with raises(ValueError, match=re.escape("x: expected maps of at least 3x3 for the conv_gap gate, got [2, 2]")):
        moe(images(2, 2))


@mark.parametrize("name", [name for name in GATES if name != "fixed"])
def test_every_gate_learns_and_turns_maps_into_logits(name: str):
    moe = conv_layer(5, gate=name)
    moe(images()).square().sum().backward()
    assert moe.routing.logits.shape == (6, 5)
    assert all(p.grad.any() for p in moe.gate.parameters())
    logits = moe.eval().gate(images())
    with attack_mode(moe):
        torch.testing.assert_close(moe.gate(images()), logits, **CLOSE)  # also where a norm is folded


def test_the_fixed_gate_routes_and_does_not_learn():
    moe = conv_layer(5, gate="fixed", top_k=1, straight_through=False)  # no warning: there is nothing to train
    x = images()
    moe(x).square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in moe.gate.parameters())
    weight = moe.state_dict()["gate.fc.weight"]
    torch.testing.assert_close(moe.routing.logits, x.mean((2, 3)) @ weight.T)
    assert moe.routing.indices.unique().numel() > 1


def test_the_gate_of_two_convolutions_is_them_and_a_norm():
    gate = TwoConvGate(3, 5, hidden=2).double().eval()
    x = torch.randn(4, 3, 1, 1, dtype=torch.float64)  # of a 3x3 filter the middle is left
    hidden = (x[:, :, 0, 0] @ gate.conv1.weight[:, :, 1, 1].T / (1 + gate.bn1.eps) ** 0.5).relu()
    torch.testing.assert_close(gate(x), hidden @ gate.conv2.weight[:, :, 1, 1].T + gate.conv2.bias)
    assert [p.shape[0] for p in gate.parameters()] == [2, 2, 2, 5, 5]


def test_a_gate_of_one_s_own():
    gate = TableGate(torch.tensor([[0.0, 3.0, 1.0]] * 6))
    moe = conv_layer(3, gate=gate)
    assert moe.gate is gate
    assert gate.logits.dtype == torch.float64  # taken over from the convolution
    moe(images())
    assert moe.routing.indices.tolist() == [[1, 2]] * 6


def test_a_function_makes_the_gate():
    """For the channels and experts of each layer, so that one function serves several."""
    made = []

    def make(in_channels: int, num_experts: int) -> nn.Module:
        made.append((in_channels, num_experts))
        return GATES["conv_gap"](in_channels, num_experts)

    moe = conv_layer(5, gate=make)
    assert made == [(moe.experts.in_channels, 5)]
    assert isinstance(moe.gate, GATES["conv_gap"])
    with raises(ValueError, match="gate: expected one of gap_fc, conv_gap, two_conv, fixed or a module, got None"):
        conv_layer(gate=None)


@mark.parametrize(
    "conv",
    [nn.Linear(4, 4), nn.ConvTranspose2d(4, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))],
    ids=lambda conv: type(conv).__name__,
)
def test_only_plain_convolutions_become_convolution_experts(conv: nn.Module):
    with raises(ValueError, match=r"conv: expected a plain torch\.nn\.Conv2d, got"):
        FusedConvMoE.from_conv(conv)


def test_convolutions_with_another_forward_or_padding_are_refused():
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    with raises(ValueError, match=r"conv: expected a plain torch\.nn\.Conv2d, got Standardized"):
        FusedConvMoE.from_conv(Standardized(4, 4, 1))
    with raises(ValueError, match="conv: expected padding_mode 'zeros', got 'reflect'"):
        FusedConvMoE.from_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
