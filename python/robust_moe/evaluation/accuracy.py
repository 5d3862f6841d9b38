"""Clean and robust accuracy and routing, without waiting for the device: what validation measures while training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack
from robust_moe.data import Batch, ImageSet
from robust_moe.evaluation.routing_measures import expert_use, routes
from robust_moe.evaluation.scorer import LayerRouting, score
from robust_moe.evaluation.shards import ONE, Shards
from robust_moe.evaluation.staged import StagedEvaluation, Task, share
from robust_moe_kernels.modules import moe_layers

__all__ = ["EvalResult", "accuracy", "routing_shares", "used_experts"]

EXAMPLES = 4  # images that a result keeps, to be looked at


@dataclass(frozen=True, eq=False)
class EvalResult:
    """Accuracies over all N images, as shares in [0, 1]."""

    count: int  # N
    clean: float  # share correct on the clean image
    robust: float | None  # share correct on the clean and on the adversarial image, of all N; None: no attack
    clean_mask: Tensor  # bool [N], in the order of the image set
    robust_mask: Tensor | None  # bool [N]
    routing: dict[str, LayerRouting] = field(default_factory=dict)  # by layer name, on the clean images
    seconds: float = 0.0  # wall clock
    examples: Tensor | None = None  # [2, K, C, H, W]: the first K images, clean and attacked; None: no attack


def accuracy(
    model: nn.Module,
    images: ImageSet,
    attack: Attack | None = None,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    on_batch: Callable[[int], None] | None = None,
    shards: Shards = ONE,
) -> EvalResult:
    """Clean and robust accuracy of ``model`` over every image of ``images``.

    An image counts as robust when both it and its adversarial version are classified right: it lies in the ball itself,
    so this is the worst of the points tried. The share is over all N images. The host reads the device at the end only,
    as far as the attack lets it.

    Args:
        model: maps [B, C, H, W] in [0, 1] to logits; left exactly as found.
        images: N images; the position in it is the counter of the attack's random start.
        attack: None: clean accuracy only.
        batch_size: images a forward; changes nothing but speed (up to the rounding of the model's own kernels).
        device: where the images go; None: where the model's parameters are.
        on_batch: called after each batch with the number of its images.
        shards: processes that share the batches; each gets the whole result.

    Raises:
        ValueError: ``images`` is empty.
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
    """
    if len(images) == 0:
        raise ValueError("images: expected at least one image to evaluate on, got an empty set")
    began = time.perf_counter()
    how: dict[str, Any] = {"batch_size": batch_size, "device": device, "task": _task(on_batch), "shards": shards}
    run = StagedEvaluation(model, images.images, images.labels, **how, waits=False)
    layers = moe_layers(model)

    examples: list[Tensor] = []

    def look(batch: Batch) -> dict[str, Tensor]:
        found = {"clean": run.right(batch.images, batch.labels), **routes(layers)}
        if attack is not None:
            attacked = run.craft(attack, batch)
            if not examples:  # a copy: an attack may craft the next batch in the same memory
                examples.append(torch.stack((batch.images[:EXAMPLES], attacked[:EXAMPLES])))
            found["robust"] = found["clean"] & run.right(attacked, batch.labels)
        return found

    found = run.over("accuracy", look)
    clean = found["clean"].cpu()
    robust = found["robust"].cpu() if attack is not None else None
    shown = shards.first(lambda: examples[0].cpu() if examples else None)  # the first process has the first batch
    return EvalResult(
        count=len(images),
        clean=share(clean),
        robust=None if robust is None else share(robust),
        clean_mask=clean,
        robust_mask=robust,
        routing=used_experts(found, layers),
        seconds=time.perf_counter() - began,
        examples=shown,
    )


def routing_shares(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    on_batch: Callable[[int], None] | None = None,
    shards: Shards = ONE,
) -> dict[str, LayerRouting]:
    """Where each MoE layer sends the clean ``images``; empty for a dense model (which is then not run). ``on_batch``
    and ``shards``: as for :func:`accuracy`."""
    layers = moe_layers(model)
    if not layers or len(images) == 0:
        return {}
    how: dict[str, Any] = {"batch_size": batch_size, "device": device, "task": _task(on_batch), "shards": shards}
    run = StagedEvaluation(model, images.images, images.labels, **how, waits=False)

    def look(batch: Batch) -> dict[str, Tensor]:
        score(model, batch.images)  # whatever the logits are
        return routes(layers)

    return used_experts(run.over("routing", look), layers)


def _task(on_batch: Callable[[int], None] | None) -> Task | None:
    return None if on_batch is None else lambda *_: nullcontext(lambda advance=1, note=None: on_batch(advance))


def used_experts(found: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, LayerRouting]:
    """By layer, where n images went, from what :func:`~robust_moe.evaluation.routing_measures.routes` found."""
    return {name: expert_use(found[f"sets/{name}"], found[f"first/{name}"]) for name in layers}
