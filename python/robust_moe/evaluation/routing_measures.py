"""Routing metrics of each image, or of each of its tokens: change of routes, margin to a change, effect of a change.

Of a layer that routes images the values of n images are [n, ...]; of one that routes T tokens of each, [n, T, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robust_moe.attacks.losses import cross_entropy
from robust_moe.evaluation.scorer import LayerRouting
from robust_moe.tokens import mean_of_tokens, of_images
from robust_moe_kernels.modules import (
    MoELayer,
    Reroute,
    RoutingRecord,
    SoftGradient,
    attack_mode,
    last_routes,
    rerouted,
)

__all__ = [
    "by_class",
    "by_sample",
    "change_numbers",
    "disagreement",
    "distance",
    "expert_sets",
    "expert_use",
    "flipped",
    "gradient_share",
    "layer_inputs",
    "quantiles",
    "routes",
    "routing_change",
    "top_k_margin",
]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_TINY = 1e-300  # keeps 0 / 0 at 0


def expert_sets(indices: Tensor, num_experts: int) -> Tensor:
    """Which experts each row is sent to, bool [N, E], from indices [N, k]; one of E: to none."""
    sets = torch.zeros(len(indices), num_experts + 1, dtype=torch.bool, device=indices.device)
    return sets.scatter_(1, indices, True)[:, :num_experts]


def routes(layers: Mapping[str, MoELayer]) -> dict[str, Tensor]:
    """Of the last forward, for each layer: ``first/NAME``, int64 [B] or of tokens [B, T], the expert of the highest
    weight, E where none computes the row; and ``sets/NAME``, bool [B, E] or [B, T, E], all selected ones. An expert
    without room for a token is not selected."""
    found = {}
    for name, layer in layers.items():
        record, experts = layer.last_routing(), layer.num_experts
        indices = record.indices  # [N, k], highest weight first
        first = indices[:, 0]
        if record.dropped is not None:
            indices = indices.masked_fill(record.dropped, experts)
            place = (indices < experts).int().argmax(1, keepdim=True)  # the first that is computed
            first = indices.gather(1, place)[:, 0]
        found[f"first/{name}"] = by_sample(first, record)
        found[f"sets/{name}"] = by_sample(expert_sets(indices, experts), record)
    return found


@contextmanager
def layer_inputs(layers: Mapping[str, MoELayer]) -> Iterator[dict[str, Tensor]]:
    """What comes to each layer, by its name, in the last forward made inside; detached."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def by_sample(rows: Tensor, record: RoutingRecord) -> Tensor:
    """What is known of each row of a record, [N, ...], as [B, ...], or of tokens as [B, T, ...]."""
    return rows if len(record.shape) == 1 else of_images(rows, record.shape[0])


def expert_use(sets: Tensor, first: Tensor) -> LayerRouting:
    """Where a layer sends n images, or their tokens, from their selected experts, bool [n, E] or [n, T, E], and first
    choices, int64 [n] or [n, T]. Reads the host once."""
    experts = sets.shape[-1]
    counts = torch.stack([sets.flatten(0, -2).sum(0), expert_sets(first.flatten()[:, None], experts).sum(0)])
    selected, chosen = (counts.double() / first.numel()).tolist()
    return LayerRouting(selected=selected, first=chosen)


def by_class(sets: Tensor, labels: Tensor, classes: int) -> list[list[float]]:
    """For each class, the share of its images, or of their tokens, that each expert receives; zeros for a class without
    images.

    Args:
        sets: the selected experts, bool [n, E] or [n, T, E].
        labels: int64 [n], below ``classes``.
    """
    received = sets.double() if sets.dim() == 2 else sets.double().mean(1)
    sums = received.new_zeros(classes, sets.shape[-1]).index_add_(0, labels, received)
    return (sums / labels.bincount(minlength=classes).clamp_min(1)[:, None]).tolist()


def routing_change(first: Tensor, second: Tensor) -> Tensor:
    """1 − |A ∩ B| / |A ∪ B| of the selected experts, float64 [n] from bool [n, E] each, or of tokens [n, T] from
    [n, T, E] (Puigcerver et al., 2022, arXiv:2210.10253; the authors' code averages it over tokens and images). A token
    without an expert on either side has not changed: 0, where that code counts 1."""
    union = (first | second).sum(-1)
    return torch.where(union > 0, 1 - (first & second).sum(-1).double() / union.clamp_min(1), 0.0)


def change_numbers(first: Tensor, second: Tensor) -> dict[str, float]:
    """``routing_change``: the mean of :func:`routing_change`; ``route_flips``: share of the images whose selected
    experts changed, of a layer that routes tokens those of any token; and then ``token_flips``: share of tokens."""
    change = routing_change(first, second)
    numbers = {"routing_change": change.mean().item(), "route_flips": flipped(first, second).double().mean().item()}
    return numbers | ({"token_flips": (change > 0).double().mean().item()} if change.dim() == 2 else {})


def flipped(first: Tensor, second: Tensor) -> Tensor:
    """Whether the selected experts of an image changed, or of any of its tokens, bool [n]; arguments as
    :func:`routing_change`."""
    changed = (first != second).any(-1)
    return changed if changed.dim() == 1 else changed.any(1)


def top_k_margin(logits: Tensor, top_k: int) -> Tensor | None:
    """The k-th highest gate logit less the next one, float64 [N], >= 0, from logits [N, E], or of n images' tokens
    [n, T, E] with N = n T. ``None`` for k = E, where none follows."""
    if top_k == logits.shape[-1]:
        return None
    top = logits.flatten(0, -2).double().topk(top_k + 1, dim=1).values
    return top[:, top_k - 1] - top[:, top_k]


def distance(first: Tensor, second: Tensor, norm: str) -> Tensor:
    """Norm of each sample's difference, float64 [n]: ``"Linf"`` or ``"L2"``."""
    difference = (first.double() - second.double()).flatten(1)
    return difference.abs().amax(1) if norm == "Linf" else difference.norm(dim=1)


@torch.no_grad()
def disagreement(layer: MoELayer, x: Tensor, record: RoutingRecord, top: int | None = None) -> Tensor:
    """Spread of the experts' outputs, weighted by the gate, relative to their mean, float64 [B]; of a layer that routes
    tokens the mean over an image's tokens.

    sqrt(Σ_i s_i ‖e_i(x) − ē‖²) / ‖ē‖ with ē = Σ_i s_i e_i(x), s being the gate's scores over all E experts, or over the
    ``top`` first of each row, divided by their sum: 0 where experts are copies, so that no route matters.

    Args:
        x: the layer's input, [B, C, H, W], or of tokens [B, T, C]; every expert runs on all of it.
        record: of a forward of ``x``.
        top: >= 1; None: all experts.
    """
    scores = record.scores.double()
    if top is not None:
        best = record.logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
        scores = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
    rows = x if len(record.shape) == 1 else x.flatten(0, len(record.shape) - 1)
    total = spread = mean = torch.zeros((), dtype=torch.float64, device=x.device)
    for expert, weight in enumerate(scores.unbind(1)):  # West's one-pass weighted variance
        output = layer.experts.one(expert, rows).flatten(1).double()
        total = total + weight
        moved = mean + (weight / total.clamp_min(_TINY))[:, None] * (output - mean)
        spread = spread + weight * ((output - mean) * (output - moved)).sum(1)
        mean = moved
    found = (spread / total).clamp_min(0).sqrt() / mean.norm(dim=1).clamp_min(_TINY)
    return found if len(record.shape) == 1 else mean_of_tokens(of_images(found, record.shape[0]))


def gradient_share(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Share of a layer's routing in the gradient of the loss to the image, float64 [B] in [0, 1].

    Of the two terms of a mixture's Jacobian, Σ_i s_i ∇e_i and Σ_i (e_i − ē) ∇s_i, the second is the experts'
    disagreement times the gate's sensitivity. Here both as the gradient of the cross-entropy: with the routes held
    (g_e), and what the soft gradient of this layer's gate adds (g_r): ‖g_r‖ / (‖g_r‖ + ‖g_e‖), 0 where both are 0.
    Two forwards and backwards in float32, after a forward of ``x`` itself.
    """
    held = last_routes(model)
    softened: dict[str, Reroute] = {**held, name: SoftGradient()}
    gradients = []
    with torch.autocast(x.device.type, enabled=False), attack_mode(model):
        for routes in (held, softened):
            at = x.detach().clone().requires_grad_()
            with rerouted(model, routes):
                (gradient,) = torch.autograd.grad(cross_entropy(model(at), y).sum(), at)
            gradients.append(gradient.double().flatten(1))
    experts, routing = gradients[0].norm(dim=1), (gradients[1] - gradients[0]).norm(dim=1)
    return routing / (routing + experts).clamp_min(_TINY)


def quantiles(values: Tensor) -> dict[str, float | dict[str, float]]:
    """Mean, maximum and quantiles of numbers [n], as plain types."""
    values = values.double()
    levels = torch.quantile(values, values.new_tensor(QUANTILES)).tolist()
    return {
        "mean": values.mean().item(),
        "max": values.max().item(),
        "quantiles": {f"{level:g}": value for level, value in zip(QUANTILES, levels, strict=True)},
    }
