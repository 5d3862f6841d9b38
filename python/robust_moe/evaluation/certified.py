"""Certified accuracy over the radius: the share of images whose certified radius is larger, as numbers, table, plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from robust_moe.evaluation.plots import CLEAN, NEUTRAL, PERCENT, ROBUST, new_figure, printable, save_figure, tidy
from robust_moe.evaluation.results import wilson_interval
from robust_moe.evaluation.tables import caption_text, title_text

__all__ = ["OUTCOMES", "certified_accuracy", "certified_curve", "certified_table", "plot_certified"]

# What becomes of an image, and how a table says it. An image of any outcome but the first has radius 0.
OUTCOMES = {
    "certified": "certified",
    "uncertified": "right, no radius certified",
    "wrong": "wrong without any change",
    "abstained": "no class certain enough",
    "timeout": "out of time, counted as not certified",
}


def certified_accuracy(radii: Sequence[float], at: float) -> float:
    """Share of images that no change of size ``at`` or less turns: certified radii are of open balls, so R > at."""
    return float((np.asarray(radii, dtype=np.float64) > at).mean())


def certified_curve(radii: Sequence[float], at: Sequence[Fraction]) -> list[dict[str, Any]]:
    """For each radius of ``at``: as text, as number, certified accuracy with its 95 % interval."""
    rows = []
    for radius in at:
        share = certified_accuracy(radii, float(radius))
        interval = list(wilson_interval(share, len(radii)))
        rows.append({"radius": str(radius), "value": float(radius), "certified": share, "interval": interval})
    return rows


def certified_table(results: Mapping[str, Any], name: str) -> Table:
    """A row for each radius, in percent with 95 % intervals; what became of the images stands below."""
    told = "; ".join(f"{count} {OUTCOMES[outcome]}" for outcome, count in results["outcomes"].items() if count)
    table = Table(
        title=title_text(
            f"{name}: certified by {results['by']}, {results['count']:,} {results['data']['split']} images"
        ),
        caption=caption_text(f"clean {100 * results['clean']:.1f} %; mean radius {results['mean_radius']:.4g}; {told}"),
    )
    table.add_column(f"{results['norm']} radius", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("certified % [95 % interval]", justify="right", no_wrap=True)
    for row in results["curve"]:
        low, high = row["interval"]
        text = f"{100 * row['certified']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        table.add_row(row["radius"], f"{row['value']:.4f}", text)
    return table


def plot_certified(results: Mapping[str, Any], path: Path, title: str) -> None:
    """Certified accuracy at every radius, with 95 % intervals, beside the clean accuracy; PNG."""
    radii = np.asarray(results["images"]["radius"], dtype=np.float64)
    largest = float(radii.max(initial=0.0))
    end = 1.08 * largest or 0.1
    places = np.unique(np.concatenate([[0.0], radii, [end]]))
    shares = (radii[None] > places[:, None]).mean(1)
    low, high = np.array([wilson_interval(float(share), len(radii)) for share in shares]).T
    figure = new_figure(6.4, 4.2, printable(title))
    axes = figure.subplots()
    axes.axhline(results["clean"], color=CLEAN, linestyle="--", linewidth=1.2, label="clean accuracy")
    axes.fill_between(places, low, high, step="post", color=ROBUST, alpha=0.15, linewidth=0, label="95 % interval")
    axes.step(places, shares, where="post", color=ROBUST, linewidth=1.8, label=f"certified by {results['by']}")
    if late := results["outcomes"]["timeout"]:
        axes.text(0.02, 0.03, f"{late} of {len(radii)} images ran out of time", transform=axes.transAxes, color=NEUTRAL)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.legend(frameon=False, loc="upper right")
    tidy(axes, f"{results['norm']} radius (pixels in [0, 1])", "certified accuracy")
    save_figure(figure, path, "certify")
