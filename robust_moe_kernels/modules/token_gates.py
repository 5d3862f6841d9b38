"""Gates of tokens: rows [N, C] in, one logit an expert out, each row's from that row alone.

As the gates of maps, they are computed in the precision of their own parameters, float32 at least, outside autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.general_path import is_general
from robust_moe_kernels.modules.interception import has_hooks
from robust_moe_kernels.ops.gate import pool_linear

__all__ = ["TOKEN_GATES", "LinearGate", "NoisyTopKGate"]


class LinearGate(nn.Module):
    """One linear layer without bias, whose softmax weighs the experts (2106.05974, section 2.2).

    A row's logits do not depend on the other rows, bit for bit: a library's product may sum one row in another order
    than many, and a rounding decides the route.

    forward: [N, C], any float -> logits [N, E] in the parameters' dtype, float32 for lower precisions.
    """

    last_layer = "fc"  # has one output per expert (:func:`~robust_moe_kernels.modules.prune_experts`)

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        plain = type(self.fc) is nn.Linear and not has_hooks(self.fc)
        if plain and not is_general():
            kind = torch.promote_types(weight.dtype, torch.float32)
            bias = None if self.fc.bias is None else self.fc.bias.to(kind)
            return pool_linear(x[:, :, None, None], weight.to(kind), bias)  # the mean over a map of one pixel
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(x.to(weight.dtype if isinstance(weight, Tensor) else torch.float32))


class NoisyTopKGate(LinearGate):
    """The router of V-MoE (Riquelme et al., 2106.05974, section 2.2): TOP_k(softmax(W x + noise)), the noise
    N(0, 1/E^2) in training alone, the k scores kept as they are.

    Noise and weights are the layer's: with this gate :meth:`~robust_moe_kernels.modules.FusedMLPMoE.from_mlp` sets
    ``noise="vmoe"``, ``noise_std=1``, ``renormalize=False`` and ``straight_through=False``. The losses that go with it
    are ``balance_loss(model, "vmoe")``.

    forward: as :class:`LinearGate`.
    """


TOKEN_GATES: dict[str, type[nn.Module]] = {"linear": LinearGate, "noisy_top_k": NoisyTopKGate}
