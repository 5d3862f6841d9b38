"""Figures of a campaign's results.json, drawn by ``python -m benchmarks.plots FOLDER`` on any machine.

campaign_products.png: rates of the convolutions over the batch; campaign_steps.png: images a second of whole steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plots import COMMAND, GREY, INK, figure_of, tidy
from robust_moe.evaluation.plots import save_figure

__all__ = ["best_rates", "draw"]

Row = Mapping[str, Any]
# as in benchmarks.plots: told apart in grey and by the colour-blind, ours the thick one
STYLES = {"ours": ("#c2410c", "o", 2.6), "dense": ("#4a5568", "v", 1.5), "all experts": ("#6b46c1", "^", 1.5)}
LABELS = {"ours": "ours, best candidate", "dense": "one dense convolution", "all experts": "all experts"}


def draw(results: Row, folder: Path) -> list[Path]:
    """Draw what the parts of a campaign have left numbers for; returns the files."""
    rows = {name: part["rows"] for name, part in results["parts"].items()}
    (about, *_) = rows.get("environment") or [{}]
    source = about.get("provenance", {"hardware": "unknown", "versions": {"torch": "?"}}) | {"git": results["commit"]}
    written = []
    if products := [row for row in rows.get("products", []) if row["case"]["mode"] == "bf16"]:
        written.append(folder / "campaign_products.png")
        ceilings = [row["tflops"] for row in rows.get("ceilings", []) if row["case"].get("dtype") == "bfloat16"]
        save_figure(_products(products, max(ceilings, default=None), source), written[-1], COMMAND)
    if steps := rows.get("pgd_step"):
        written.append(folder / "campaign_steps.png")
        save_figure(_steps(steps, source), written[-1], COMMAND)
    return written


def best_rates(rows: Sequence[Row], operation: str, experts: int, spread: str) -> dict[str, dict[int, float]]:
    """TFLOP/s by variant and batch; of the candidates, "ours", the fastest at each batch."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        case = row["case"]
        if (case["operation"], case["E"], case["spread"]) == (operation, experts, spread):
            variant = "ours" if row["choice"] else row["variant"]
            found[variant][case["B"]] = max(row["tflops"], found[variant].get(case["B"], 0.0))
    return dict(found)


def _products(rows: Sequence[Row], ceiling: float | None, source: Row) -> Figure:
    operations = list(dict.fromkeys(row["case"]["operation"] for row in rows))
    sizes = list(dict.fromkeys((row["case"]["E"], row["case"]["spread"]) for row in rows))
    figure = figure_of(3.4 * len(sizes), 2.6 * len(operations) + 0.8, "Grouped convolutions, 512 channels, 4x4", source)
    panels = figure.subplots(len(operations), len(sizes), sharex=True, sharey=True, squeeze=False)
    for line, operation in zip(panels, operations, strict=True):
        for axes, (experts, spread) in zip(line, sizes, strict=True):
            for variant, rates in best_rates(rows, operation, experts, spread).items():
                color, marker, width = STYLES[variant]
                batches = sorted(rates)
                values = [rates[batch] for batch in batches]
                axes.plot(batches, values, color=color, marker=marker, linewidth=width, label=LABELS[variant])
            if ceiling is not None:
                axes.axhline(ceiling, color=INK, linestyle=":", label="large matrix product")
            axes.set_ylim(bottom=0)
            axes.set_title(f"{operation}, E = {experts}, {spread}", loc="left", fontsize=10, color=GREY)
            tidy(axes)
        line[0].set_ylabel("useful TFLOP/s")
    for axes in panels[-1]:
        axes.set_xlabel("batch size B")
    panels[0][-1].legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="lower right")
    return figure


def _steps(rows: Sequence[Row], source: Row) -> Figure:
    batches = list(dict.fromkeys(row["B"] for row in rows))
    figure = figure_of(9.0, 0.7 * len(rows) + 1.6, "A step of PGD-7 training, ResNet-18 with a BlockMoE", source)
    panels = figure.subplots(len(batches), 1, squeeze=False)[:, 0]
    for axes, batch in zip(panels, batches, strict=True):
        own = [row for row in rows if row["B"] == batch]
        bars = axes.barh([row["variant"] for row in own], [row["images_per_s"] for row in own], color="#c2410c")
        notes = [
            f"  {row['images_per_s']:,.0f}" + (f"   {row['kernels_a_step']:.0f} kernels" if "longest" in row else "")
            for row in own
        ]
        axes.bar_label(bars, notes, fontsize=9, color=INK)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(f"B = {batch}", loc="left", fontsize=10, color=GREY)
        tidy(axes)
        axes.grid(False, axis="y")
    panels[-1].set_xlabel("images a second")
    return figure
