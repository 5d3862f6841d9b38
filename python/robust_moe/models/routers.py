"""Routers: an image in, one logit an expert out; the table of them.

None here has batch norms: an image's route does not depend on the others of its batch, nor on the mode. Like gates,
routers compute in the precision of their own parameters, outside autocast: a rounding would decide the route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust_moe.models.images import ImageSpec
from robust_moe.models.normalize import Normalize
from robust_moe.settings import Config, Table, fixed, setting
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import GapFcGate

__all__ = ["ROUTERS", "Router", "RouterConfig"]

ROUTERS = Table("router")


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Config):
    """Settings of a router: the base of those of each router in :data:`ROUTERS`.

    A router is a module, or a function that makes one, from ``(images, num_experts, **its own settings)``; the module
    maps float [B, C, S, S] in [0, 1], not normalised, to logits [B, num_experts] (:class:`Router` normalises).
    """

    table: ClassVar[Table] = ROUTERS

    frozen: bool = setting(
        False, "the router keeps the weights that it starts with, as in the released code of the dual-model paper"
    )

    def build(self, images: ImageSpec, num_experts: int) -> nn.Module:
        """The router of one mixture; weights from PyTorch's global generator."""
        router: nn.Module = type(self).owner(images, num_experts, **self.own_arguments(RouterConfig))
        return router.requires_grad_(False) if self.frozen else router


class Router(nn.Module):
    """Normalisation, then ``body``: float [B, C, S, S] in [0, 1] -> logits [B, E] in the parameters' dtype.

    Args:
        channels, image_size: C and S.
        num_experts: E.
        mean, std: of the images, C numbers each.
        body: makes the module that maps normalised images to logits, from C, S and E.

    Raises:
        ValueError: in a forward, images of another shape.
    """

    last_layer = "body"  # has one output per expert (:func:`robust_moe_kernels.modules.prune_experts`)

    def __init__(
        self,
        body: Callable[[int, int, int], nn.Module],
        channels: int,
        image_size: int,
        num_experts: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.body = body(channels, image_size, num_experts)
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                # PyTorch's own loses more than half of the signal a layer: over CIFAR-10 the scores of "cnn" differ by
                # 0.006 then (standard deviation), with this by 0.08
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.shape = (channels, image_size, image_size)

    def forward(self, x: Tensor) -> Tensor:
        expect(x.shape[1:] == self.shape, "x", f"images of shape {list(self.shape)}", list(x.shape[1:]))
        with torch.autocast(x.device.type, enabled=False):
            return self.body(self.normalize(x.to(next(self.body.parameters()).dtype)))


def _linear(channels: int, size: int, experts: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, experts))


def _stem(*widths: int) -> list[nn.Module]:
    """3x3 convolutions of stride 2, each with a ReLU: sides go from S to ceil(S / 2)."""
    return [
        layer for i, o in pairwise(widths) for layer in (nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU(inplace=True))
    ]


def _cnn(channels: int, size: int, experts: int) -> nn.Module:
    side = -(-size // 8)
    return nn.Sequential(*_stem(channels, 16, 32, 32), nn.Flatten(), nn.Linear(32 * side * side, experts))


def _gap_fc(channels: int, size: int, experts: int) -> nn.Module:
    return nn.Sequential(*_stem(channels, 16, 32), GapFcGate(32, experts))


def _build(images: ImageSpec, num_experts: int, body: Callable[[int, int, int], nn.Module]) -> Router:
    return Router(body, images.channels, images.image_size, num_experts, images.mean, images.std)


_BODIES: dict[str, Callable[[int, int, int], nn.Module]] = {
    # one linear layer on the pixels, as in the released code of the dual-model paper
    "linear": _linear,
    # three strided convolutions, then a linear layer that still sees where in the image things are
    "cnn": _cnn,
    # the GAP-FC gate of "Robust Experts" over two strided convolutions: pooled pixels alone would route by mean colour
    "gap_fc": _gap_fc,
}
for _name, _body in _BODIES.items():
    ROUTERS.register(_name, fixed(RouterConfig, body=_body))(_build)
