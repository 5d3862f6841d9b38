"""A dense network of two blocks and an MLP, and its routed twin, which computes the same function, and one way to train
them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from robust_moe_kernels import replace_blocks, replace_mlps

EXPERTS = 3


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    skip = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 12, 2, skip)]
    layers += [BasicBlock(12, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Mlp(12, 20)]
    model = nn.Sequential(*layers, nn.Linear(12, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def routed(**options) -> nn.Sequential:
    model = replace_blocks(dense(), ["3", "4"], num_experts=EXPERTS, top_k=2, **options)
    return replace_mlps(model, "7", num_experts=EXPERTS, top_k=2, **options)


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 5


def blocks(model: nn.Sequential) -> list[nn.Module]:
    """The blocks of a dense network; every expert of a routed one."""
    return [
        block for layer in (model[3], model[4]) for block in (layer.experts if hasattr(layer, "experts") else [layer])
    ]


def convs(model: nn.Sequential) -> list[nn.Conv2d]:
    return [block.conv1 for block in blocks(model)]


def norms(model: nn.Sequential) -> list[nn.BatchNorm2d]:
    return [module for block in blocks(model) for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def trained(model: nn.Module, steps: int = 2) -> float:
    x, y = images()
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()
