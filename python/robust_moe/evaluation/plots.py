"""Figures of runs, as PNG: training curves, experts' shares of inputs, clean against robust accuracy.

Pure functions of metric lines (:func:`robust_moe.engine.read_metrics`) and result files.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from robust_moe.evaluation.common import in_common
from robust_moe.files import replacing
from robust_moe.outputs import figure_marks

__all__ = [
    "ABOVE",
    "WIDTH",
    "draw_tradeoff",
    "named_legend",
    "new_figure",
    "plot_comparison",
    "plot_routing",
    "plot_training",
    "save_figure",
    "series",
    "tidy",
]

INK, NEUTRAL, GRID = "#1a202c", "#4a5568", "#e2e8f0"
CLEAN, ROBUST = "#2b6cb0", "#c2410c"  # also told apart in grey and by the colour-blind
RUNS = ("#2b6cb0", "#c2410c", "#2f855a", "#6b46c1", "#b7791f", "#0e7490")
MARKERS = "osD^vP"
Line = Mapping[str, Any]
BALANCE = "lower: experts used more evenly; below 0 it is minus the\nentropy of their use, at best −ln E with E experts"
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g}%")  # as many decimals as the ticks need
TITLE = {"fontsize": 12, "fontweight": "bold", "color": INK, "parse_math": False}
WIDTH = 5.2  # inches: its text is legible where a page shows the figure 400 pixels wide
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.4}  # covers no data
_LONGEST = 40  # characters of a name in a figure


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty figure of ``width`` x ``height`` inches; without a title where the page around it has one."""
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    if title is not None:
        figure.suptitle(textwrap.fill(title, int(9.5 * width)), **TITLE)
    return figure


def save_figure(figure: Figure, path: str | Path, command: str) -> None:
    """Write ``figure`` as PNG, whole or not at all, marked as one of ``robust-moe`` ``command``."""
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png", metadata=figure_marks(command))


def tidy(axes: Axes, xlabel: str, ylabel: str) -> None:
    """The look of every graph: named axes, a pale grid behind the data, no box around it."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(NEUTRAL)
    axes.tick_params(color=NEUTRAL, labelcolor=NEUTRAL)


def printable(name: str) -> str:
    """``name`` as a figure can show it: no control characters, not longer than a legend bears."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def named_legend(
    axes: Axes, handles: Sequence[Artist | tuple[Artist, ...]], names: Sequence[str], columns: int = 1
) -> None:
    """A legend above the graph, of names taken literally: matplotlib itself reads ``$`` as mathematics and leaves out
    ``_name``."""
    legend = axes.legend(handles, [str(number) for number in range(len(names))], frameon=False, ncols=columns, **ABOVE)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(parse_math=False, text=printable(name), color=INK)


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """(epochs, values of ``name``) of the ``"epoch"`` lines that have it."""
    points = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def plot_training(lines: Sequence[Line], path: str | Path, title: str = "Training") -> None:
    """Loss a training epoch, and clean and robust accuracy on validation images, from a run's ``"epoch"`` lines.

    Raises:
        ValueError: no such lines.
    """
    if not lines:
        raise ValueError("lines: expected at least one epoch of metrics, got none")
    epochs, balance = series(lines, "train_balance_loss")
    panels = 3 if epochs else 2  # the balance loss has a scale of its own
    figure = new_figure(WIDTH, 2.9 * panels, title)
    left, right, *third = figure.subplots(panels, 1)
    task = series(lines, "train_task_loss")
    left.plot(*task, "-o", color=CLEAN, markersize=3.5, label="task loss")
    if (whole := series(lines, "train_loss"))[0] and whole != task:
        left.plot(*whole, "--o", color=NEUTRAL, markersize=3.5, label="loss: task and all weighted terms")
        left.legend(frameon=False, ncols=2, **ABOVE)
    tidy(left, "epoch", "training loss")
    for axes in third:
        axes.plot(epochs, balance, "-o", color=NEUTRAL, markersize=3.5)
        axes.set_title(BALANCE, fontsize=9, color=NEUTRAL, loc="left")
        tidy(axes, "epoch", "training balance loss")
    for name, label, color, style in (
        ("val_clean", "clean", CLEAN, "-o"),
        ("val_robust", "robust", ROBUST, "-s"),
    ):
        right.plot(*series(lines, name), style, color=color, markersize=3.5, label=label)
    epochs, robust = series(lines, "val_robust")
    if epochs:
        best = int(np.argmax(robust))
        right.axvline(epochs[best], color=NEUTRAL, linewidth=0.9, linestyle=":")
        right.plot(epochs[best], robust[best], "*", color=ROBUST, markersize=13, label=f"best: {robust[best]:.1%}")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.legend(frameon=False, ncols=3, **ABOVE)
    tidy(right, "epoch", "validation accuracy")
    for axes in (left, right, *third):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path, "train")


def plot_routing(lines: Sequence[Line], path: str | Path, split: str = "test", title: str | None = None) -> None:
    """Share of the ``split``'s images that each expert receives: one map per layer, one row per expert, one column per
    epoch.

    From a run's ``"routing"`` lines. An image is sent to top_k experts, so an expert's share is top_k / E when all are
    used alike; the colour scale is centred there.

    Raises:
        ValueError: no such lines.
    """
    chosen = [line for line in lines if line["split"] == split]
    if not chosen:
        raise ValueError(f"lines: expected routing of {split!r} images, got none (a dense model has none)")
    layers = list(dict.fromkeys(line["layer"] for line in chosen))
    count = len({line["epoch"] for line in chosen})
    experts = max(len(line["selected"]) for line in chosen)
    heights = max(2.2, 0.42 * experts + 1.1)
    figure = new_figure(
        min(9.0, max(WIDTH, 1.8 + 0.28 * count)),
        heights * len(layers) + 0.4,
        title or f"Share of {split} inputs per expert",
    )
    for axes, layer in zip(figure.subplots(len(layers), 1, squeeze=False)[:, 0], layers, strict=True):
        own = sorted((line for line in chosen if line["layer"] == layer), key=lambda line: line["epoch"])
        shares = np.array([line["selected"] for line in own]).T  # [E, epochs]
        balanced = shares.sum(0).mean() / len(shares)
        image = axes.imshow(shares, aspect="auto", cmap="RdYlBu_r", vmin=0, vmax=min(1.0, 2 * balanced))
        if shares.size <= 160:
            for (row, column), share in np.ndenumerate(shares):
                shade = "white" if abs(share / balanced - 1) > 0.6 else INK
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=shade)
        step = max(1, len(own) // 15)
        axes.set_xticks(range(0, len(own), step), [str(line["epoch"]) for line in own[::step]])
        axes.set_yticks(range(len(shares)), [str(expert) for expert in range(len(shares))])
        axes.set_xlabel("epoch")
        axes.set_ylabel("expert")
        axes.set_title(f"{layer}   (even use: {balanced:.0%} each)", fontsize=10, color=NEUTRAL)
        bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), pad=0.01)
        bar.outline.set_visible(False)
    save_figure(figure, path, "train")


def plot_comparison(rows: Sequence[tuple[str, Mapping[str, Any]]], path: str | Path, title: str = "Accuracy") -> None:
    """Clean against robust accuracy of several (name, results), as bars and as points, with 95 % intervals; robust is
    the worst case over the attacks that all have.

    Raises:
        ValueError: no rows, one without an attack, or some without a common one.
    """
    if not rows or any(results["robust"] is None for _, results in rows):
        raise ValueError("rows: expected results of attacked models, got none or one without an attack")
    rows = in_common(rows)
    figure = new_figure(WIDTH, 6.6 + 0.22 * len(rows), title)
    left, right = figure.subplots(2, 1)
    places = np.arange(len(rows))
    for offset, name, color in ((-0.19, "clean", CLEAN), (0.19, "robust", ROBUST)):
        shares = np.array([results[name] for _, results in rows])
        errors = _errors(rows, name)
        left.bar(places + offset, shares, 0.36, color=color, label=name, yerr=errors, capsize=3)
        for place, share, top in zip(places, shares, shares + errors[1], strict=True):  # above what would strike it out
            left.text(place + offset, top + 0.015, f"{share:.1%}", ha="center", va="bottom", fontsize=9, color=INK)
    room = max(8, 46 // len(rows))  # characters
    names = [textwrap.fill(printable(name), room) for name, _ in rows]
    left.set_xticks(places, names, parse_math=False)
    left.set_ylim(0, 1.12)
    left.set_yticks(np.linspace(0, 1, 6))
    left.legend(frameon=False, ncols=2, **ABOVE)
    tidy(left, "", "test accuracy")
    left.grid(False, axis="x")
    draw_tradeoff(right, rows)
    left.yaxis.set_major_formatter(PERCENT)
    save_figure(figure, path, "demo")


def draw_tradeoff(axes: Axes, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Clean (x) against robust accuracy (y) with 95 % intervals, a point a (name, results)."""
    clean_errors, robust_errors = _errors(rows, "clean"), _errors(rows, "robust")
    points = [
        axes.errorbar(
            results["clean"],
            results["robust"],
            xerr=clean_errors[:, number : number + 1],
            yerr=robust_errors[:, number : number + 1],
            fmt=MARKERS[(number + number // len(RUNS)) % len(MARKERS)],  # another marker when the colours come round
            color=RUNS[number % len(RUNS)],
            markersize=8,
            capsize=3,
            linewidth=1,
        )
        for number, (_, results) in enumerate(rows)
    ]
    named_legend(axes, points, [name for name, _ in rows])
    tidy(axes, "clean accuracy", "robust accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)


def _errors(rows: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> np.ndarray:
    """Distances [2, rows] from each share down and up to the ends of its interval."""
    shares = np.array([results[name] for _, results in rows])
    low, high = np.array([results[f"{name}_interval"] for _, results in rows]).T
    return np.clip(np.stack([shares - low, high - shares]), 0, None)
