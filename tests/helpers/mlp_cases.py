"""Cases of the routed MLP, and its oracle: a loop over experts of ``nn.Linear``, by autograd in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.ops.expert_mlp import ACTIVATIONS, expert_mlp
from robust_moe_kernels.ops.routing import Route, sort_by_expert

NAMES = ("y", "d_x", "d_weight1", "d_bias1", "d_weight2", "d_bias2", "d_weights")
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class Case(NamedTuple):
    name: str
    tokens: int
    top_k: int
    experts: int
    widths: tuple[int, int, int]  # C, H, O
    activation: str
    why: str
    biases: bool = True
    used: int | None = None  # experts that tokens are sent to, the first ones; None: all
    dropped: int = 0  # slots of the last tokens that go to no expert


CASES = (
    Case("uneven", 13, 2, 4, (12, 20, 9), "gelu", "widths that fill no register"),
    Case("silent", 7, 2, 6, (8, 16, 8), "gelu", "experts without rows, the last among them", used=3),
    Case("all", 5, 4, 4, (6, 10, 7), "silu", "k = E: every expert sees every token"),
    Case("one", 9, 1, 1, (5, 8, 5), "relu", "one expert: a dense MLP"),
    Case("plain", 8, 2, 3, (7, 12, 6), "gelu_tanh", "no biases", biases=False),
    Case("dropped", 11, 2, 3, (8, 12, 8), "gelu", "pairs behind offsets[E] add 0 and have gradient 0", dropped=9),
    Case("all_dropped", 3, 2, 3, (4, 6, 4), "glu_silu", "no row at all, of three tokens", dropped=6),
    Case("no_tokens", 0, 2, 3, (4, 6, 5), "gelu", "an empty batch"),
    Case("wide", 50, 2, 3, (70, 136, 67), "gelu", "more than one panel of columns and tile of rows"),
    Case("least", 1, 1, 2, (1, 1, 1), "glu_relu", "all widths 1"),
    *(Case(name, 10, 2, 3, (9, 18, 10), name, "each activation") for name in ACTIVATIONS),
)


class Inputs(NamedTuple):
    x: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    weights: Tensor
    indices: Tensor  # [N, k], E for a dropped pair
    d_y: Tensor

    def to(self, place: torch.device | torch.dtype | str) -> Inputs:
        """On another device, or in another dtype; ``weights`` in the sum's."""
        moved = [None if t is None else t if t is self.indices and not isinstance(place, str) else t.to(place)
                 for t in self]  # fmt: skip
        made = Inputs(*moved)
        return made._replace(
            weights=self.weights.to(torch.promote_types(made.x.dtype, torch.float32)).to(made.x.device)
        )


def inputs_of(case: Case, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random operands; of a 16-bit dtype, numbers that it holds."""
    channels, hidden, outputs = case.widths
    first = ACTIVATIONS[case.activation].inputs(hidden)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    used = case.experts if case.used is None else case.used
    indices = torch.stack(
        [torch.randperm(used, generator=generator)[: case.top_k] for _ in range(case.tokens)]
        or [torch.zeros(case.top_k, dtype=torch.int64)]
    )[: case.tokens]
    indices.view(-1)[indices.numel() - case.dropped :] = case.experts
    return Inputs(
        draw(case.tokens, channels),
        draw(case.experts, first, channels) / channels**0.5,
        draw(case.experts, first) if case.biases else None,
        draw(case.experts, outputs, hidden) / hidden**0.5,
        draw(case.experts, outputs) if case.biases else None,
        draw(case.tokens, case.top_k),
        indices,
        draw(case.tokens, outputs),
    ).to(dtype)


def route_of(indices: Tensor, experts: int) -> Route:
    """The route of indices of which E means: to no expert."""
    route = sort_by_expert(indices, experts + 1, "reference")
    return route._replace(offsets=route.offsets[:-1])


def run(inputs: Inputs, case: Case, impl: str, rows: int | None = None) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    *floats, indices, d_y = inputs
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in floats]
    x, weight1, bias1, weight2, bias2, weights = leaves
    route = route_of(indices, case.experts)
    y = expert_mlp(x, weight1, bias1, weight2, bias2, route, weights, case.activation, rows, impl)
    there = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, there, d_y))
    gradients = [None if t is None else next(found) for t in leaves]
    return {name: t for name, t in zip(NAMES, (y.detach(), *gradients), strict=True) if t is not None}


def oracle(inputs: Inputs, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same by a loop over experts of ``nn.Linear`` and slots, the layers computing in ``dtype``."""
    *floats, indices, d_y = (None if t is None else t.detach().cpu() for t in inputs)
    wide = torch.promote_types(dtype, torch.float32)
    x, weight1, bias1, weight2, bias2, weights = (None if t is None else t.to(dtype) for t in floats)
    weights = floats[-1].to(wide)
    experts = []
    for e in range(case.experts):
        layers = []
        for weight, bias in ((weight1[e], None if bias1 is None else bias1[e]),
                             (weight2[e], None if bias2 is None else bias2[e])):  # fmt: skip
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=dtype)
            layer.weight.data.copy_(weight)
            if bias is not None:
                layer.bias.data.copy_(bias)
            layers.append(layer)
        experts.append(layers)
    x.requires_grad_()
    weights.requires_grad_()
    activation = ACTIVATIONS[case.activation]
    y = torch.zeros(case.tokens, case.widths[2], dtype=wide)
    for e, (first, second) in enumerate(experts):
        for j in range(case.top_k):
            sent = (indices[:, j] == e).nonzero()[:, 0]
            z = first(x[sent])
            if activation.gated:
                a = FUNCTIONS[activation.function](z[:, : case.widths[1]]) * z[:, case.widths[1] :]
            else:
                a = FUNCTIONS[activation.function](z)
            y = y.index_add(0, sent, weights[sent, j : j + 1] * second(a))
    y = y.to(dtype)
    y.backward(d_y.to(dtype))
    parameters = [[getattr(layers[i], name) for layers in experts] for i in (0, 1) for name in ("weight", "bias")]
    leaves = [x, *parameters, weights]
    found = {"y": y.detach()}
    for name, leaf in zip(NAMES[1:], leaves, strict=True):
        each = leaf if isinstance(leaf, list) else [leaf]
        if each[0] is not None:
            gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in each]
            found[name] = torch.stack(gradients) if isinstance(leaf, list) else gradients[0]
    return found
