"""Per-image routing metrics: change of routes, margin to a change, effect of a change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robust_moe.attacks.losses import cross_entropy
from robust_moe.evaluation.scorer import LayerRouting
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
    "disagreement",
    "distance",
    "expert_sets",
    "expert_use",
    "gradient_share",
    "quantiles",
    "routes",
    "routing_change",
    "top_k_margin",
]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_TINY = 1e-300  # keeps 0 / 0 at 0


def expert_sets(indices: Tensor, num_experts: int) -> Tensor:
    """Which experts each image is sent to, bool [n, E], from indices [n, k]."""
    return torch.zeros(len(indices), num_experts, dtype=torch.bool, device=indices.device).scatter_(1, indices, True)


def routes(layers: Mapping[str, MoELayer]) -> dict[str, Tensor]:
    """Of the last forward, for each layer: ``first/NAME``, int64 [B], the expert of the highest weight, and
    ``sets/NAME``, bool [B, E], all selected ones."""
    found = {}
    for name, layer in layers.items():
        indices = layer.last_routing().indices  # [B, k], highest weight first
        found[f"first/{name}"] = indices[:, 0]
        found[f"sets/{name}"] = expert_sets(indices, layer.num_experts)
    return found


def expert_use(sets: Tensor, first: Tensor) -> LayerRouting:
    """Where a layer sends n images, from their selected experts, bool [n, E], and first choices, int64 [n]. Reads the
    host once."""
    counts = torch.stack([sets.sum(0), expert_sets(first[:, None], sets.shape[1]).sum(0)])
    selected, best = (counts.double() / len(first)).tolist()
    return LayerRouting(selected=selected, first=best)


def by_class(sets: Tensor, labels: Tensor, classes: int) -> list[list[float]]:
    """For each class, the share of its images that each expert receives; zeros for a class without images.

    Args:
        sets: the selected experts, bool [n, E].
        labels: int64 [n], below ``classes``.
    """
    sums = sets.new_zeros(classes, sets.shape[1], dtype=torch.float64).index_add_(0, labels, sets.double())
    return (sums / labels.bincount(minlength=classes).clamp_min(1)[:, None]).tolist()


def routing_change(first: Tensor, second: Tensor) -> Tensor:
    """1 − |A ∩ B| / |A ∪ B| of the selected experts of each image, float64 [n], from bool [n, E] each
    (Puigcerver et al., 2022, arXiv:2210.10253)."""
    return 1 - (first & second).sum(1).double() / (first | second).sum(1)


def top_k_margin(logits: Tensor, top_k: int) -> Tensor | None:
    """The k-th highest gate logit less the next one, float64 [n], >= 0; ``None`` for k = E, where none follows."""
    if top_k == logits.shape[1]:
        return None
    top = logits.double().topk(top_k + 1, dim=1).values
    return top[:, top_k - 1] - top[:, top_k]


def distance(first: Tensor, second: Tensor, norm: str) -> Tensor:
    """Norm of each sample's difference, float64 [n]: ``"Linf"`` or ``"L2"``."""
    difference = (first.double() - second.double()).flatten(1)
    return difference.abs().amax(1) if norm == "Linf" else difference.norm(dim=1)


@torch.no_grad()
def disagreement(layer: MoELayer, x: Tensor, record: RoutingRecord) -> Tensor:
    """Spread of the experts' outputs, weighted by the gate, relative to their mean, float64 [B].

    sqrt(Σ_i s_i ‖e_i(x) − ē‖²) / ‖ē‖ with ē = Σ_i s_i e_i(x), s being the gate's scores over all E experts and x the
    layer's input [B, C, H, W]: 0 where experts are copies, so that no route matters. Runs every expert on every image.
    """
    total = spread = mean = torch.zeros((), dtype=torch.float64, device=x.device)
    for expert, weight in enumerate(record.scores.double().unbind(1)):  # West's one-pass weighted variance
        output = layer.experts.one(expert, x).flatten(1).double()
        total = total + weight
        moved = mean + (weight / total.clamp_min(_TINY))[:, None] * (output - mean)
        spread = spread + weight * ((output - mean) * (output - moved)).sum(1)
        mean = moved
    return spread.clamp_min(0).sqrt() / mean.norm(dim=1).clamp_min(_TINY)


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
