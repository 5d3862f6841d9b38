"""Figures of a study, as PNG: means over the seeds, and every seed as a dot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_moe.evaluation.plots import (
    CLEAN,
    INK,
    MARKERS,
    NEUTRAL,
    PERCENT,
    ROBUST,
    RUNS,
    TITLE,
    new_figure,
    save_figure,
    tidy,
)
from robust_moe.reproduce import runs
from robust_moe.reproduce.radius_figure import error_over_radius
from robust_moe.reproduce.studies import PARTS
from robust_moe.reproduce.vit_moe import VIT_MOE

__all__ = ["FIGURES", "draw_part"]

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by run and seed, what was measured
Bars = Sequence[tuple[str, str, str]]  # key, title, colour
ATTACKS = (
    ("attacks_pgd", "PGD", CLEAN),
    ("attacks_autoattack", "AutoAttack", ROBUST),
    ("attacks_steering", "steering", "#b7791f"),
    ("attacks_worst", "worst of all", "#2f855a"),
)
BUDGET = (("curve_mean", "robust, mean over radii", ROBUST), ("slopes_model", "slope L ε", CLEAN))
TOKENS = (
    ("tokens_pgd", "PGD", CLEAN),
    ("tokens_ra_e", "RA-E", "#b7791f"),
    ("tokens_ra_r", "RA-R", "#2f855a"),
    ("tokens_worst", "worst of all", ROBUST),
)
CHOICES = (
    ("redundancy_own", "gates", CLEAN),
    ("redundancy_swap", "swapped", "#b7791f"),
    ("redundancy_random", "random", "#2f855a"),
    ("redundancy_robust", "gates, attacked", ROBUST),
    ("redundancy_clean_route", "clean routes, attacked", NEUTRAL),
)
COLLAPSE = (("sa", "SA", CLEAN), ("ra", "RA", ROBUST), ("use_largest", "most used expert of a layer", "#b7791f"))
ACCURACIES = (("sa", "SA", CLEAN), ("ra", "RA", ROBUST), ("ra_e", "RA-E", "#b7791f"), ("ra_r", "RA-R", "#2f855a"))


def draw_part(part: str, records: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw what there is to draw of a part of a study into ``folder``, and remove what there is not.

    Args:
        records: by run and seed, what each job left (``measures``, ``attack``).

    Returns:
        The files.
    """
    drawn = []
    for name, (needs, draw) in FIGURES[part].items():
        path = folder / f"{part}-{name}.png"
        if not all(records.get(run) for run in needs):
            path.unlink(missing_ok=True)
            continue
        there = {run: records[run] for run in needs}
        figure = draw({run: {seed: each["measures"] for seed, each in seeds.items()} for run, seeds in there.items()})
        attacked = draw not in (_utilisation, _costs, error_over_radius)
        figure.suptitle(f"{figure.get_suptitle()}\n{_note(there, name, attacked)}", **TITLE)
        save_figure(figure, path, "reproduce")
        drawn.append(path)
    return drawn


def _note(records: Mapping[str, Mapping[str, Any]], name: str, attacked: bool) -> str:
    """What the numbers are of: attack, images, seeds. A figure of what a probe found has the probe's ``name``."""
    each = [record for seeds in records.values() for record in seeds.values()]
    radii = sorted({str(record["attack"]["eps"]) for record in each})
    steps = sorted({record["attack"]["steps"] for record in each})
    images = sorted({record["measures"].get(f"{name}_images", record["measures"]["images"]) for record in each})
    counts = sorted({len(seeds) for seeds in records.values()})
    listed = [" or ".join(map(str, values)) for values in (steps, radii, counts)]
    shown = " or ".join(f"{count:,}" for count in images)
    attack = f"PGD-{listed[0]}, ε = {listed[1]}, " if attacked else ""
    return f"{attack}{shown} images, {listed[2]} seed{'' if counts == [1] else 's'}"


def _accuracies(title: str, bars: Bars = ACCURACIES) -> Callable[[Found], Figure]:
    """The numbers ``bars`` of every run, side by side."""

    def draw(found: Found) -> Figure:
        figure = new_figure(2.6 + 1.9 * len(found), 4.0, title)
        axes = figure.subplots()
        measured = {key for seeds in found.values() for each in seeds.values() for key in each}
        there = [bar for bar in bars if bar[0] in measured]
        for number, (key, label, color) in enumerate(there):
            groups = [[each[key] for each in seeds.values() if key in each] for seeds in found.values()]
            places = np.arange(len(found)) + (number - (len(there) - 1) / 2) * 0.2
            _bars(axes, places, groups, color, 0.18, label)
        _name_groups(axes, found)
        tidy(axes, "", "test images")
        axes.grid(False, axis="x")
        return figure

    return draw


def _bars(
    axes: Axes, places: np.ndarray, groups: Sequence[Sequence[float]], color: str, width: float, label: str | None
) -> None:
    """Bars of means, with their values; dots are seeds. An empty group has no bar."""
    there = [(place, group) for place, group in zip(places, groups, strict=True) if len(group)]
    means = [float(np.mean(group)) for _, group in there]
    bars = axes.bar([place for place, _ in there], means, width, color=color, alpha=0.75, label=label)
    tops = [max(group) for _, group in there]
    for bar, mean, top in zip(bars, means, tops, strict=True):
        middle = bar.get_x() + width / 2
        axes.annotate(
            f"{100 * mean:.1f}", (middle, top), (0, 4), textcoords="offset points", ha="center", fontsize=7, color=INK
        )
    for place, group in there:
        spread = np.linspace(-0.25, 0.25, len(group)) * width if len(group) > 1 else [0.0]
        axes.plot(place + np.asarray(spread), group, "o", color=INK, markersize=3)


def _name_groups(axes: Axes, found: Found) -> None:
    titles = [runs.RUNS[run].title.replace(", ", "\n") for run in found]
    axes.set_xticks(range(len(found)), titles, fontsize=8)
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.legend(frameon=False, ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.12))


def _curves(
    title: str, points: str, x: tuple[str, str], panels: Sequence[tuple[str, str]]
) -> Callable[[Found], Figure]:
    """The numbers of the list ``points`` against one of them, ``x``, a panel for each; the band is the seeds' range.

    ``x``, ``panels``: key and label.
    """

    def draw(found: Found) -> Figure:
        figure = new_figure(4.5 * len(panels), 4.0, title)
        for axes, (key, label) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for number, (run, seeds) in enumerate(found.items()):
                places = [point[x[0]] for point in next(iter(seeds.values()))[points]]
                values = np.array([[point[key] for point in each[points]] for each in seeds.values()])  # [seeds, x]
                color = RUNS[number]
                axes.fill_between(places, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
                axes.plot(np.repeat([places], len(values), 0).T, values.T, ".", color=color, markersize=4)
                axes.plot(places, values.mean(0), f"-{MARKERS[number]}", color=color, label=runs.RUNS[run].title)
            tidy(axes, x[1], label)
            axes.yaxis.set_major_formatter(PERCENT)
            if all(isinstance(place, int) for place in places):
                axes.set_xticks(places)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, ncols=len(found), loc="outside lower center")
        return figure

    return draw


def _utilisation(found: Found) -> Figure:
    """Each expert's share of first choices, the most used one first; in each seed another may be it."""
    figure = new_figure(7.5, 3.8, "Share of clean test images by expert, the most used first")
    axes = figure.subplots()
    experts = len(next(iter(next(iter(found.values())).values()))["first"])
    width = 0.8 / len(found)
    for number, (run, seeds) in enumerate(found.items()):
        shares = np.array([sorted(each["first"], reverse=True) for each in seeds.values()])  # [seeds, E]
        places = np.arange(experts) + (number - (len(found) - 1) / 2) * width
        _bars(axes, places, list(shares.T), RUNS[number], 0.9 * width, runs.RUNS[run].title)
    axes.axhline(1 / experts, color=NEUTRAL, linewidth=0.9, linestyle=":")
    axes.set_xticks(range(experts), [f"rank {rank + 1}" for rank in range(experts)])
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "", "share of first choices")
    axes.grid(False, axis="x")
    return figure


def _single_experts(found: Found) -> Figure:
    """Every expert alone (dots) against the gated model (line), a group of dots a seed."""
    figure = new_figure(2.2 + 2.6 * len(found), 4.0, "Single experts (dots) and the gated model (lines)")
    for axes, (run, seeds) in zip(
        np.atleast_1d(figure.subplots(1, len(found), sharey=True)), found.items(), strict=True
    ):
        for offset, alone, gated, color, label in (
            (-0.15, "clean", "sa", CLEAN, "clean"),
            (0.15, "robust", "ra", ROBUST, "robust"),
        ):
            for place, each in enumerate(seeds.values()):
                dots = [expert[alone] for expert in each["single_experts"]]
                axes.plot([place + offset] * len(dots), dots, "o", color=color, alpha=0.6, markersize=4)
                left, right = place + offset - 0.13, place + offset + 0.13
                axes.plot([left, right], [each[gated]] * 2, "-", color=color, label=None if place else label)
        axes.set_xticks(range(len(seeds)), [f"seed {seed}" for seed in seeds], fontsize=8)
        axes.set_title(runs.RUNS[run].title, fontsize=9, color=INK)
        axes.yaxis.set_major_formatter(PERCENT)
        tidy(axes, "", "")
        axes.grid(False, axis="x")
    figure.axes[0].set_ylim(0)  # of all, as they share it: once everything is drawn
    figure.axes[0].set_ylabel("test images", color=INK)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def _costs(found: Found) -> Figure:
    """Multiply-adds and parameters over the number of experts, in units of those of one; they depend on no seed."""
    figure = new_figure(7.5, 3.8, "What experts cost")
    axes = figure.subplots()
    table = next(iter(next(iter(found.values())).values()))["costs_table"]
    one = table[0]
    for number, (label, name, active) in enumerate(
        (
            ("multiply-adds, k = 1", "multiply_adds", lambda experts: 1),
            ("multiply-adds, k = E / 2", "multiply_adds", lambda experts: max(experts // 2, 1)),
            ("multiply-adds, k = E", "multiply_adds", lambda experts: experts),
            ("parameters", "parameters", lambda experts: 1),
        )
    ):
        rows = [row for row in table if row["top_k"] == active(row["num_experts"])]
        places = [row["num_experts"] for row in rows]
        axes.plot(
            places, [row[name] / one[name] for row in rows], f"-{MARKERS[number]}", color=RUNS[number], label=label
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes, "experts E", "relative to one expert")
    return figure


def _routed(part: str) -> tuple[str, ...]:
    """The runs of a part that have experts."""
    return tuple(run for run in PARTS[part].runs if not run.startswith("dense"))


# part -> figure -> (the runs it needs, how it is drawn)
FIGURES: dict[str, dict[str, tuple[Sequence[str], Callable[[Found], Figure]]]] = {
    "weak-link": {
        "accuracy": (PARTS["weak-link"].runs, _accuracies("Standard training, under attack")),
    },
    "rt-er": {
        "accuracy": (PARTS["rt-er"].runs, _accuracies("Adversarial training of a mixture of networks")),
        "single-experts": (PARTS["rt-er"].runs, _single_experts),
    },
    "dual": {
        "alpha": (
            PARTS["dual"].runs,
            _curves(
                *("Dual model: what alpha trades", "sweep", ("alpha", "alpha, share of the robust model")),
                (("sa", "clean accuracy (SA)"), ("ra", "robust accuracy (RA)")),
            ),
        )
    },
    "block-moe": {
        "accuracy": (PARTS["block-moe"].runs, _accuracies("Dense network and BlockMoE, adversarially trained")),
        "utilisation": (("block-k1", "block-k1-released", "block-k1-switch"), _utilisation),
        "single-experts": (_routed("block-moe"), _single_experts),
    },
    **{
        name: {"attacks": (PARTS[name].runs, _accuracies("Robust under single attacks and under all", ATTACKS))}
        for name in (
            *("masking", "worst-case", "router", "released-form", "warm-start"),
            *("robust-routing", "routing-rule"),
        )
    },
    **{
        name: {"accuracy": (PARTS[name].runs, _accuracies("Adversarial training, under attack"))}
        for name in ("beta", "advmoe", "conv-block", "placement", "gates", "experts", "half-precision")
    },
    "collapse": {"accuracy": (PARTS["collapse"].runs, _accuracies("Does routing collapse?", COLLAPSE))},
    "bounds": {},
    "equal-compute": {
        "curve": (PARTS["equal-compute"].runs, _accuracies("As many multiply-adds, dense and routed", BUDGET))
    },
    "backdoors": {
        "backdoor": (
            PARTS["backdoors"].runs,
            _curves(
                *("The least used experts dropped", "backdoor_curve", ("experts", "experts left")),
                (("clean", "clean accuracy"), ("robust", "robust accuracy"), ("asr", "attack success of the trigger")),
            ),
        )
    },
    **{
        name: {
            "tokens": (
                PARTS[name].runs,
                _accuracies("Robust under attacks on the model, its experts, its routes", TOKENS),
            ),
            "redundancy": (_routed(name), _accuracies("Who chooses the experts of a token", CHOICES)),
            "radii": (PARTS[name].runs, error_over_radius),
        }
        for name in VIT_MOE
    },
    "vit-neighbours": {
        "tokens": (
            PARTS["vit-neighbours"].runs,
            _accuracies("Robust under attacks on the model, its experts, its routes", TOKENS),
        )
    },
    "cost": {"experts": (PARTS["cost"].runs, _costs)},
}
