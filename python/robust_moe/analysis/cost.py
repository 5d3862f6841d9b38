"""What one image costs a model: multiply-adds of a forward, and the parameters that it meets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import moe_layers

__all__ = ["ModelCost", "model_cost"]


@dataclass(frozen=True)
class ModelCost:
    """Cost of one image. A multiply-add is one multiplication and the addition of its product; papers that count the
    two apart ("FLOPs") report twice as many."""

    multiply_adds: int  # of a forward: convolutions, linear layers, attention; a routed layer runs some of its experts
    parameters: int  # all of the model's
    active_parameters: int  # all but those of the experts that do not run for the image, or for any of its tokens


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """As PyTorch counts it on a GPU and in the meta device; its counter leaves out the CPU's own operation."""
    return 2 * math.prod(query[:-2]) * query[-2] * key[-2] * (query[-1] + value[-1])


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@torch.no_grad()
def model_cost(model: nn.Module, image: Tensor) -> ModelCost:
    """The cost of ``image`` in evaluation mode; the model is left in the mode that it was in.

    The experts that run are those of the image's route, whatever decides it: the gate, a routing rule for evaluation, a
    fixed expert. Norms, activations, pooling, softmax and the sorting of images by expert are not counted; padding is,
    as if it were multiplied. Of experts that differ in size, ``active_parameters`` takes the mean.

    Args:
        model: [1, C, H, W] in [0, 1] -> logits, on the CPU.
        image: [1, C, H, W].

    Raises:
        ValueError: another number of images than one.
    """
    expect(image.dim() == 4 and len(image) == 1, "image", "one image [1, C, H, W]", list(image.shape))
    modes = {module: module.training for module in model.modules()}
    try:
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            model.eval()(image)
    finally:
        for module, training in modes.items():
            module.training = training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        record = layer.last_routing()  # a routing rule, or imposed routes, need not keep to top_k
        computed = record.indices if record.dropped is None else record.indices[~record.dropped]
        active = len(computed.unique())
        idle += experts * (layer.num_experts - active) // layer.num_experts
    return ModelCost(counter.get_total_flops() // 2, parameters, parameters - idle)
