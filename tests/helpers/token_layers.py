"""MLPs of every form that FusedMLPMoE reads, and a layer of one, small."""

from __future__ import annotations

import torch
import torchvision
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from robust_moe_kernels import FusedMLPMoE

WIDTH, HIDDEN, EXPERTS = 12, 20, 4

# Double precision: sums of at most 23 rows of at most 20 products, some 20 of them behind each other.
BOUND = 1e4 * torch.finfo(torch.float64).eps

MLPS = {  # what makes it, and its activation
    "timm": (lambda: Mlp(WIDTH, HIDDEN), "gelu"),
    "timm, no bias": (lambda: Mlp(WIDTH, HIDDEN, bias=False), "gelu"),
    "timm, one bias": (lambda: Mlp(WIDTH, HIDDEN, bias=(False, True)), "gelu"),
    "timm, other width out": (lambda: Mlp(WIDTH, HIDDEN, 7, act_layer=nn.ReLU), "relu"),
    "timm, tanh": (lambda: Mlp(WIDTH, HIDDEN, act_layer=lambda: nn.GELU(approximate="tanh")), "gelu_tanh"),
    "timm gated": (lambda: GluMlp(WIDTH, HIDDEN), "glu_sigmoid"),
    "timm gated, gate first": (lambda: GluMlp(WIDTH, HIDDEN, act_layer=nn.SiLU, gate_last=False), "glu_silu"),
    "timm SwiGLU": (lambda: SwiGLU(WIDTH, HIDDEN), "glu_silu"),
    "torchvision": (lambda: torchvision.ops.MLP(WIDTH, [HIDDEN, WIDTH], activation_layer=nn.GELU), "gelu"),
    "torchvision ViT": (lambda: torchvision.models.vision_transformer.MLPBlock(WIDTH, HIDDEN, 0.0), "gelu"),
}


def token_layer(top_k: int = 2, mlp: str = "timm", **options) -> FusedMLPMoE:
    """A layer in double precision whose experts differ."""
    torch.manual_seed(0)
    moe = FusedMLPMoE.from_mlp(MLPS[mlp][0]().double(), EXPERTS, top_k, init="fresh", **options)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return moe


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (23,)), WIDTH, dtype=torch.float64, generator=generator)
