"""FusedMLPMoE: what it replaces, where it starts, and inputs of every form."""

from __future__ import annotations

import timm
import torch
from pytest import mark
from token_layers import BOUND, MLPS, WIDTH

from robust_moe_kernels import FusedMLPMoE, replace_mlps


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
