"""The result file of an evaluation: the numbers, and everything needed to get them again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from robust_moe.attacks import Attack
from robust_moe.config import AttackConfig, parse_fraction
from robust_moe.evaluation.scorer import EvalResult
from robust_moe.provenance import provenance

__all__ = ["attack_name", "describe_attack", "make_results", "results_table", "wilson_interval", "write_results"]

FORMAT = 1  # of the JSON; raised when a field changes its meaning


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share measured on ``count`` images (Wilson, 1927): how far another test set might be off."""
    z = 1.959963984540054  # the normal's 97.5 % point
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # at 0 and 1 an end of the interval is the share itself, up to rounding
    return min(share, max(0.0, (centre - spread) / scale)), max(share, min(1.0, (centre + spread) / scale))


def describe_attack(config: AttackConfig, attack: Attack) -> dict[str, Any]:
    """Settings as plain types; radius and step as exact fractions of the pixel range, e.g. ``"8/255"``."""
    eps = parse_fraction(config.eps, "eps")
    if config.alpha is None:
        alpha = Fraction(5, 2) * eps / max(config.steps, 1)
    else:
        alpha = parse_fraction(config.alpha, "alpha")
    forwards, backwards = attack.passes
    return {
        "name": config.name,
        "norm": config.norm,
        "eps": str(eps),
        "alpha": str(alpha),
        "steps": config.steps,
        "restarts": config.restarts,
        "random_start": config.random_start,
        "loss": "cross-entropy",
        "seed": attack.seed,
        "mode": attack.mode,
        "passes_per_image": {"forward": forwards, "backward": backwards},
    }


def make_results(
    result: EvalResult,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    attack: Mapping[str, Any] | None,
    source: str,
    device: torch.device | str,
) -> dict[str, Any]:
    """The result file's content. ``robust`` counts images right both as they are and attacked, of all ``count``."""
    intervals = {"clean_interval": wilson_interval(result.clean, result.count)}
    if result.robust is not None:
        intervals["robust_interval"] = wilson_interval(result.robust, result.count)
    return {
        "format": FORMAT,
        "checkpoint": source,
        "model": dict(model),
        "data": dict(data),
        **result.summary(),
        **{name: list(interval) for name, interval in intervals.items()},
        "attack": None if attack is None else dict(attack),
        "dtype": "float32",
        **provenance(device),
    }


def write_results(results: Mapping[str, Any], result: EvalResult, path: str | Path) -> None:
    """Write ``path`` (JSON) and, beside it, ``*-masks.npz`` with the bool masks of every image.

    The masks are in the order of the image set: ``clean``, and ``robust`` when there was an attack.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    masks_path = path.with_name(f"{path.stem}-masks.npz")
    masks = {"clean": result.clean_mask.numpy()}
    if result.robust_mask is not None:
        masks["robust"] = result.robust_mask.numpy()
    np.savez_compressed(masks_path, **masks)
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps({**results, "masks": masks_path.name}, indent=2, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def results_table(rows: Sequence[tuple[str, Mapping[str, Any]]], title: str) -> Table:
    """A table for the screen, a row a (name, results): accuracies in percent with their 95 % intervals."""
    attacks = dict.fromkeys(attack_name(results) for _, results in rows)
    table = Table(title=title, caption=f"robust: {'; '.join(attacks)}. [95 % interval]".replace("[", r"\["))
    for column in ("run", "weights", "clean %", "robust %", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    for name, results in rows:
        table.add_row(
            name,
            f"{results['model']['parameters'] / 1e6:.2f} M",
            _percent(results, "clean"),
            _percent(results, "robust"),
            f"{results['seconds']:.1f}",
        )
    return table


def attack_name(results: Mapping[str, Any]) -> str:
    """E.g. ``PGD-20, Linf eps = 8/255``; ``no attack`` for a clean evaluation."""
    attack = results["attack"]
    if attack is None:
        return "no attack"
    restarts = f" x{attack['restarts']}" if attack["restarts"] > 1 else ""
    return f"{attack['name'].upper()}-{attack['steps']}{restarts}, {attack['norm']} eps = {attack['eps']}"


def _percent(results: Mapping[str, Any], name: str) -> str:
    if results[name] is None:
        return "-"
    low, high = results[f"{name}_interval"]
    return f"{100 * results[name]:.1f} \\[{100 * low:.1f}, {100 * high:.1f}]"
