"""Figures of results: ``python -m benchmarks plots FOLDER`` draws what it finds in FOLDER, beside the JSON.

expert_sweep_time.png and expert_sweep_memory.png: against the dense block of the same FLOPs, over E, B, k and map size;
expert_sweep_rate.png: share of the fastest large matrix product; train_step.png: a whole training step; of a GPU
campaign's results.json what ``gpu_campaign.figures`` says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from robust_moe.benchmarks.layer_case import ALL, DENSE, MASKED, OURS, SORTED
from robust_moe.evaluation.plots import save_figure
from robust_moe.outputs import Kind, expect_outputs, figure
from robust_moe.settings.errors import ConfigError

__all__ = ["COMMAND", "GREY", "INK", "figure_of", "main", "plot_sweep", "plot_train_step", "tidy"]

COMMAND = "benchmarks plots"  # by which its figures are marked
# The records that are drawn, and what of: an earlier figure without a mark is known by its record beside it.
FIGURES = {
    "expert_sweep.json": [f"expert_sweep_{what}.png" for what in ("time", "memory", "rate")],
    "train_step.json": ["train_step.png"],
    "results.json": ["campaign_products.png", "campaign_steps.png"],
}
FIGURE = Kind("a figure of python -m benchmarks plots", lambda path, _: figure(COMMAND).ours(path, True))

Line = Mapping[str, Any]
INK, GREY, GRID = "#1a202c", "#4a5568", "#e2e8f0"
# told apart in grey and by the colour-blind: colour, marker, and our line is the thick one
STYLES = {
    OURS: ("#c2410c", "o", 2.6),
    MASKED: ("#2b6cb0", "s", 1.5),
    SORTED: ("#2f855a", "D", 1.5),
    ALL: ("#6b46c1", "^", 1.5),
    DENSE: ("#4a5568", "v", 1.5),
}
LABELS = {
    OURS: "FusedBlockMoE",
    MASKED: "(a) masked loop",
    SORTED: "(b) sorted loop",
    ALL: "(c) all experts",
    DENSE: "(d) dense block",
}
CENTRE = {"k": 2, "B": 128, "map": "4x4"}
PASSES = {"forward+backward": "forward + backward", "forward+dx": "forward + input gradient"}
AXES = {"E": "experts E", "B": "batch size B", "k": "experts a sample, k", "map": "map size (channels 512, 256, 128)"}
Value = Callable[[Line, Line], float]  # of a line, and the dense block's of the same case


def figure_of(width: float, height: float, title: str, record: Line) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK)
    git = record.get("git")
    commit = f"{git[:10]}{git[40:]}" if git else "no commit"
    source = f"{record['hardware']}   ·   PyTorch {record['versions']['torch']}   ·   {commit}"
    figure.supxlabel(source, fontsize=8, color=GREY)
    return figure


def tidy(axes: Axes) -> None:
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GREY, labelcolor=GREY)


def _series(lines: Sequence[Line], mode: str, over: str, experts: int, variant: str, value: Value) -> dict[Any, float]:
    """Value at each position of ``over``, all else at the centre."""
    fixed = {"mode": mode, **CENTRE, "E": experts}
    del fixed[over]
    found = {}
    for line in lines:
        case = line["case"]
        if line["variant"] != variant or any(case.get(key) != wanted for key, wanted in fixed.items()):
            continue
        dense = next((other for other in lines if other["case"] == case and other["variant"] == DENSE), None)
        if dense is not None:
            found[case[over]] = value(line, dense)
    order = sorted(found, key=lambda place: int(str(place).split("x")[0]))
    return {place: found[place] for place in order}


def _panel(axes: Axes, lines: Sequence[Line], mode: str, over: str, variants: Sequence[str], value: Value) -> None:
    centres = (4,) if over == "E" else (4, 16)
    drawn = [
        (_series(lines, mode, over, experts, variant, value), experts, variant)
        for variant in variants
        for experts in centres
    ]
    keys = {place for series, *_ in drawn for place in series}
    places = sorted(keys, key=lambda place: int(str(place).split("x")[0]))
    for series, experts, variant in drawn:
        color, marker, width = STYLES[variant]
        first = experts == centres[0]
        axes.plot(
            [places.index(place) for place in series],
            list(series.values()),
            "-" if first else "--",
            color=color,
            marker=marker,
            markersize=6 if variant == OURS else 4.5,
            markerfacecolor=color if first else "white",
            linewidth=width,
            zorder=3 if variant == OURS else 2,
        )
    axes.set_xticks(range(len(places)), [str(place).replace("x", "×") for place in places])
    axes.margins(x=0.08)
    tidy(axes)


def _legend(figure: Figure, variants: Sequence[str]) -> None:
    handles = [
        Line2D([], [], color=STYLES[v][0], marker=STYLES[v][1], linewidth=STYLES[v][2], label=LABELS[v])
        for v in variants
    ]
    handles += [
        Line2D([], [], color=GREY, marker="o", label="E = 4"),
        Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="--", label="E = 16"),
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.965)}  # between the title and the panels
    figure.legend(handles=handles, **place, ncols=len(handles), frameon=False, fontsize=9)


def _ratio_scale(axes: Axes) -> None:
    """Powers of two, from what the panels need; shared axes."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(-3, 8)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def plot_sweep(record: Line, path: Path, what: str) -> None:
    """Panels over E, B, k and map size, one row per pass; with the most threads measured, in float32.

    what: "time" or "memory", as multiples of the dense block's, or "rate", as share of the measured ceiling.

    Raises:
        ValueError: no case with a dense block.
    """
    layers = [line for line in record["rows"] if "mode" in line["case"] and line["case"]["dtype"] == "float32"]
    if not any(line["variant"] == DENSE for line in layers):
        raise ValueError("record: expected rows of expert_sweep with the dense block, got none")
    threads = max(line["case"]["threads"] for line in layers)
    lines = [line for line in layers if line["case"]["threads"] == threads]
    titles = {
        "time": "Time of one routed block, in multiples of a dense block of the same FLOPs (lower is better)",
        "memory": "Peak memory of one routed block, in multiples of a dense block of the same FLOPs",
        "rate": "Useful work a second, as share of the fastest large matrix product (higher is better)",
    }
    values: dict[str, Value] = {
        "time": lambda line, dense: line["ratio"] / dense["ratio"],
        "memory": lambda line, dense: line["extra"]["peak_mib"] / dense["extra"]["peak_mib"],
        "rate": lambda line, _: line["extra"]["share"],
    }
    variants = [v for v in STYLES if what == "rate" or v != DENSE]
    figure = figure_of(14, 7.4, titles[what], record)
    figure.get_layout_engine().set(rect=(0, 0, 0.995, 0.95))
    grid = figure.subplots(len(PASSES), len(AXES), sharey=True, sharex="col")
    for row, (mode, label) in zip(grid, PASSES.items(), strict=True):
        last = mode == list(PASSES)[-1]
        for axes, (over, xlabel) in zip(row, AXES.items(), strict=True):
            _panel(axes, lines, mode, over, variants, values[what])
            if what != "rate":
                axes.axhline(1, color=INK, linewidth=1, zorder=1)
            if last:
                axes.set_xlabel(xlabel)
        row[0].set_ylabel(label)
    if what == "rate":
        grid[0][0].set_ylim(0, None)
        grid[0][0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        _ratio_scale(grid[0][0])
        dense = {"xy": (0.99, 1), "xycoords": ("axes fraction", "data"), "va": "bottom", "ha": "right"}
        grid[0][0].annotate("dense block", **dense, fontsize=8, color=INK)
    _legend(figure, variants)
    save_figure(figure, path, COMMAND)


def _step_color(variant: str) -> tuple[str, float]:
    """Of a variant's bar: one for each way to train, paler in bfloat16."""
    name = variant.removesuffix(", bfloat16")
    color = {"ours": STYLES[OURS][0], "plain loop trainer": "#64748b"}.get(name, STYLES[MASKED][0])
    return color, 1.0 if name == variant else 0.55


def plot_train_step(record: Line, path: Path) -> None:
    """Bars of seconds a step, with how many times the first variant's."""
    rows = record["rows"]
    cases = list(dict.fromkeys(json.dumps(row["case"]) for row in rows))
    first = json.loads(cases[0])
    title = f"One {first['step']} training step, ResNet-18 with layer4.1 as BlockMoE, batch {first['B']}"
    figure = figure_of(9, 1.6 + 1.1 * len(cases), title, record)
    panels = figure.subplots(len(cases), 1, squeeze=False, sharex=True)[:, 0]
    for axes, case in zip(panels, cases, strict=True):
        own = [row for row in rows if json.dumps(row["case"]) == case]
        seconds = [row["median_ms"] / 1e3 for row in own]
        spread = [[(row["median_ms"] - row["low_ms"]) / 1e3 for row in own],
                  [(row["high_ms"] - row["median_ms"]) / 1e3 for row in own]]  # fmt: skip
        names = [row["variant"] for row in own]
        bars = axes.barh(
            names, seconds, color=[_step_color(name) for name in names], height=0.62, xerr=spread, ecolor=INK
        )
        notes = [f"  {row['ratio']:.2f}×   {row['extra']['peak_mib']:.0f} MiB" for row in own]
        axes.bar_label(bars, notes, fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.set_title(f"E = {json.loads(case)['E']}", loc="left", fontsize=10, color=GREY)
        axes.margins(x=0.22)
        tidy(axes)
        axes.grid(False, axis="y")
    panels[-1].set_xlabel("seconds (median and spread); beside it, time in multiples of ours and peak memory")
    save_figure(figure, path, COMMAND)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plots", description=__doc__)
    parser.add_argument("folder", type=Path, help="with NAME.json as python -m benchmarks --out writes them")
    folder = parser.parse_args().folder
    there = [folder / name for source, names in FIGURES.items() if (folder / source).exists() for name in names]
    try:
        expect_outputs("folder", [(path, FIGURE) for path in there])
    except ConfigError as error:
        parser.error(str(error))
    written = []
    if (source := folder / "expert_sweep.json").exists():
        record = json.loads(source.read_text(encoding="utf-8"))
        for what in ("time", "memory", "rate"):
            written.append(folder / f"expert_sweep_{what}.png")
            plot_sweep(record, written[-1], what)
    if (source := folder / "train_step.json").exists():
        written.append(folder / "train_step.png")
        plot_train_step(json.loads(source.read_text(encoding="utf-8")), written[-1])
    if (source := folder / "results.json").exists():
        from benchmarks.gpu_campaign.figures import draw

        written += draw(json.loads(source.read_text(encoding="utf-8")), folder)
    if not written:
        names = "expert_sweep.json, train_step.json or a campaign's results.json"
        parser.error(f"folder: expected {names} in {folder}, found none of them")
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
