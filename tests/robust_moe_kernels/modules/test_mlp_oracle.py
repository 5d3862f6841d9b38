"""FusedMLPMoE against a plain loop over its experts in double precision: outputs, every gradient, every statistic."""

from __future__ import annotations

import copy

import timm
import torch
from pytest import mark
from token_layers import BOUND, MLPS, WIDTH
from torch import Tensor, nn

from robust_moe_kernels import FusedMLPMoE, balance_loss, replace_mlps

SELECTIONS = {
    "k=1, straight-through": (4, {"top_k": 1}),
    "k=1, the score itself": (4, {"top_k": 1, "straight_through": False, "renormalize": False}),
    "k=2": (4, {"top_k": 2}),
    "k=2, as V-MoE": (4, {"top_k": 2, "gate": "noisy_top_k", "noise_std": 0.0}),
    "k=E": (3, {"top_k": 3}),
    "E=1": (1, {"top_k": 1}),
    "more experts than tokens": (31, {"top_k": 2}),
}


class Loop(nn.Module):
    """The definition: each expert on the tokens that chose it, one after the other."""

    def __init__(self, moe: FusedMLPMoE) -> None:
        super().__init__()
        self.experts = nn.ModuleList(moe.expert(i) for i in range(moe.num_experts))
        self.weight = nn.Parameter(moe.gate.fc.weight.detach().clone())
        self.options = moe.route_options
        self.scores = self.indices = None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        exponentials = (rows @ self.weight.T).exp()
        self.scores = exponentials / exponentials.sum(1, keepdim=True)
        kept, self.indices = self.scores.topk(self.options.top_k, dim=1)
        weights = kept / kept.sum(1, keepdim=True) if self.options.renormalize else kept
        if self.options.top_k == 1 and self.options.straight_through:
            weights = 1.0 + kept - kept.detach()
        out = None
        for i, expert in enumerate(self.experts):
            tokens, slots = (self.indices == i).nonzero(as_tuple=True)
            y = weights[tokens, slots, None] * expert(rows[tokens])
            out = y.new_zeros(len(rows), y.shape[1]) if out is None else out
            out = out.index_add(0, tokens, y)
        return out.reshape(*x.shape[:-1], out.shape[1])


def assert_near(got: Tensor | None, wanted: Tensor | None, what: str) -> None:
    """``None`` stands for a gradient of zero."""
    if got is None or wanted is None:
        present = got if wanted is None else wanted
        assert present is None or not present.any(), f"{what}: one side has no gradient, the other is not zero"
        return
    assert got.shape == wanted.shape, what
    error = (got - wanted).abs().max().item()  # NaN fails the comparison below
    assert error <= BOUND * max(1.0, wanted.abs().max().item()), f"{what}: off by {error}"


def assert_same_gradients(moe: FusedMLPMoE, loop: Loop) -> None:
    assert_near(moe.gate.fc.weight.grad, loop.weight.grad, "gradient of the gate")
    for i, (routed, alone) in enumerate(zip(moe.experts, loop.experts, strict=True)):
        for name, parameter in routed.named_parameters():
            assert_near(parameter.grad, alone.get_parameter(name).grad, f"gradient of {name}, expert {i}")


def entropy(loops: list[Loop]) -> Tensor:
    means = [loop.scores.mean(0) for loop in loops]
    return sum((mean * mean.log()).sum() for mean in means)


def assert_equals_loop(moe: FusedMLPMoE, x: Tensor) -> None:
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    loop = Loop(moe)
    x, x_loop = (x.clone().requires_grad_() for _ in range(2))
    out, wanted = moe(x), loop(x_loop)
    assert torch.equal(moe.routing.indices, loop.indices)
    assert_near(out, wanted, "output")
    weight = torch.randn_like(wanted)
    ((out * weight).sum() + 3.0 * balance_loss(moe, "entropy")).backward()
    ((wanted * weight).sum() + 3.0 * entropy([loop])).backward()
    assert_near(x.grad, x_loop.grad, "input gradient")
    assert_same_gradients(moe, loop)


@mark.parametrize("name", MLPS)
def test_mlps_equal_the_loop(name: str):
    torch.manual_seed(1)
    moe = FusedMLPMoE.from_mlp(MLPS[name][0]().double(), 4, init="fresh")
    assert_equals_loop(moe, torch.randn(2, 7, WIDTH, dtype=torch.float64))


@mark.parametrize("name", SELECTIONS)
def test_selections_equal_the_loop(name: str):
    torch.manual_seed(2)
    experts, options = SELECTIONS[name]
    moe = FusedMLPMoE.from_mlp(MLPS["timm"][0]().double(), experts, init="fresh", **options)
    assert_equals_loop(moe, torch.randn(2, 7, WIDTH, dtype=torch.float64))


def test_a_vit_of_timm_equals_the_loop():
    """ViT-Tiny with two routed MLPs: logits, and the gradient of every parameter of the model."""
    torch.manual_seed(3)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=3, num_classes=5).double()
    replace_mlps(vit, ["blocks.0.mlp", "blocks.2.mlp"], num_experts=3, init="fresh")
    plain = copy.deepcopy(vit)
    for number in (0, 2):
        plain.blocks[number].mlp = Loop(plain.blocks[number].mlp)
    loops = [plain.blocks[number].mlp for number in (0, 2)]
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    x, x_plain = (images.clone().requires_grad_() for _ in range(2))
    out, wanted = vit(x), plain(x_plain)
    assert_near(out, wanted, "logits")
    weight = torch.randn_like(out)
    ((out * weight).sum() + balance_loss(vit)).backward()
    ((wanted * weight).sum() + entropy(loops)).backward()
    assert_near(x.grad, x_plain.grad, "input gradient")
    for number, loop in zip((0, 2), loops, strict=True):
        assert_same_gradients(vit.blocks[number].mlp, loop)
    rest = dict(plain.named_parameters())
    compared = [name for name in dict(vit.named_parameters()) if name in rest and ".mlp." not in name]
    assert len(compared) > 25  # patch embedding, position, norms, attention, the MLP left dense, the head
    for name in compared:
        assert_near(vit.get_parameter(name).grad, rest[name].grad, name)
