"""A model with all that attack_mode treats, and a step of an attack on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE


def network(stem_norm: bool = True) -> nn.Sequential:
    """Ordinary convolutions and norms around a FusedConvMoE, a BasicBlock and a Bottleneck with downsampling; no two
    weights have the same shape, and batch norms are not the identity.

    ``stem_norm=False``: without the ordinary batch norm. All norms are then the routed blocks', which an attack folds
    without another bit; an ordinary convolution rounds otherwise with its norm folded (test_norm_folding.py).
    """
    torch.manual_seed(0)
    skip = nn.Sequential(nn.Conv2d(12, 24, 1, 2, bias=False), nn.BatchNorm2d(24))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8) if stem_norm else nn.Identity(),
        nn.ReLU(),
        FusedConvMoE.from_conv(nn.Conv2d(8, 12, 3, padding=1), init="fresh", noise_std=0.1),
        FusedBlockMoE.from_block(BasicBlock(12, 12), init="fresh"),
        FusedBlockMoE.from_block(Bottleneck(12, 6, 2, skip), init="fresh"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    change(model)
    return model


def change(model: nn.Module) -> None:
    """New numbers in every norm, in place, as optimiser steps and training forwards make them."""
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.3)
            elif value.is_floating_point() and value.dim() <= 2 and "gate" not in name and "8." not in name:
                value.uniform_(0.5, 1.5)


def images(count: int = 6, device: str = "cpu") -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of their weighted sum to x, as an attack asks for it."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad((logits * torch.arange(5.0, device=x.device).sin()).sum(), x)
    return logits.detach(), gradient


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
