"""PyTorch's own counter of floating-point operations counts those of routed layers."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from robust_moe_kernels import FusedConvMoE


def counted(make) -> int:
    with FlopCounterMode(display=False) as counter:
        make()
    return counter.get_total_flops()


def test_a_routed_convolution_counts_as_its_chosen_experts():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 8, 3, padding=1)
    layer = FusedConvMoE.from_conv(conv, num_experts=4, top_k=2)
    x = torch.rand(5, 6, 7, 7)
    gate = counted(lambda: layer.gate(x))
    dense = counted(lambda: conv(x))
    assert counted(lambda: layer(x)) - gate == 2 * dense

    x.requires_grad_()
    both = counted(lambda: conv(x).sum().backward())
    layer.gate.requires_grad_(False)
    assert counted(lambda: layer(x).sum().backward()) - 2 * (both) == counted(lambda: layer.gate(x).sum().backward())
