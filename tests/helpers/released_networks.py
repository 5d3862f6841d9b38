"""Networks under the names that the two papers' released codes give their parameters, written anew for the tests.

Sources of the names: Robust-MoE-Dual-Model, models/moe.py; Robust-MoE-CNN, models/resnet_cifar_moe.py and
models/layers/*.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RoutedFilters(nn.Conv2d):
    """E convolutions as one of E * O filters; ``expert`` says which one counts."""

    def __init__(self, inside: int, outside: int, stride: int, experts: int) -> None:
        super().__init__(inside, outside * experts, 3, stride, padding=1, bias=False)
        self.each, self.expert = outside, 0

    def forward(self, x: Tensor) -> Tensor:
        rows = slice(self.expert * self.each, (self.expert + 1) * self.each)
        return F.conv2d(x, self.weight[rows], stride=self.stride, padding=1)


class Residual(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, inside: int, outside: int, stride: int, experts: int) -> None:
        super().__init__()

        def conv(i: int, s: int) -> nn.Conv2d:
            return nn.Conv2d(i, outside, 3, s, 1, bias=False) if experts == 0 else RoutedFilters(i, outside, s, experts)

        self.conv1, self.bn1 = conv(inside, stride), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = conv(outside, 1), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ReleasedResNet(nn.Module):
    """A residual network, two blocks a stage, layers named as in code for CIFAR; it does not normalise its images."""

    def __init__(self, width: int = 4, stages: int = 2, classes: int = 10, experts: int = 0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inside = width
        for number in range(stages):
            outside = width * 2**number
            first = Residual(inside, outside, 1 if number == 0 else 2, experts)
            self.add_module(f"layer{number + 1}", nn.Sequential(first, Residual(outside, outside, 1, experts)))
            inside = outside
        self.stages = [f"layer{number + 1}" for number in range(stages)]
        self.linear = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(x.mean((2, 3)))


class Expert(nn.Module):
    """A network under the name ``net`` or ``vit``."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, network)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


class LinearRouter(nn.Module):
    """The best expert by one linear layer on the pixels."""

    def __init__(self, experts: int, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(3 * size * size, experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x.flatten(1)).argmax(1)


class ReleasedMixture(nn.Module):
    """Each image through the expert that the router names."""

    def __init__(self, networks: list[nn.Module], size: int, name: str = "net") -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(network, name) for network in networks)
        self.router = LinearRouter(len(networks), size)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).tolist()
        return torch.cat([self.experts[expert](image[None]) for expert, image in zip(chosen, x, strict=True)])


class ReleasedDual(nn.Module):
    """(1 - alpha) F_S + alpha F_R, in logits."""

    def __init__(self, standard: nn.Module, robust: nn.Module, alpha: float) -> None:
        super().__init__()
        self.Smoe, self.Rmoe, self.alpha = standard, robust, alpha

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.alpha) * self.Smoe(x) + self.alpha * self.Rmoe(x)


def unsettled(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode and float64, with statistics and affine weights that are not those of the start."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point():
            noise = 0.2 * torch.randn_like(value)
            with torch.no_grad():
                value.add_(noise.abs() if name.endswith("var") else noise)
    return model.double().eval()
