"""The attacks of the preset ``full``: those of ``standard``, and those that see what AutoAttack may not."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from robust_moe.attacks import PGD, JointPGD, Steering, TransferPGD
from robust_moe.attacks.routes import most_chosen
from robust_moe.evaluation.moe_stages import moe_arguments
from robust_moe.evaluation.outcome import ROUTES, Stage
from robust_moe.evaluation.stages import plan

__all__ = ["COST", "full_notes", "full_stages"]

COST = 1.5  # of an image that stays robust, in passes, over what the preset ``standard`` makes of it


def full_stages(model: nn.Module, attack: PGD.Config, seed: int) -> list[Stage]:
    """``attack``; the same PGD on the margin loss, unless ``attack`` has it; of a model with a gate that chooses, the
    attacks on its routes; AutoAttack standard.

    Each chain starts with all images that are right. The attacks on routes (joint, transfer, steering, the cheap ones
    first) are one chain, so that the dearest of them is given the images that the others left. Joint, transfer and the
    margin's PGD have the settings and the starts of ``attack``. Steering has those of its class with the margin loss,
    and tries as many experts of each layer as :data:`COST` leaves passes for, the gate's first choices, but at least
    one that the gate has not chosen.
    """
    first, *autoattack = plan(attack.name, attack.build(seed=seed), "standard", seed)
    more: list[Stage] = []
    if attack.loss != "margin":
        name = f"{attack.name}-margin"
        more.append(Stage(name, dataclasses.replace(attack, loss="margin").build(seed=seed), name))
    ball: dict[str, Any] = {"norm": attack.norm, "random_start": attack.random_start, "graph": attack.graph}

    def steering(routes: int | None) -> Steering:
        return Steering(float(attack.eps), seed=seed, loss="margin", routes=routes, **ball)

    def passes(stages: list[Stage]) -> int:
        return sum(sum(stage.attack.most_passes(model)) for stage in stages)

    if layers := steering(1).steered(model):
        arguments = {**moe_arguments(attack), "seed": seed}
        more += [Stage("joint", JointPGD(**arguments), ROUTES), Stage("transfer", TransferPGD(**arguments), ROUTES)]
        room = (COST - 1) * passes([first, *autoattack]) - passes(more)
        most = max(layer.num_experts for layer in layers)
        least = min(most, 1 + max(most_chosen(layer, training=False) for layer in layers))
        fits = (routes for routes in range(most, least, -1) if sum(steering(routes).most_passes(model)) <= room)
        routes = next(fits, least)
        # a number that follows from the model is no setting by which results of two models differ
        more.append(Stage("steering", steering(routes if routes < most else None), ROUTES))
    return [first, *more, *autoattack]


def full_notes(model: nn.Module, stages: list[Stage]) -> list[str]:
    """What the attacks of :func:`full_stages` leave out on this model, a sentence each."""
    attacks = [stage.attack for stage in stages if isinstance(stage.attack, Steering)]
    if not attacks:
        return ["no gate of the model has a choice: joint, transfer and steering, which would be PGD again, do not run"]
    (steering,) = attacks
    if steering.routes is None:
        return []
    most = max(layer.num_experts for layer in steering.steered(model))
    return [
        f"steering tries the gate's first {steering.routes} of up to {most} experts a layer: all would cost too much"
    ]
