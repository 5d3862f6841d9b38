"""Experts dropped one after the other: accuracy, worst case under attacks, and backdoor of what is left.

Expert pruning of vision MoE as compression: Chowdhury et al. (ICML 2024, arXiv:2405.16646); as a defence against
backdoors pruning is reported to fail without fine-tuning (arXiv:2505.01811, of neurons). Here the scores that decide
which experts stay are the caller's: share of routed images, or what each expert alone does with a trigger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.attacks import Attack
from robust_moe.data import Batch, PoisonConfig, triggered
from robust_moe.evaluation.backdoor import not_of_target
from robust_moe.evaluation.staged import StagedEvaluation, share
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import attack_mode, moe_layers, prune_experts

__all__ = ["keep_highest", "pruning_curve"]


def keep_highest(scores: Mapping[str, Sequence[float]], count: int) -> dict[str, list[int]]:
    """The ``count`` experts of the highest scores of each layer, ascending, as ``keep`` of
    :func:`~robust_moe_kernels.modules.prune_experts`; all of a layer that has no more. Of equal scores the lowest index
    is kept.

    Args:
        scores: by layer, one number per expert: ``selected`` of
            :func:`~robust_moe.evaluation.routing_shares` keeps the most used, the negative ``asr`` of
            :func:`~robust_moe.evaluation.backdoor_report`'s single experts those that a trigger fools least.
        count: >= 1.

    Raises:
        ValueError: a count below 1; a score that is NaN or infinite.
    """
    expect(count >= 1, "count", "at least one expert", count)
    for name, layer in scores.items():
        expect(all(map(math.isfinite, layer)), f"scores of layer {name!r}", "finite numbers", list(layer))
    ranked = {name: sorted(range(len(layer)), key=lambda e: (-layer[e], e)) for name, layer in scores.items()}
    return {name: sorted(experts[:count]) for name, experts in ranked.items()}


def pruning_curve(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    scores: Mapping[str, Sequence[float]],
    *,
    attacks: Mapping[str, Attack] | None = None,
    poison: PoisonConfig | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The model with all experts, with those of the highest scores but one, and so on to a single one per layer.

    Choose ``scores`` on other images than these: on the same ones the numbers of the smaller models are optimistic.

    Args:
        model: with MoE layers; not changed.
        images: uint8 or float32 [n, C, H, W].
        labels: int64 [n].
        scores: by layer, one number per expert; see :func:`keep_highest`. Other layers keep all experts.
        attacks: by name, each on the pruned model itself. The worst case is the share of images that are right clean
            and under all of them.
        poison: a trigger and target; None: no attack success rate.
        batch_size, seed: of the evaluation.

    Returns:
        One entry per number of experts, falling: ``keep`` (experts by layer), ``parameters`` (their number in the whole
        model), ``clean``, ``robust`` (by attack), ``worst`` (null without attacks), and with ``poison`` ``asr`` and
        ``target_rate``, of the images of other classes than the target with and without the trigger.

    Raises:
        ValueError: scores of another number than the layer's experts; what :func:`keep_highest` and
            :func:`prune_experts` refuse; a bad input; with ``poison`` a target that the model does not have, or no
            image of another class.
        FloatingPointError: a logit or an attack's gradient is NaN or infinite.
    """
    layers = moe_layers(model)
    for name, values in scores.items():
        expect(name in layers, "scores", f"names of layers ({', '.join(map(repr, layers))})", repr(name))
        count = layers[name].num_experts
        expect(len(values) == count, f"scores of layer {name!r}", f"{count} numbers, one per expert", len(values))
    most = max((len(values) for values in scores.values()), default=0)
    expect(most > 0, "scores", "at least one layer", "none")
    curve = []
    for count in range(most, 0, -1):
        keep = keep_highest(scores, count)
        pruned = prune_experts(model, keep)
        with attack_mode(pruned):
            run = StagedEvaluation(pruned, images, labels, batch_size=batch_size, seed=seed)
            classes = run.classes()
            others = None if poison is None else not_of_target(run.labels.cpu(), classes, poison)
            found = run.over("pruned", partial(_look, run, attacks=attacks or {}, poison=poison))
        parameters = sum(parameter.numel() for parameter in pruned.parameters())
        curve.append({"keep": keep, "parameters": parameters, **_numbers(found, others)})
    return curve


def _look(
    run: StagedEvaluation, batch: Batch, attacks: Mapping[str, Attack], poison: PoisonConfig | None
) -> dict[str, Tensor]:
    """Of each image: whether it is right, and robust by attack; with poison whether it is taken for the target, without
    and with the trigger."""
    before = run.logits(batch.images).argmax(1)
    found = {"clean": before == batch.labels}
    for name, attack in attacks.items():
        found[f"robust/{name}"] = found["clean"] & run.right(run.craft(attack, batch), batch.labels)
    if poison is not None:
        found["target_rate"] = before == poison.target
        found["asr"] = run.logits(triggered(batch.images, poison)).argmax(1) == poison.target
    return found


def _numbers(found: dict[str, Tensor], others: Tensor | None) -> dict[str, Any]:
    """Shares of what was found; others: bool [n], images not of the target class."""
    robust = {key.removeprefix("robust/"): mask for key, mask in found.items() if key.startswith("robust/")}
    worst = torch.stack(list(robust.values())).all(0) if robust else None
    numbers: dict[str, Any] = {
        "clean": share(found["clean"]),
        "robust": {name: share(mask) for name, mask in robust.items()},
        "worst": None if worst is None else share(worst),
    }
    if others is not None:
        numbers |= {key: share(found[key][others]) for key in ("asr", "target_rate")}
    return numbers
