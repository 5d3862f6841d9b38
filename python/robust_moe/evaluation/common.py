"""Models compared by the worst case over the attacks that all of them were given, on the same images.

A worst case over more attacks is lower: results of several attacks beside results of one are no comparison of models.
Nor are results on other images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robust_moe.evaluation.outcome import AUTOATTACK
from robust_moe.evaluation.results import read_samples, wilson_interval

__all__ = [
    "checkpoint_name",
    "expect_common",
    "expect_comparable",
    "expect_same_images",
    "half_precision",
    "in_common",
    "run_name",
]

Rows = Sequence[tuple[str, Mapping[str, Any]]]


def checkpoint_name(file: Path) -> str:
    """What tables and figures call a checkpoint: the best one by its run folder, the last one by folder and name, any
    other by its own name."""
    folder = file.parent.name
    if file.stem not in ("best", "last") or not folder:
        return file.stem
    return folder if file.stem == "best" else f"{folder}/{file.stem}"


def run_name(results: Mapping[str, Any]) -> str:
    """:func:`checkpoint_name` of results; of a model that was given in Python, which has none, its class's name."""
    checkpoint = results.get("checkpoint")
    return checkpoint_name(Path(checkpoint)) if checkpoint else str(results["model"]["name"])


def half_precision(results: Mapping[str, Any]) -> str:
    """``"attacks in bfloat16"``, of results whose attacks computed so; ``""`` where they computed in float32, as those
    did that are too old to say. Every verdict is scored in float32."""
    kind = results.get("attack_dtype", "float32") if results["attacks"] else "float32"
    return "" if kind == "float32" else f"attacks in {kind}"


def in_common(rows: Rows, samples: Mapping[str, np.ndarray] | None = None) -> list[tuple[str, Mapping[str, Any]]]:
    """``rows`` with ``robust`` and ``robust_interval`` over the attacks that all of them have.

    Attacks count by chain: two results have a chain in common where it consists of the same attacks with the same
    settings, seeds apart. Results without an attack stay as they are and restrict nothing. Each attacked one gets
    ``common``, the names of the common attacks; ``own``, those it has besides; ``robust_own``, the worst case over all.

    A result whose attacks computed in half precision, as fast evaluations have them, says so in its name: they may be
    weaker than the same attacks in float32.

    Args:
        rows: (name, content of a result file). ``samples`` in the content may be the path of the arrays beside it.
        samples: the arrays of the first row; None: as of the others.

    Raises:
        ValueError: two results on other images, or without a common attack, with what to run; or a worst case over some
            of the attacks that the result does not hold, its arrays not being there.
    """
    expect_same_images(rows)
    shared = expect_common(rows)
    chosen = []
    for number, (name, results) in enumerate(rows):
        label = f"{name} ({half})" if (half := half_precision(results)) else name
        if results["robust"] is None:
            chosen.append((name, results))
            continue
        robust = _worst_case(name, results, shared, samples if number == 0 else None)
        same = robust == results["robust"]
        interval = results["robust_interval"] if same else list(wilson_interval(robust, results["count"]))
        parted: dict[bool, list[str]] = {True: [], False: []}
        for attack in results["attacks"]:
            parted[attack["chain"] in shared].append(attack["name"])
        own = {"common": parted[True], "own": parted[False], "robust_own": results["robust"]}
        chosen.append((label, {**results, "robust": robust, "robust_interval": interval, **own}))
    return chosen


def expect_common(rows: Rows) -> list[str]:
    """The chains that all attacked ``rows`` have, in order; raises as :func:`in_common` without one."""
    attacked = [(name, _chains(results)) for name, results in rows if results["attacks"]]
    if not attacked:
        return []
    (first, chains), *others = attacked
    shared = [chain for chain in chains if all(chains[chain] == other.get(chain) for _, other in others)]
    for name, other in others:
        if not shared and not any(chains[chain] == other.get(chain) for chain in chains):
            raise ValueError(
                f"{name}: expected an attack in common with {first} ({', '.join(chains)}), got {', '.join(other)}, "
                "or the same with other settings; run robust-moe eval on both with the same --preset and eval.attack "
                "settings"
            )
    if not shared:
        raise ValueError(
            f"{', '.join(name for name, _ in attacked)}: expected an attack that all have in common, got none; run "
            "robust-moe eval on all of them with the same --preset and eval.attack settings"
        )
    return shared


def expect_comparable(planned: Mapping[str, Any], others: Rows) -> None:
    """Refuse results that could not be shown beside those of an evaluation that is about to start.

    Args:
        planned: of its results ``count``, ``data`` and ``attacks``.
        others: (name, content of a result file).

    Raises:
        ValueError: as :func:`in_common` would after the evaluation.
    """
    rows = [("this evaluation", planned), *others]
    expect_same_images(rows)
    shared = expect_common(rows)
    for name, results in others:
        if results["robust"] is not None:
            _worst_case(name, results, shared, None)


def expect_same_images(rows: Rows) -> None:
    """Refuse rows whose images and labels differ: in SHA-256, or in number where one does not say that.

    Raises:
        ValueError: the first two that differ, with what to run.
    """
    for number, (name, results) in enumerate(rows):
        for other, against in rows[:number]:
            counts, data = (results.get("count"), against.get("count")), (_data(results), _data(against))
            same = counts[0] == counts[1] if None in data else data[0] == data[1]
            if not same:
                got, expected = (
                    f"{count} images" + (f" of SHA-256 {sha[:12]}" if sha else "")
                    for count, sha in zip(counts, data, strict=True)
                )
                raise ValueError(
                    f"{name}: expected results on the images and labels of {other} ({expected}), got {got}; run "
                    "robust-moe eval on both with the same data settings, --split and --n"
                )


def _data(results: Mapping[str, Any]) -> str | None:
    return results.get("data", {}).get("sha256")


def _chains(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """By chain, what decides its attacks: names and settings, the seed of the random start apart."""
    chains: dict[str, list[str]] = {}
    for attack in results["attacks"]:
        settings = {key: value for key, value in attack["settings"].items() if key != "seed"}
        chains.setdefault(attack["chain"], []).append(json.dumps([attack["name"], settings], sort_keys=True))
    return chains


def _worst_case(
    name: str, results: Mapping[str, Any], shared: Sequence[str], samples: Mapping[str, np.ndarray] | None
) -> float:
    """Share of the images that are right clean and after every attack of the chains ``shared``."""
    attacks = results["attacks"]
    inside = [attack["chain"] in shared for attack in attacks]
    if all(inside):
        return results["robust"]
    count = sum(inside)
    if count == 1 and (alone := attacks[inside.index(True)]["alone"]) is not None:
        return alone
    if list(shared) == [AUTOATTACK] and results.get(AUTOATTACK) is not None:
        return results[AUTOATTACK]
    if all(inside[:count]):  # the first that ran
        return attacks[count - 1]["robust_after"]
    names = [attack["name"] for attack, common in zip(attacks, inside, strict=True) if common]
    needed = ["clean", *(f"broken/{attack}" for attack in names)]
    path = Path(str(results.get("samples")))
    if samples is None and path.is_file():
        samples = read_samples(path, needed)
    if samples is None or any(key not in samples for key in needed):
        raise ValueError(
            f"{name}: expected the arrays {', '.join(needed)} beside its result file, as it has attacks that others "
            f"have not, got none of that kind at {path}; run robust-moe eval on it again"
        )
    for key in needed:
        if samples[key].dtype != bool or samples[key].shape != (results["count"],):
            got = f"{samples[key].dtype} {list(samples[key].shape)}"
            raise ValueError(f"{name}: expected {key} of bool [{results['count']}] in {path}, got {got}")
    broken = [samples[key] for key in needed[1:]]
    return float((samples["clean"] & ~np.any(broken, axis=0)).mean())
