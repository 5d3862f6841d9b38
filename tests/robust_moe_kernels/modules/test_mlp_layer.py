"""FusedMLPMoE: what it replaces, where it starts, and inputs of every form."""

from __future__ import annotations

import timm
import torch
import torchvision
from pytest import mark
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import nn

from robust_moe_kernels import FusedMLPMoE, replace_mlps

WIDTH, HIDDEN = 12, 20

# Double precision: sums of at most 20 products, some 20 of them behind each other.
BOUND = 1e4 * torch.finfo(torch.float64).eps

MLPS = {
    "timm": (lambda: Mlp(WIDTH, HIDDEN), "gelu"),
    "timm, no bias": (lambda: Mlp(WIDTH, HIDDEN, bias=False), "gelu"),
    "timm, other width out": (lambda: Mlp(WIDTH, HIDDEN, 7, act_layer=nn.ReLU), "relu"),
    "timm, tanh": (lambda: Mlp(WIDTH, HIDDEN, act_layer=lambda: nn.GELU(approximate="tanh")), "gelu_tanh"),
    "timm gated": (lambda: GluMlp(WIDTH, HIDDEN), "glu_sigmoid"),
    "timm gated, gate first": (lambda: GluMlp(WIDTH, HIDDEN, act_layer=nn.SiLU, gate_last=False), "glu_silu"),
    "timm SwiGLU": (lambda: SwiGLU(WIDTH, HIDDEN), "glu_silu"),
    "torchvision": (lambda: torchvision.ops.MLP(WIDTH, [HIDDEN, WIDTH], activation_layer=nn.GELU), "gelu"),
    "torchvision ViT": (lambda: torchvision.models.vision_transformer.MLPBlock(WIDTH, HIDDEN, 0.0), "gelu"),
}


@mark.parametrize("name", MLPS)
def test_copies_compute_what_the_mlp_did(name: str):
    torch.manual_seed(0)
    build, activation = MLPS[name]
    mlp = build().double().eval()
    moe = FusedMLPMoE.from_mlp(mlp, 4)
    assert moe.experts.form.activation == activation
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(moe(x), mlp(x), rtol=BOUND, atol=BOUND)
    assert moe.routing.shape == (3, 5)
    assert moe.routing.by_sample(moe.routing.indices).shape == (3, 5, 2)


def test_a_vit_of_timm_keeps_its_function():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, num_classes=5).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = vit(x)
    assert replace_mlps(vit, ["blocks.0.mlp", "blocks.1.mlp"], num_experts=4) is vit
    torch.testing.assert_close(vit(x), wanted, rtol=BOUND, atol=BOUND)
    assert type(vit.blocks[1].mlp) is FusedMLPMoE
    assert vit.blocks[1].mlp.routing.shape == (2, 5)  # four patches and the class token
