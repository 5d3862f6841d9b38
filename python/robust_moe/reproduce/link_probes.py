"""What runs with linked layers are asked: whether momentum and adaptive clustering change anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from robust_moe.data import Batch
from robust_moe.evaluation.routing_measures import expert_sets, layer_inputs
from robust_moe.reproduce.subject import Subject
from robust_moe.tokens import mean_of_tokens, of_images
from robust_moe_kernels.modules import AdaptiveClusteringGate, LinearGate, MoELayer, attack_mode, moe_layers

__all__ = ["linked"]


def linked(subject: Subject) -> dict[str, Any]:
    """On clean images, means over tokens and the layers that have a linked one before them; 0 where there is none.

    ``carried``: ‖mu o'‖ / (‖mu o'‖ + ‖gamma u‖), what momentum brings from the layer before, beside what the layer's
    experts give. ``rerouted``: share of tokens whose experts would be others had the gate read them as they are, not in
    the space of their cluster.
    """
    model, layers = subject.model, moe_layers(subject.model)
    run = subject.run("linked")

    def look(batch: Batch) -> dict[str, Tensor]:
        with _outputs(layers) as outputs, layer_inputs(layers) as inputs, torch.no_grad():
            logits = model(batch.images)
        nothing = logits.new_zeros(len(logits), dtype=torch.float64)
        carried, rerouted = [], []
        before: Tensor | None = None
        for name, layer in layers.items():
            if layer.momentum is not None:
                if before is not None:
                    brought = layer.momentum.mu * before
                    parts = [value.double().norm(dim=-1) for value in (brought, outputs[name] - brought)]
                    carried.append(mean_of_tokens(parts[0] / (parts[0] + parts[1]).clamp_min(1e-12)))
                before = outputs[name]
            if isinstance(layer.gate, AdaptiveClusteringGate) and layer.gate.clusters is not None:
                other = _rerouted(layer, layer.gate, inputs[name])
                rerouted.append(mean_of_tokens(of_images(other.double(), len(logits))))
        found = {"carried": carried, "rerouted": rerouted}
        return {name: torch.stack(values).mean(0) if values else nothing for name, values in found.items()}

    with attack_mode(model):
        found = run.over("linked", look)
    return {"images": len(run), **{name: values.mean().item() for name, values in found.items()}}


def _rerouted(layer: MoELayer, gate: AdaptiveClusteringGate, x: Tensor) -> Tensor:
    """Which rows [N] of the layer's last input would go to other experts by the plain linear gate."""
    record = layer.last_routing()
    with torch.no_grad():
        plain = LinearGate.forward(gate, x.flatten(0, -2))
    count = record.indices.shape[1]
    chosen = plain.sort(dim=1, descending=True, stable=True).indices[:, :count]
    sets = [expert_sets(indices, layer.num_experts) for indices in (chosen, record.indices)]
    return (sets[0] != sets[1]).any(1)


@contextmanager
def _outputs(layers: Mapping[str, MoELayer]) -> Iterator[dict[str, Tensor]]:
    """What each layer returns, by its name, in the last forward made inside; detached."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda module, args, out, name=name: outputs.update({name: out.detach()}))
        for name, layer in layers.items()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
