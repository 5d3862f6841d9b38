"""Blocks that the grouped engine does not compute, as experts: their function, rows and norms, and what they share.

Outputs, gradients and statistics beside a plain loop: ``test_oracle``; states and copies: ``test_state``; what they
compute in plain PyTorch, derivatives of gradients: ``test_general_path``; what is refused: ``test_model``.
"""

from __future__ import annotations

import copy
import pickle

import timm
import torch
from any_blocks import BLOCKS, channels_of, drop_path, scrambled
from pytest import mark, raises
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from benchmarks.timm_blocks import draw_norms, replaced
from robust_moe_kernels import FusedBlockMoE, balance_loss, moe_layers, replace_blocks
from robust_moe_kernels.modules import attack_mode, norm_folding
from robust_moe_kernels.modules.block_experts import BlockExperts
from robust_moe_kernels.modules.block_probe import BlockForm, block_form
from robust_moe_kernels.modules.expert_norms import copies

pytestmark = [
    mark.usefixtures("one_thread"),
    mark.filterwarnings("ignore:.* is no block that the grouped engine computes"),
]
EPS = torch.finfo(torch.float64).eps


class ChosenRoutes(nn.Module):
    """A gate with a parameter instead of a network: sample b goes to expert ``experts[b]``."""

    def __init__(self, experts: list[int], num_experts: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.eye(num_experts, dtype=torch.float64)[experts])

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def images(count: int = 5, channels: int = 8, side: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)


def routed(block: nn.Module, experts: int = 3, top_k: int = 1, **options) -> FusedBlockMoE:
    return FusedBlockMoE.from_block(block.double(), experts, top_k, **options)


# --- the block's function ---------------------------------------------------------------------------------------------


@mark.parametrize("top_k", [1, 2])
@mark.parametrize("name", BLOCKS)
def test_copies_compute_what_the_block_did(name: str, top_k: int):
    """Another batch may make a library sum in another order: chains of at most three convolutions of 9 * 32 terms and
    a mean of 36, each addition off by eps of the largest magnitude; a wrong expert or weight is off by percents."""
    torch.manual_seed(0)
    block = scrambled(BLOCKS[name]().double()).eval()
    moe = routed(block, 3, top_k)
    assert isinstance(moe.experts, BlockExperts)
    x = images(6, channels_of(name))
    wanted = block(x.clone())
    before = x.clone()
    got = moe(x)
    assert (got - wanted).abs().max() <= 3 * (9 * 32 + 36) * EPS * wanted.abs().max()
    assert torch.equal(x, before)  # also where a block writes into its input: the gate's gradient reads it


NETWORKS = {
    "seresnet18": {"layers": (1, 1, 1, 2), "channels": (8, 8, 8, 16)},
    "ecaresnet26t": {"layers": (1, 1, 1, 2), "channels": (8, 8, 8, 16)},
    "res2net50d": {"layers": (1, 1, 1, 2), "base_width": 4},
    "resnest26d": {"layers": (1, 1, 1, 2), "base_width": 16},
    "skresnet18": {"layers": (1, 1, 1, 2), "channels": (32, 32, 32, 32)},
    "resnet50_gn": {"layers": (1, 1, 1, 2), "channels": (32, 32, 32, 32)},
    "resnet18": {"layers": (1, 1, 1, 2), "channels": (8, 8, 8, 16), "drop_path_rate": 0.2},
    "resnetv2_50": {"layers": (1, 1, 1, 2), "channels": (32, 32, 32, 64)},
    "convnext_atto": {"depths": (1, 1, 1, 2), "dims": (8, 8, 8, 16), "ls_init_value": 0.5},
}
BLOCK_OF = {"resnetv2_50": "stages.3.blocks.1", "convnext_atto": "stages.3.blocks.1"}


@mark.parametrize("name", NETWORKS)
def test_a_network_of_timm_keeps_its_function(name: str):
    """As ``python -m benchmarks timm_blocks`` looks at whole ones, which says what the bound is."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **NETWORKS[name]).eval()
    draw_norms(model)
    x = torch.randn(3, 3, 64, 64)
    layer = BLOCK_OF.get(name, "layer4.1")
    found = replaced(model, layer, x)
    assert found["how"] == "one by one", found
    assert "is no block that the grouped engine computes" in found["reason"]
    replace_blocks(model, layer, num_experts=3)
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.get_submodule(layer).parameters())


def test_the_census_notices_another_function(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(scrambled(BLOCKS["squeeze and excitation"]())).eval()
    one = BlockExperts.one
    monkeypatch.setattr(BlockExperts, "one", lambda self, expert, x: one(self, expert, x) * (1 + 1e-3))
    assert replaced(model, "0", torch.randn(2, 8, 6, 6))["how"] == "another function"


@mark.parametrize("name", BLOCKS)
def test_a_copy_tells_the_form_and_nothing_is_left_of_it(name: str):
    block = BLOCKS[name]()
    state = {key: value.clone() for key, value in block.state_dict().items()}
    random = torch.get_rng_state()
    assert block_form(block) == BlockForm(channels_of(name), name == "in place")
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in block.modules())
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())


def test_the_form_of_a_block_on_the_meta_device():
    with torch.device("meta"):
        assert block_form(BLOCKS["ConvNeXt"]()) == BlockForm(8, False)


def test_a_block_of_one_size_is_tried_at_its_own():
    block = nn.Sequential(nn.LayerNorm((8, 14, 14)), nn.Conv2d(8, 8, 1))
    assert block_form(block).in_channels == 8


def test_lazy_modules_are_refused_until_they_have_numbers():
    block = nn.Sequential(nn.LazyConv2d(8, 1), nn.Sigmoid())
    with raises(
        ValueError, match="expected parameters with numbers, got Sequential with lazy ones, which a first forw"
    ):
        FusedBlockMoE.from_block(block, 2)
    block(torch.randn(2, 6, 4, 4))
    assert FusedBlockMoE.from_block(block, 2).experts.in_channels == 6


def test_fresh_experts_differ_in_convolutions_and_linear_layers_alone():
    torch.manual_seed(0)
    block = scrambled(BLOCKS["ConvNeXt"]())
    experts = FusedBlockMoE.from_block(block, 3, init="fresh").experts
    drawn = {f"{name}.{part}" for name in ("conv_dw", "mlp.fc1", "mlp.fc2") for part in ("weight", "bias")}
    for name, value in block.state_dict().items():
        values = [value, *(expert.state_dict()[name] for expert in experts)]
        same = [torch.equal(a, b) for i, a in enumerate(values) for b in values[:i]]
        if name == "conv_dw.bias":
            assert not any(expert.state_dict()[name].any() for expert in experts)  # as of every fresh convolution
        else:
            assert not any(same) if name in drawn else all(same), name


# --- rows -------------------------------------------------------------------------------------------------------------


@mark.parametrize("name", BLOCKS)
def test_an_expert_without_rows_does_not_run_and_has_a_gradient_of_zero(name: str):
    torch.manual_seed(0)
    moe = routed(BLOCKS[name](), 4, gate=ChosenRoutes([0, 2, 0, 2, 2], 4), init="fresh")
    scrambled(moe.experts).train()
    before = copy.deepcopy(moe.state_dict())
    seen: list[int] = []
    for number, expert in enumerate(moe.experts):
        expert.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    moe(images(5, channels_of(name))).square().sum().backward()
    assert seen == [0, 2]
    for number, expert in enumerate(moe.experts):
        if number in (1, 3):
            assert all(p.grad is not None and not p.grad.any() for p in expert.parameters())
        else:
            assert all(p.grad.any() or "bias" in n for n, p in expert.named_parameters())  # a norm cancels a bias
        for key, value in expert.named_buffers():
            if value.is_floating_point() and "running" in key:
                assert torch.equal(value, before[f"experts.{number}.{key}"]) == (number in (1, 3)), key


@mark.parametrize("fixed", [None, 1])
@mark.parametrize("training", [True, False], ids=["train", "eval"])
@mark.parametrize("name", BLOCKS)
def test_an_empty_batch_has_an_output_and_a_backward(name: str, training: bool, fixed: int | None):
    moe = routed(BLOCKS[name]()).train(training)
    moe.fixed_expert = fixed
    before = copy.deepcopy(moe.state_dict())
    x = images(0, channels_of(name)).requires_grad_()
    out = moe(x)
    assert out.shape == moe.eval()(images(1, channels_of(name)))[:0].shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(value, before[key]) for key, value in moe.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())


def test_each_expert_draws_for_its_own_rows():
    """Drop path in training: what a loop over the experts draws, in their order."""
    torch.manual_seed(0)
    routes = [1, 0, 1, 1, 0, 1, 0, 1]
    moe = routed(drop_path(0.5), 3, gate=ChosenRoutes(routes, 3), init="fresh").train()
    x, experts = images(8), [moe.expert(i) for i in range(3)]
    torch.manual_seed(3)
    out = moe(x)
    torch.manual_seed(3)
    for number in (0, 1):
        rows = [row for row, expert in enumerate(routes) if expert == number]
        torch.testing.assert_close(out[rows], experts[number](x[rows]), rtol=1e-12, atol=1e-12)
    assert len({tuple(row) for row in (out == x.relu()).flatten(1).all(1, keepdim=True).tolist()}) == 2  # some dropped
    assert torch.equal(moe.eval()(x), moe(x))


# --- norms ------------------------------------------------------------------------------------------------------------


class Plain(nn.BatchNorm2d):
    """Of a class of its own, and no more."""


@mark.parametrize("momentum", [0.1, None])
@mark.parametrize("kind", [Plain, BatchNormAct2d, nn.BatchNorm2d])
def test_a_single_value_per_channel_in_training(kind: type[nn.BatchNorm2d], momentum: float | None):
    """Where PyTorch refuses: it normalises to 0, the running mean moves by the momentum, the variance stays. A gradient
    of an earlier forward of the same norm is not disturbed."""
    torch.manual_seed(0)
    norm = scrambled(kind(4).double()).train()
    act = getattr(norm, "act", nn.Identity())
    norm.momentum = momentum
    (mine,) = copies(norm, 1)
    assert isinstance(mine, kind)
    earlier = mine(torch.randn(3, 4, 2, 2, dtype=torch.float64)).square().sum()
    mean, variance = mine.running_mean.clone(), mine.running_var.clone()
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    with raises(ValueError, match="Expected more than 1 value per channel"):
        norm(x)
    out = mine(x)
    assert torch.equal(out, act(mine.bias[:, None, None].expand_as(x).clone()))
    share = 0.1 if momentum else 1 / 2  # without a momentum: the mean over the batches
    torch.testing.assert_close(mine.running_mean, mean.lerp(x.detach().flatten(), share))
    assert torch.equal(mine.running_var, variance)
    assert mine.num_batches_tracked.item() == 2
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert not x.grad.any()
    assert not mine.weight.grad.any()
    bias = mine.bias.detach().requires_grad_()
    (act(bias[:, None, None].expand_as(x).clone()) * weight).sum().backward()
    torch.testing.assert_close(mine.bias.grad, bias.grad)
    earlier.backward()
    before = copy.deepcopy(mine.state_dict())
    assert mine(x[:0]).shape == (0, 4, 1, 1)
    assert all(torch.equal(value, before[key]) for key, value in mine.state_dict().items())


@mark.parametrize("name", ["selective kernel, 32 channels", "ResNeSt", "pre-activation", "Res2Net"])
def test_experts_with_one_row_train(name: str):
    """Norms behind a pooled map have one value per channel there, whatever the size of the map."""
    moe = routed(BLOCKS[name](), 3, gate=ChosenRoutes([0, 1, 2, 2, 2], 3)).train()
    for side in (6, 1):
        moe.zero_grad()
        moe(images(5, channels_of(name), side)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_norms_of_vectors_see_few_rows_too():
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.BatchNorm1d(8), nn.Unflatten(1, (8, 1, 1)))
    (expert,) = copies(block, 1)
    bias = expert[2].bias.data.normal_()
    assert torch.equal(expert(torch.randn(1, 8, 1, 1)).flatten(), bias)
    assert type(pickle.loads(pickle.dumps(expert))[2]) is type(expert[2])


def test_norms_that_would_wait_for_other_processes_are_refused_in_training(monkeypatch):
    moe = nn.SyncBatchNorm.convert_sync_batchnorm(routed(BLOCKS["squeeze and excitation"]()))
    moe(images())  # one process has nobody to wait for
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with raises(ValueError, match=r"experts: expected norms that wait for no other process, .* got SyncBatchNorm"):
        moe(images())
    moe.eval()(images())


def test_an_extracted_expert_has_the_classes_of_the_block():
    block = BLOCKS["pre-activation"]()
    moe = routed(block)
    kinds = [type(module) for module in block.modules()]
    assert [type(module) for module in moe.expert(1).modules()] == kinds
    assert [type(module) for module in moe.experts[1].modules()] != kinds


# --- what experts share -----------------------------------------------------------------------------------------------


class Borrowing(nn.Module):
    """Refers to a module and a parameter of somebody else, and to a convolution of its own under a second name."""

    def __init__(self, scale: nn.Module, shift: nn.Parameter) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.others = {"scale": [scale], "shift": shift}
        self.mine = (self.conv,)

    def forward(self, x: Tensor) -> Tensor:
        return self.others["scale"][0](self.mine[0](x)) + self.others["shift"]


def test_what_lies_outside_of_a_block_stays_there():
    model = nn.ModuleDict({"scale": nn.Conv2d(8, 8, 1)})
    model.shift = nn.Parameter(torch.ones(8, 1, 1))
    model["block"] = Borrowing(model["scale"], model.shift)
    replace_blocks(model, "block", num_experts=3)
    for experts in (model["block"].experts, [model["block"].expert(0)]):
        for expert in experts:
            assert expert.others["scale"][0] is model["scale"]
            assert expert.others["shift"] is model.shift
            assert expert.mine[0] is expert.conv
    assert len({id(expert.conv) for expert in model["block"].experts}) == 3
    model["block"](torch.randn(5, 8, 4, 4)).sum().backward()
    assert model["scale"].weight.grad.any()
    twin = copy.deepcopy(model)
    assert all(expert.others["scale"][0] is twin["scale"] for expert in twin["block"].experts)


def test_tied_weights_stay_tied_in_each_expert():
    moe = routed(BLOCKS["tied weights"](), init="fresh")
    for layer in (moe, copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), copy.deepcopy(moe).float()):
        assert all(expert.first.weight is expert.second.weight for expert in layer.experts)
        assert len(list(layer.experts[0].parameters())) == 6
    optimizer = torch.optim.AdamW(moe.parameters(), 0.1, weight_decay=0.1)
    moe(images()).square().sum().backward()
    optimizer.step()
    assert all(expert.first.weight is expert.second.weight for expert in moe.experts)
    assert all(expert.order.dtype == torch.int64 for expert in moe.half().experts)


# --- with the rest of the package -------------------------------------------------------------------------------------


@mark.parametrize("name", ["squeeze and excitation", "pre-activation", "Res2Net", "ConvNeXt"])
def test_an_attack_computes_the_same_and_leaves_all_as_it_was(monkeypatch, name: str):
    """With its norms folded, also after the forward that is learned from; in double precision, up to rounding."""
    monkeypatch.setattr(norm_folding, "LEAST", 0)
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(stem, routed(scrambled(BLOCKS[name]()), 3, 2, init="fresh")).double()
    state = copy.deepcopy(model.state_dict())
    x = images(6, 3).requires_grad_()
    model.eval()
    wanted = model(x)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    record = model[1].routing
    model.train()
    with attack_mode(model):
        for _ in range(3):
            got = model(x)
            (found,) = torch.autograd.grad(got.square().sum(), x)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)
    assert model[1].routing is record
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_compiled_model_breaks_its_graph_and_computes_the_same():
    """Where the host reads the segments' sizes. ``aot_eager`` runs the same operations, so the same bits."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(FusedBlockMoE.from_block(BLOCKS["tied weights"](), 2, 1, init="fresh"))
    plain = copy.deepcopy(model)
    x = images(6).float()
    results = []
    for each in (torch.compile(model, backend="aot_eager"), plain):
        out = each(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in each.parameters()), *each.buffers()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch._dynamo.reset()
    with raises(RuntimeError, match="data-dependent"):
        torch.compile(plain, backend="aot_eager", fullgraph=True)(x)


def test_a_balance_loss_and_one_expert_for_all():
    model = nn.Sequential(routed(BLOCKS["ResNeSt"](), 3, 2, init="fresh")).eval()
    x = images()
    model(x)
    record = moe_layers(model)["0"].last_routing()
    assert record.indices.shape == (5, 2)
    balance_loss(model, "switch").backward()
    assert model[0].gate.fc.weight.grad.any()
    model[0].fixed_expert = 2
    torch.testing.assert_close(model(x), model[0].expert(2)(x), rtol=1e-12, atol=1e-12)
