"""FusedMLPMoE: what it replaces and refuses, how its experts start, and inputs of every form."""

from __future__ import annotations

import re

import timm
import torch
import torch.nn.functional as F
import torchvision
from pytest import mark, raises
from timm.layers.mlp import ConvMlp, GatedMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from token_layers import BOUND, EXPERTS, HIDDEN, MLPS, WIDTH, token_layer, tokens
from torch import Tensor, nn

from robust_moe_kernels import FusedMLPMoE, balance_loss, moe_layers, replace_mlps
from robust_moe_kernels.modules import prune_experts


class Bare(nn.Module):
    """Two linear layers under names of their own; activation and dropout are functions."""

    def __init__(self, activation=F.silu, dropout: float = 0.0) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.activation, self.dropout = activation, dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.dropout(self.activation(self.wide(x)), self.dropout, self.training))


# --- what may be replaced ---------------------------------------------------------------------------------------------


@mark.parametrize("name", MLPS)
def test_copies_compute_what_the_mlp_did(name: str):
    torch.manual_seed(0)
    build, activation = MLPS[name]
    mlp = build().double().eval()
    moe = FusedMLPMoE.from_mlp(mlp, EXPERTS)
    assert moe.experts.form.activation == activation
    x = tokens(3, 5)
    torch.testing.assert_close(moe(x), mlp(x), rtol=BOUND, atol=BOUND)
    assert type(moe.expert(1)) is type(mlp)
    torch.testing.assert_close(moe.expert(1)(x), mlp(x), rtol=BOUND, atol=BOUND)
    assert {
        key.removeprefix("experts.3.") for key in moe.state_dict() if "experts.3." in key
    } == mlp.state_dict().keys()


def test_a_module_of_its_own_kind_is_read():
    torch.manual_seed(0)
    mlp = Bare().double().eval()
    moe = FusedMLPMoE.from_mlp(mlp, EXPERTS)
    assert (moe.experts.form.activation, moe.experts.form.same_in_training) == ("silu", True)
    torch.testing.assert_close(moe(tokens(9)), mlp(tokens(9)), rtol=BOUND, atol=BOUND)
    assert not FusedMLPMoE.from_mlp(Bare(dropout=0.3), 2).experts.form.same_in_training


OTHERS = {
    "no linear layers": (lambda: nn.Identity(), "Identity with 0 such layers (no children)"),
    "a linear layer": (lambda: nn.Linear(4, 4), "Linear with 1 such layers"),
    "four of them": (lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), "Sequential with 4 such layers"),
    "1x1 convolutions": (lambda: Mlp(4, 8, use_conv=True), "Mlp with 0 such layers (fc1: Conv2d, act: GELU"),
    "convolutions": (lambda: ConvMlp(4, 8), "ConvMlp with 0 such layers"),
    "another activation": (lambda: Mlp(4, 8, act_layer=nn.Hardswish), "Mlp (fc1: Linear, act: Hardswish,"),
    "one that is cut off": (lambda: Mlp(4, 8, act_layer=nn.ReLU6), "Mlp (fc1: Linear, act: ReLU6,"),
    "none": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "Sequential (0: Linear, 1: Linear) computes"),
    "a norm inside": (lambda: Mlp(4, 8, norm_layer=nn.LayerNorm), "norm: LayerNorm"),
    "response norm": (lambda: GlobalResponseNormMlp(4, 8), "GlobalResponseNormMlp"),
    "spatial gate": (lambda: GatedMlp(4, 8, gate_layer=Halving), "GatedMlp (fc1: Linear,"),
    "a skip inside": (lambda: WithSkip(), "WithSkip (mlp: Mlp) computes something else"),
    "two inputs": (lambda: nn.TransformerDecoderLayer(4, 1, 8), "TransformerDecoderLayer"),
    "fails": (lambda: Failing(), "Failing (mlp: Mlp) fails: of no use"),
    "sizes that do not meet": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 4)),
        "0: Linear, 1: Linear) fails: mat1",
    ),
}


class Halving(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., ::2]


class WithSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Failing(WithSkip):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("of no use")


@mark.parametrize("name", OTHERS)
def test_other_forms_are_refused_and_named(name: str):
    build, words = OTHERS[name]
    module = build()
    modes, state = [part.training for part in module.modules()], torch.get_rng_state()
    with raises(ValueError, match=rf"^mlp: expected .*{re.escape(words)}"):
        FusedMLPMoE.from_mlp(module)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_reading_an_mlp_changes_neither_it_nor_the_generators():
    mlp = Bare(dropout=0.5)
    mlp.wide.eval()
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    state = torch.get_rng_state()
    moe = FusedMLPMoE.from_mlp(mlp, 2)
    generator = torch.Generator()
    generator.set_state(state)
    bound = WIDTH**-0.5
    assert torch.equal(moe.gate.fc.weight, torch.empty(2, WIDTH).uniform_(-bound, bound, generator=generator))
    assert [part.training for part in mlp.modules()] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert not any(p.data_ptr() == q.data_ptr() for p in moe.parameters() for q in mlp.parameters())


@mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an integer E >= 1, got 0"),
        ({"num_experts": 2, "top_k": 3}, "top_k: expected 1 <= k <= num_experts = 2, got 3"),
        (
            {"gate": "gap_fc"},
            "noisy_top_k, adaptive_clustering or a module, got 'gap_fc'",
        ),
        ({"init": "zero"}, "init: expected one of copy, fresh, got 'zero'"),
        ({"capacity": 0.0}, "capacity: expected a finite number > 0, or None, got 0.0"),
        ({"impl": "fast"}, "impl: expected one of auto, reference, got 'fast'"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str):
    with raises(ValueError, match=re.escape(message)):
        FusedMLPMoE.from_mlp(Mlp(WIDTH, HIDDEN), **options)


# --- inputs -----------------------------------------------------------------------------------------------------------


@mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 3, 4), (1, 2, 1, 5)], ids=str)
@mark.parametrize("impl", ["auto", "reference"])
def test_any_number_of_dimensions_before_the_channels(shape: tuple[int, ...], impl: str):
    moe = token_layer(mlp="timm, other width out", impl=impl)
    x = torch.randn(*shape, WIDTH, dtype=torch.float64)
    out = moe(x)
    assert out.shape == (*shape, 7)
    record = moe.routing
    assert record.shape == shape
    torch.testing.assert_close(out.reshape(-1, 7), moe(x.reshape(-1, WIDTH)), rtol=BOUND, atol=BOUND)
    assert torch.equal(record.by_sample(record.weights), moe.routing.weights.reshape(*shape, 2))


@mark.parametrize("values", [torch.zeros(()), torch.zeros(5, 2)], ids=["a scalar", "other rows"])
def test_values_of_other_rows_are_refused(values: Tensor):
    moe = token_layer()
    moe(tokens(2, 3))
    with raises(ValueError, match=r"values: expected shape \[6, ...\], one for each row"):
        moe.routing.by_sample(values)


@mark.parametrize("shape", [(WIDTH + 1,), (2, 3), (), (2, WIDTH, 3)], ids=str)
def test_another_width_is_refused(shape: tuple[int, ...]):
    with raises(ValueError, match=re.escape(f"x: expected shape [..., {WIDTH}], got {list(shape)}")):
        token_layer()(torch.zeros(shape, dtype=torch.float64))


def test_another_dtype_is_refused():
    with raises(TypeError, match="x: expected dtype float64, got float32"):
        token_layer()(tokens(3).float())


@mark.parametrize("options", [{}, {"capacity": 1.0}, {"choice": "expert"}, {"impl": "reference"}], ids=str)
@mark.parametrize("shape", [(0,), (2, 0), (0, 3, 4)], ids=str)
@mark.parametrize("fixed", [None, 1])
def test_no_tokens(shape: tuple[int, ...], options: dict, fixed: int | None):
    moe = token_layer(mlp="timm, other width out", **options)
    moe.fixed_expert = fixed
    for mask in (None, torch.zeros(shape, dtype=torch.bool)):
        x = torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
        out = moe(x, mask)
        assert out.shape == (*shape, 7)
        out.sum().backward()
        assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())


def test_tokens_of_any_layout_give_the_same_values():
    moe, wide = token_layer(), tokens(6, 2 * WIDTH, 8)
    layouts = {
        "transposed": wide[..., :8, :].flatten(2)[:, :, :WIDTH].transpose(0, 1),
        "every other channel": wide.flatten(1)[:, : 2 * WIDTH : 2],
        "one token many times": wide[0, 0, :1].expand(4, WIDTH),
    }
    for name, x in layouts.items():
        assert not x.is_contiguous(), name
        x, dense = x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
        out, wanted = moe(x), moe(dense)
        assert torch.equal(out, wanted), name
        got, expected = (torch.autograd.grad(y.square().sum(), leaf)[0] for y, leaf in ((out, x), (wanted, dense)))
        assert torch.equal(got, expected), name


# --- models -----------------------------------------------------------------------------------------------------------

MODELS = {
    "timm ViT": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, num_classes=5),
        ["blocks.0.mlp", "blocks.1.mlp"],
        (2, 5),  # four patches and the class token
    ),
    "timm DeiT": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=5),
        ["blocks.0.mlp"],
        (2, 6),
    ),
    "timm Swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24, depths=(1, 1, 1, 1), num_classes=5
        ),
        ["layers.1.blocks.0.mlp"],
        (2, 16),
    ),
    "torchvision ViT": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=5),
        ["encoder.layers.encoder_layer_1.mlp"],
        (2, 5),
    ),
    "torchvision Swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5),
        ["features.3.0.mlp"],
        (2, 4, 4),
    ),
}


@mark.parametrize("name", MODELS)
def test_a_model_keeps_its_function(name: str):
    torch.manual_seed(0)
    build, names, shape = MODELS[name]
    model = build().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = model(x)
    assert replace_mlps(model, iter(names), num_experts=3) is model
    torch.testing.assert_close(model(x), wanted, rtol=BOUND, atol=BOUND)
    layers = moe_layers(model)
    assert list(layers) == names
    assert {layer.routing.shape for layer in layers.values()} == {shape}


def test_a_name_that_is_no_mlp_leaves_the_model_alone():
    model = nn.Sequential(Mlp(4, 8), nn.GELU())
    for names, words in (("2", "names: expected the name of a submodule, got '2'"), (["0", "1"], "GELU with 0 such")):
        with raises(ValueError, match=words):
            replace_mlps(model, names)
        assert type(model[0]) is Mlp
    with raises(ValueError, match=r"expected modules apart from each other, got '0\.fc1' inside '0'"):
        replace_mlps(model, ["0", "0.fc1"])


def test_experts_are_pruned():
    model = nn.Sequential(token_layer(2))
    x = tokens(40)
    out, record = model(x), model[0].routing
    small = prune_experts(model, [0, 2, 3])
    assert (small[0].num_experts, small[0].gate.fc.out_features) == (3, 3)
    stay = (record.indices != 1).all(1)
    assert 5 < stay.sum() < 40
    torch.testing.assert_close(small(x)[stay], out[stay], rtol=BOUND, atol=BOUND)
    assert small[0].gate.fc.weight.equal(model[0].gate.fc.weight[[0, 2, 3]])


# --- fresh experts ----------------------------------------------------------------------------------------------------


def spread(values: Tensor, deviation: float) -> bool:
    """Whether these are as many draws of this standard deviation: within five of its standard errors."""
    return abs(values.std() - deviation) < 5 * deviation / (2 * values.numel()) ** 0.5


def test_fresh_experts_are_drawn_as_the_libraries_draw_theirs():
    torch.manual_seed(0)
    wide, hidden = 48, 96
    of_timm = FusedMLPMoE.from_mlp(Mlp(wide, hidden), 2, init="fresh")
    of_torchvision = FusedMLPMoE.from_mlp(torchvision.ops.MLP(wide, [hidden, wide]), 2, init="fresh")
    for expert in of_timm.experts:
        assert all(spread(linear.weight, 0.02) and not linear.bias.any() for linear in (expert.fc1, expert.fc2))
    for expert in of_torchvision.experts:
        for linear in (expert[0], expert[3]):
            limit = (6 / (wide + hidden)) ** 0.5  # Xavier uniform
            assert linear.weight.abs().max() <= limit
            assert spread(linear.weight, limit / 3**0.5)
            assert spread(linear.bias, 1e-6)
    for moe in (of_timm, of_torchvision):
        first, second = (torch.cat([p.flatten() for p in expert.parameters()]) for expert in moe.experts)
        assert (first - second).std() > 0.02  # sqrt(2) deviations, were they drawn alike


def test_fresh_gates_of_timm_start_open():
    """timm's own init_weights: the gated half has weights near zero and a bias of one."""
    glu = FusedMLPMoE.from_mlp(GluMlp(WIDTH, HIDDEN), 2, init="fresh").experts[1]
    assert torch.equal(glu.fc1.bias, torch.tensor([0.0] * (HIDDEN // 2) + [1.0] * (HIDDEN // 2)))
    assert glu.fc1.weight[HIDDEN // 2 :].abs().max() < 1e-5
    swiglu = FusedMLPMoE.from_mlp(SwiGLU(WIDTH, HIDDEN), 2, init="fresh").experts[1]
    assert (swiglu.fc1_g.bias == 1).all()
    assert spread(swiglu.fc1_x.weight, 0.02)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_layer_learns():
    torch.manual_seed(0)
    moe = FusedMLPMoE.from_mlp(Mlp(WIDTH, HIDDEN), 4, gate="noisy_top_k")
    x, wanted = tokens(4, 16).float(), tokens(4, 16).float().sin()
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (moe(x) - wanted).square().mean()
        (loss + 0.01 * balance_loss(moe, "vmoe")).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
