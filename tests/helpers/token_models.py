"""Networks whose routed layers send each token on its own way, of plain layers: an image's patches are its tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_moe.models import NetworkExperts
from robust_moe_kernels.modules import MoELayer, moe_layers
from robust_moe_kernels.ops.routing import Route

CLASSES = 5


class TokenExperts(NetworkExperts):
    """Networks that rows [N, C] are sent to; pairs that are dropped, sorted behind all experts, add nothing."""

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        out = x.new_zeros(len(x), x.shape[1])
        ends = route.offsets.tolist()
        for network, start, stop in zip(self.networks, ends, ends[1:], strict=False):
            pairs = route.order[start:stop]
            rows = pairs // route.top_k
            out = out.index_add(0, rows, network(x[rows]) * weights.flatten()[pairs, None].to(x.dtype))
        return out


class TokenLayer(MoELayer):
    """Any experts, which take rows [N, C], behind a gate on rows: [B, T, C] -> [B, T, C']."""

    limited = True

    def _rows(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
        return x.flatten(0, -2), tuple(x.shape[:-1]), None


def token_layer(channels: int, experts: int = 4, top_k: int = 2, **options: object) -> TokenLayer:
    """MLPs as experts, and a linear gate with routes that an attack can change."""
    networks = [nn.Sequential(nn.Linear(channels, 8), nn.GELU(), nn.Linear(8, channels)) for _ in range(experts)]
    gate = nn.Linear(channels, experts)
    nn.init.normal_(gate.weight, 0, 3)
    layer = TokenLayer(gate, TokenExperts(networks, channels), top_k)
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


class TokenModel(nn.Module):
    """Patches of 2x2 pixels, then residual layers on tokens that also see the mean of all tokens, then classes.

    Args:
        layers: on tokens, [B, T, C] -> [B, T, C].
    """

    def __init__(self, *layers: nn.Module, channels: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, channels, 2, 2)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = tokens + layer(tokens + tokens.mean(1, keepdim=True))
        return self.head(tokens.mean(1))


def token_model(layers: int = 2, **options: object) -> TokenModel:
    """In float64 and evaluation mode; experts are used alike on :func:`images`."""
    torch.manual_seed(0)
    model = TokenModel(*(token_layer(6, **options) for _ in range(layers)))
    for layer in moe_layers(model).values():
        model(images(16).float())
        layer.gate.bias.data -= layer.last_routing().logits.detach().mean(0)
    return model.double().eval()


def images(count: int = 6, size: int = 6) -> Tensor:
    """Float64 [count, 2, size, size] in [0, 1]: 9 tokens each."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, 2, size, size, generator=generator, dtype=torch.float64)


def labelled(model: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    """Images and what the model says of them, but for the first."""
    x = images(count)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    return x, y
