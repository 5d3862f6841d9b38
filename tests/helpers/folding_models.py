"""Models whose batch norms an attack folds, and what the tests of the folding ask of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.modules import attack_mode


def change(model: nn.Module) -> nn.Module:
    """Norms that are not the identity, and a model in evaluation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for tensor, low in (
                    (norm.running_var, 0.5),
                    (norm.weight, 0.5),
                    (norm.running_mean, -0.5),
                    (norm.bias, -0.5),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()


class Block(nn.Module):
    """A residual block by itself, with or without a downsampling skip; ``tail`` is called where ``relu`` was."""

    def __init__(self, channels: int = 8, out: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    blocks = [Block(width, width), Block(width, 2 * width, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5)]
    return change(nn.Sequential(*stem, *blocks, *head))


CONVOLUTIONS = 1 + 2 + 3  # of ``network``


def images(count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the gradient of its weighted sum to x."""
    x = x.clone().requires_grad_()
    out = model(x)
    factors = torch.arange(out[0].numel(), dtype=out.dtype).sin().view(out.shape[1:])
    (gradient,) = torch.autograd.grad((out * factors).sum(), x)
    return out.detach(), gradient


def learn(model: nn.Module, x: Tensor | None = None) -> None:
    with attack_mode(model):
        step(model, images() if x is None else x)


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal but for rounding. In float64: 30 layers of sums of a thousand terms stay below 1e-10 of the largest number
    (each sum's error is below n * eps = 1e-13 of its terms), and no ReLU is within that of its corner."""
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


class Odd(nn.Module):
    """A convolution and a norm with ``between`` in the middle, called as ``between(self, x)``."""

    def __init__(self, between: Callable) -> None:
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return 2 * d
