"""Whole networks as experts: what a layer asks of its experts and no more, and networks that one sees through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import Route


class Networks(nn.Module):
    """Experts of a :class:`~robust_moe_kernels.modules.MoELayer` from [B, C, H, W] to any shape, run by segments."""

    def __init__(self, networks: list[nn.Module], in_channels: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.num_experts, self.in_channels = len(networks), in_channels

    def one(self, expert: int, x: Tensor) -> Tensor:
        return self.networks[expert](x)

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        segments = dispatch(x, route).split(route.counts.tolist())
        rows = [network(rows) for network, rows in zip(self.networks, segments, strict=True)]
        return combine(torch.cat(rows), route, weights)


def linear(*weights: list[float]) -> nn.Sequential:
    """An affine function of an image's pixels, one row per logit; of two pixels (a, b): [of a, of b, bias]."""
    table = torch.tensor(weights, dtype=torch.float32)
    layer = nn.Linear(table.shape[1] - 1, len(table))
    layer.weight.data, layer.bias.data = table[:, :-1].clone(), table[:, -1].clone()
    return nn.Sequential(nn.Flatten(), layer)
