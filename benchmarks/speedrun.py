"""What each ingredient of the robust speed-run is worth at small scale: the recipe without it, at equal cost.

    python -m benchmarks speedrun --data FOLDER --work FOLDER --out benchmarks/results/cpu

Trains the small twin of the preset speedrun-cifar10-r18 and its arms (speedrun_recipe.py) on CIFAR-10 as
Parquet files, every arm for the same number of forward and backward passes, and compares robust accuracies seed by
seed. A run takes one core some two minutes, and its numbers are on the disk when it ends: a killed ablation loses at
most what its present runs have not saved, and the same command goes on. CPU seconds are recorded, for information.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from benchmarks.speedrun_recipe import ARMS, FULL, RECIPE
from benchmarks.speedrun_runs import AUTOATTACK, Run, run_once
from robust_moe.benchmarks.records import expect_records, folder_option, write_record
from robust_moe.config import ConfigError
from robust_moe.data import DataError
from robust_moe.outputs import expect_outputs
from robust_moe.provenance import provenance

__all__ = ["RULE", "compare", "main"]

MEASURES = ("clean", "pgd20", "autoattack")
CONFIDENCE = 0.95
ENOUGH = 3  # seeds for a verdict
RULE = (
    "The recipe minus the arm, seed by seed (same split, same initial weights, same test images); mean and Student's "
    "95 % interval of these differences. Helps: the whole interval is above zero; hurts: below; undecided: otherwise, "
    "and with fewer than three seeds. Each comparison has its own 5 % chance of an error; seven of them, 30 %."
)


def compare(full: Sequence[float], without: Sequence[float]) -> dict[str, Any]:
    """Mean paired difference ``full - without``, its interval and the verdict (:data:`RULE`); pairs are seeds."""
    differences = [one - two for one, two in zip(full, without, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    low, high = -math.inf, math.inf
    if n > 1:
        half = student.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
        low, high = mean - half, mean + half
    verdict = "undecided"
    if n >= ENOUGH and low > 0:
        verdict = "helps"
    elif n >= ENOUGH and high < 0:
        verdict = "hurts"
    interval = None if n < 2 else [low, high]
    return {"difference": mean, "interval": interval, "differences": differences, "verdict": verdict}


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per arm: mean and standard deviation of every measure over its seeds, cost, and the comparison with the recipe
    over the seeds that both have."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    arms = {}
    for arm in (name for name in ARMS if name in by_arm):
        runs = by_arm[arm]
        found: dict[str, Any] = {"seeds": sorted(runs)}
        for cost in ("batches", "passes"):
            (found[cost],) = {run[cost] for run in runs.values()}
        for name in MEASURES:
            values = [runs[seed][name] for seed in sorted(runs)]
            sd = statistics.stdev(values) if len(values) > 1 else None
            found[name] = {"mean": statistics.fmean(values), "sd": sd, "values": values}
        common = sorted(by_arm.get(FULL, {}).keys() & runs.keys())
        if arm != FULL and common:
            pairs = {name: ([by_arm[FULL][s][name] for s in common], [runs[s][name] for s in common])
                     for name in MEASURES}  # fmt: skip
            found["against_full"] = {name: compare(*pair) for name, pair in pairs.items()}
        arms[arm] = found
    return arms


def _runs(options: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that a kill leaves whole comparisons."""
    run = Run(
        FULL,
        0,
        root=str(options.data),
        work=str(options.work),
        overrides=tuple(options.set),
        images=options.images,
        split="val" if options.validation else "test",
        autoattack=options.autoattack,
        steps=options.attack_steps,
    )
    return [replace(run, arm=arm, seed=seed) for seed in options.seeds for arm in options.arms]


def _results(runs: Sequence[Run], workers: int) -> Iterator[dict[str, Any]]:
    """As they come; one worker is this process."""
    if workers == 1:
        yield from map(run_once, runs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_while_wanted, runs)


def _while_wanted(run: Run) -> dict[str, Any]:
    """A run, unless the process that asked for it has been killed: what it had put into the queue stays there."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
    return run_once(run)


def _show(result: dict[str, Any]) -> None:
    shares = "  ".join(f"{name} {result[name]:.1%}" for name in MEASURES)
    seconds = sum(result["cpu_seconds"].values())
    print(
        f"{result['arm']}, seed {result['seed']}: {shares}  ({result['batches']} batches, {seconds:.0f} s)", flush=True
    )


def _show_summary(arms: dict[str, Any]) -> None:
    print()
    for arm, found in arms.items():
        shares = "  ".join(f"{name} {found[name]['mean']:.1%} ± {found[name]['sd'] or 0:.1%}" for name in MEASURES)
        line = f"{arm:20} {shares}"
        if "against_full" in found:
            one = found["against_full"]["autoattack"]
            line += f"  autoattack without it {-one['difference']:+.1%}: {one['verdict']}"
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speedrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="CIFAR-10 as train.parquet and test.parquet")
    add("--work", type=folder_option, required=True, help="folder of the runs, where the same command goes on")
    add("--out", type=folder_option, help="folder for speedrun.json; without it only the screen has the summary")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    names = ", ".join(ARMS)
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"default: all, {names}")
    add("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    add("--images", type=int, default=1000, help="images to measure on (default: 1000)")
    about = "apgd: its APGD-CE and targeted APGD (default); standard: all four, ten times as long"
    add("--autoattack", choices=AUTOATTACK, default="apgd", help=about)
    add("--attack-steps", type=int, default=100, help="steps of AutoAttack's members (default: 100)")
    add("--validation", action="store_true", help="measure on validation images: to choose settings")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the recipe, for all arms")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("workers", "images", "attack_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a count >= 1, got {getattr(options, name)}")
    expect_records(parser, options.out, ["speedrun"], speedrun="speedrun ablation")
    try:
        for run in _runs(options):
            expect_outputs("--work", run.outputs())
        for folder in filter(None, (options.work, options.out)):
            folder.mkdir(parents=True, exist_ok=True)
        results = []
        for result in _results(_runs(options), options.workers):
            _show(result)
            results.append(result)
    except (ConfigError, DataError, OSError) as error:
        parser.error(str(error))
    arms = summary(results)
    _show_summary(arms)
    if options.out:
        text = json.dumps(_record(options, arms, results), indent=1) + "\n"
        print(f"\nwritten: {write_record(options.out, 'speedrun', text)}")


def _record(options: argparse.Namespace, arms: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    order = list(ARMS)
    results = sorted(results, key=lambda result: (order.index(result["arm"]), result["seed"]))
    return {
        "benchmark": "speedrun ablation",
        "rule": RULE,
        "recipe": [*RECIPE, *options.set],
        "changes": {arm: list(ARMS[arm]) for arm in options.arms},
        "split": "validation" if options.validation else "test",
        "images": options.images,
        "autoattack": [*AUTOATTACK[options.autoattack], f"{options.attack_steps} steps"],
        **provenance(torch.device("cpu")),
        "arms": arms,
        # without all their settings, which follow from recipe and changes and stay in the runs' own files
        "runs": [{key: value for key, value in result.items() if key != "settings"} for result in results],
    }


if __name__ == "__main__":
    main()
