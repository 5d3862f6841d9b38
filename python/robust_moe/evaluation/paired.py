"""Which of two attacks is stronger, on the images that both were given, and what that says about a model."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from robust_moe.attacks import PGD
from robust_moe.evaluation.outcome import AUTOATTACK, ROUTES, Flag, StageResult
from robust_moe.evaluation.stages import describe_attack

__all__ = ["ce_weak", "mcnemar", "route_hides_gradients"]

LEVEL = 0.01  # probability with which a flag is raised where the two attacks are equally strong


def mcnemar(more: int, fewer: int) -> float:
    """One-sided exact test of McNemar (1947): the probability that of ``more + fewer`` images, each broken by one of
    two attacks only, ``more`` or more are the first one's, where both attacks are equally strong."""
    count = more + fewer
    return sum(comb(count, first) for first in range(more, count + 1)) / 2**count


def route_hides_gradients(stages: Sequence[StageResult]) -> Flag:
    """The attacks on routes break more than AutoAttack does.

    Compared are the two chains, each of which was given all images that are right when clean. What the attacks on
    routes break of the images that AutoAttack left counts for the flag, and what AutoAttack broke and they did not
    counts against it: so neither the luck of a start nor one attack more makes a flag. It stays down where both find
    much that the other does not.
    """
    name = "route_hides_gradients"
    routes, auto = ([each for each in stages if each.stage.chain == chain] for chain in (ROUTES, AUTOATTACK))
    if not routes or not auto:
        return Flag(name, False, "not measured: no attacks on the routes beside AutoAttack", None)
    both = routes[0].attacked & auto[0].attacked
    by_auto, by_routes = (np.any([each.broken for each in chain], axis=0) & both for chain in (auto, routes))
    found = ", ".join(f"{each.stage.name} {int((each.broken & both & ~by_auto).sum())}" for each in routes)
    more, fewer = int((by_routes & ~by_auto).sum()), int((by_auto & ~by_routes).sum())
    text = (
        f"attacks on the routes broke {more} of the {int((both & ~by_auto).sum())} images that AutoAttack left "
        f"({found}), and missed {fewer} of the {int(by_auto.sum())} that it broke"
    )
    meaning = "the choice of experts hides gradients from AutoAttack, whose number is too high"
    return _stronger(name, text, meaning, more, fewer)


def ce_weak(stages: Sequence[StageResult]) -> Flag:
    """PGD on the margin loss breaks more than the same PGD on the cross-entropy."""
    name = "ce_is_weak"
    plain = [each for each in stages if type(each.stage.attack) is PGD and each.stage.chain == each.stage.name]
    for margin in (each for each in plain if _loss(each) == "margin"):
        for entropy in (each for each in plain if _loss(each) == "ce" and _rest(each) == _rest(margin)):
            both = margin.attacked & entropy.attacked
            more = int((both & margin.broken & ~entropy.broken).sum())
            fewer = int((both & entropy.broken & ~margin.broken).sum())
            text = (
                f"of {int(both.sum())} images PGD on the margin broke {more} that PGD on the cross-entropy left, and "
                f"left {fewer} that it broke"
            )
            return _stronger(name, text, "judge this model by eval.attack.loss=margin", more, fewer)
    return Flag(name, False, "not measured: no PGD on the cross-entropy and the same on the margin", None)


def _loss(result: StageResult) -> object:
    return describe_attack(result.stage.attack)["loss"]


def _rest(result: StageResult) -> dict[str, object]:
    settings = describe_attack(result.stage.attack)
    return {key: value for key, value in settings.items() if key not in ("loss", "seed")}


def _stronger(name: str, text: str, meaning: str, more: int, fewer: int) -> Flag:
    """The flag whose value is the test's probability."""
    chance = mcnemar(more, fewer)
    raised = chance <= LEVEL
    text += f" (chance of that between equals: {chance:.2g}, exact McNemar test)"
    return Flag(name, raised, f"{text}: {meaning}" if raised else text, chance)
