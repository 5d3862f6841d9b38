"""A network of routed MLPs that may be linked, and the same written out a token at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from robust_moe_kernels.modules import FusedMLPMoE, moe_layers, replace_mlps

WIDTH, HIDDEN, EXPERTS = 6, 8, 4
FLOOR = 0.1  # of the gate, by default


class Blocks(nn.Module):
    """Residual MLPs on tokens that also see the mean of all tokens, [B, T, C] -> [B, T, C]."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(WIDTH, HIDDEN) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, 0, len(self.blocks))

    def part(self, x: Tensor, start: int, stop: int) -> Tensor:
        for block in list(self.blocks)[start:stop]:
            x = x + block(self.seen(x))
        return x

    def seen(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)

    @property
    def layers(self) -> list[FusedMLPMoE]:
        return list(moe_layers(self).values())


def linked(depth: int = 3, top_k: int = 2, **options: Any) -> Blocks:
    """In double precision; experts and gates differ."""
    torch.manual_seed(0)
    model = Blocks(depth).double()
    names = [f"blocks.{number}" for number in range(depth)]
    replace_mlps(model, names, num_experts=EXPERTS, top_k=top_k, init="fresh", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens(batch: int = 3, count: int = 5, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 2.0, WIDTH, dtype=torch.float64)  # features of different spread
    return torch.randn(batch, count, WIDTH, dtype=torch.float64, generator=generator) * scale


def plain_spread(rows: Tensor, clusters: Sequence[int], cluster: int) -> list[float] | None:
    """Mean absolute deviation of each feature in a cluster; None for fewer than two rows."""
    found = [row for row, mine in zip(rows.tolist(), clusters, strict=True) if mine == cluster]
    if len(found) < 2:
        return None
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    return [sum(abs(row[q] - means[q]) for row in found) / len(found) for q in range(WIDTH)]


def plain_diagonal(spread: Sequence[float] | None) -> Tensor:
    """M of a cluster."""
    if spread is None:
        return torch.ones(WIDTH, dtype=torch.float64)
    least = FLOOR * sum(spread) / WIDTH
    inverse = [1 / max(s, least) for s in spread]
    return torch.tensor([each * WIDTH / sum(inverse) for each in inverse], dtype=torch.float64)


def plain_layer(layer: FusedMLPMoE, rows: Tensor, factors: Tensor | None) -> tuple[Tensor, list[int]]:
    """(what the experts give [N, C], first choices) of rows [N, C] whose features the gate sees times ``factors``."""
    experts = [layer.experts[number] for number in range(EXPERTS)]
    out, first = [], []
    for number, row in enumerate(rows):
        read = row if factors is None else row * factors[number]
        scores = torch.stack([(read * weight).sum() for weight in layer.gate.fc.weight]).softmax(0)
        order = sorted(range(EXPERTS), key=lambda expert, scores=scores: -scores[expert].item())[: layer.top_k]
        kept = scores[order]
        weights = kept / kept.sum() if len(order) > 1 else 1 + kept - kept.detach()  # straight-through
        out.append(sum(weight * experts[expert](row) for expert, weight in zip(order, weights, strict=True)))
        first.append(order[0])
    return torch.stack(out), first


def twin(model: Blocks) -> Blocks:
    """The same network, apart."""
    return copy.deepcopy(model)
