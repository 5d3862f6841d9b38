"""The specification of the routed MLP: PyTorch's own linear layers, one expert's rows at a time.

Tokens are [N, C], rows [R, ...] sorted by expert with R = N*k; ``order`` [R] names each row's pair n*k + j, ``inverse``
[R] each pair's row. All is computed in float32 (float64 for float64), the pre-activations z and results rounded once.
Reads the segments' sizes on the host. Autocast changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from robust_moe_kernels.ops.expert_mlp.activation import Activation, activate, elementwise

__all__ = ["backward", "forward", "why_not", "why_not_case"]


def why_not(device_type: str) -> str | None:
    return None


def why_not_case(*operands: Tensor) -> str | None:
    return None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _row(table: Tensor | None, expert: int) -> Tensor | None:
    return None if table is None else _wide(table[expert])


def _derivative(name: str, z: Tensor) -> Tensor:
    if name == "gelu":
        return 0.5 * torch.erfc(-z * math.sqrt(0.5)) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        scale, cube = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(scale * (z + cube * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * cube * z * z)
    if name == "relu":
        return (z > 0).to(z.dtype)
    s = torch.sigmoid(z)
    slope = s * torch.sigmoid(-z)
    return s + z * slope if name == "silu" else slope


def _activate_backward(d_a: Tensor, z: Tensor, activation: Activation) -> Tensor:
    if not activation.gated:
        return d_a * _derivative(activation.function, z)
    gate, value = z.chunk(2, dim=1)
    d_gate = d_a * value * _derivative(activation.function, gate)
    return torch.cat([d_gate, d_a * elementwise(activation.function, gate)], dim=1)


def _segments(order: Tensor, offsets: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """(expert, its rows, their pairs)."""
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        yield expert, slice(begin, end), order[begin:end]


def _sum_slots(rows: Tensor, inverse: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """Sums [N, ...] over each token's slots, in order, of the rows that there are; ``inverse`` may name others."""
    slots = inverse.view(-1, top_k)
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    total = rows.new_zeros(slots.shape[0], rows.shape[1])
    for j in range(top_k):
        kept = (slots[:, j] < rows.shape[0]).unsqueeze(1)
        term = padded.index_select(0, slots[:, j].clamp(max=rows.shape[0]))
        if weights is not None:
            term = weights[:, j : j + 1] * term
        term = torch.where(kept, term, 0.0)
        total = term if j == 0 else total + term
    return total


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, rows: int, activation: Activation,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    top_k, zs, outputs = weights.shape[1], [], []
    with torch.autocast(x.device.type, enabled=False):
        for expert, _, pairs in _segments(order, offsets):
            taken = _wide(x.index_select(0, pairs // top_k))
            z = F.linear(taken, _wide(weight1[expert]), _row(bias1, expert)).to(x.dtype)
            a = activate(_wide(z), activation)
            zs.append(z)
            outputs.append(F.linear(a, _wide(weight2[expert]), _row(bias2, expert)))
        computed = sum(z.shape[0] for z in zs)
        y = _sum_slots(torch.cat(outputs), inverse, weights, top_k).to(x.dtype)
        return y, torch.cat([*zs, x.new_zeros(rows - computed, weight1.shape[1])])


def backward(
    d_y: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, activation: Activation, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """With g = d_y of a row's token, w its weight and u = g W2: d_z = w * u * act'(z), d_w = u . a + g . b2."""
    top_k = weights.shape[1]
    d_weight1, d_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
    d_bias1, d_bias2 = weight1.new_zeros(weight1.shape[:2]), weight2.new_zeros(weight2.shape[:2])
    d_weights, d_rows = torch.zeros_like(weights), []
    with torch.autocast(x.device.type, enabled=False):
        for expert, part, pairs in _segments(order, offsets):
            g, taken = (_wide(tokens.index_select(0, pairs // top_k)) for tokens in (d_y, x))
            w = weights.view(-1).index_select(0, pairs).unsqueeze(1)
            pre = _wide(z[part])
            a, u = activate(pre, activation), g @ _wide(weight2[expert])
            d_z = _activate_backward(w * u, pre, activation)
            offset = _row(bias2, expert)
            d_weights.view(-1)[pairs] = (u * a).sum(1) + (0.0 if offset is None else g @ offset)
            d_rows.append(d_z @ _wide(weight1[expert]))
            d_weight1[expert], d_bias1[expert] = d_z.t() @ taken, d_z.sum(0)
            d_weight2[expert], d_bias2[expert] = (w * g).t() @ a, (w * g).sum(0)
        d_x = _sum_slots(torch.cat(d_rows), inverse, None, top_k).to(x.dtype)
    found = (d_x, d_weight1, d_bias1, d_weight2, d_bias2, d_weights)
    return tuple(gradient if wanted else None for gradient, wanted in zip(found, needs, strict=True))
