"""Figures of the HTML report, as SVG text that takes its colours, light or dark, and its font from the page around it.

Pure functions of the parts of a result file. What a heat map shows is a share: dark is none, bright is most.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from robust_moe.evaluation.plots import (
    CLEAN,
    GRID,
    INK,
    NEUTRAL,
    PERCENT,
    ROBUST,
    RUNS,
    WIDTH,
    draw_tradeoff,
    named_legend,
    new_figure,
    printable,
    tidy,
)

__all__ = ["PALETTE", "class_map", "curve", "inline_svg", "radius_unit", "routing_map", "single_experts", "tradeoff"]

# CSS variable: (drawn and printed, on a dark page). A figure's colour outside of this table is the same on both.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": (INK, "#e6edf3"),
    "muted": (NEUTRAL, "#a3b1c2"),
    "line": (GRID, "#2d3743"),
    "run0": (RUNS[0], "#63b3ed"),
    "run1": (RUNS[1], "#fb923c"),
    "run2": (RUNS[2], "#68d391"),
    "run3": (RUNS[3], "#b794f4"),
    "run4": (RUNS[4], "#ecc94b"),
    "run5": (RUNS[5], "#4fd1c5"),
}
HEAT = "viridis"  # its lightness only rises: it reads the same in grey and to the colour-blind
_VARIABLES = {light: f"var(--{name}, {light})" for name, (light, _) in PALETTE.items()}
_CELL_INK = ("#ffffff", "#111111")  # numbers on a dark and on a bright cell, on either page
_NUMBERED = 16  # columns up to which every cell has its number written in it


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """``figure`` as an ``<svg>`` element without ids of other figures, addresses or a date: the same text every time.

    Args:
        name: of the figure in its page; its ids start with it.
        label: what the figure shows, for those who do not see it.
    """
    drawn = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    options = matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "robust-moe", "svg.image_inline": True})
    with options, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the page's font draws the text
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(drawn.getvalue())
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", drawn.getvalue().decode()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # an HTML page needs no namespaces
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            plain = key.rpartition("}")[2]
            if plain != "id" or value in used:  # equal images have equal ids
                element.set(plain, _own(plain, value, name))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "style":  # of every element of the page, as it stands
                parent.remove(child)
    width = figure.get_figwidth() * 110  # CSS pixels
    wide = figure.get_figwidth() > 1.3 * WIDTH
    least = 0.65 * width if wide else 0  # below which its text is not legible: there the page scrolls
    for key in ("version", "width", "height"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("style", f"width:{width:.0f}px;min-width:{least:.0f}px")
    return ElementTree.tostring(root, encoding="unicode")


def _own(key: str, value: str, name: str) -> str:
    """An SVG attribute as the page needs it: ids that start with ``name``, the page's colours, no font."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("\n", "") if value.startswith("data:") else value.replace("#", f"#{name}-")
    if key == "style":
        value = re.sub(r"font-family:[^;]*;?", "", value)
        value = re.sub(r"(?<!url\()#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found[0], found[0]), value)
    return value.replace("url(#", f"url(#{name}-")


def tradeoff(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """Clean against robust accuracy of (name, results) with 95 % intervals; the first is the reported model."""
    figure = new_figure(WIDTH, 3.8 + 0.2 * len(rows))
    draw_tradeoff(figure.subplots(), rows)
    return figure


def radius_unit(results: Mapping[str, Any]) -> tuple[int, str]:
    """By what a curve's radii are multiplied to be written, and what then follows them: 255ths where they are such."""
    levels = 255 * np.array(results["curve"]["eps"], dtype=float)
    return (255, "/255") if np.allclose(levels, np.rint(levels), rtol=0, atol=1e-9) else (1, "")


def curve(results: Mapping[str, Any]) -> Figure:
    """Robust accuracy against the radius: the ``curve`` of results, one attack throughout. The worst case of all
    attacks at ``eps`` is not in it: over more attacks it is lower, and no point of this curve."""
    radii = np.array(results["curve"]["eps"], dtype=float)
    robust = np.array(results["curve"]["robust"], dtype=float)
    chosen = float(Fraction(results["eps"]))
    scale, unit = radius_unit(results)
    order = np.argsort(radii, kind="stable")
    figure = new_figure(WIDTH, 4.1)
    axes = figure.subplots()
    (line,) = axes.plot(scale * radii[order], robust[order], "-s", color=ROBUST, markersize=4, linewidth=1.4)
    handles: list[Artist | tuple[Artist, ...]] = [line]
    names = ["under the curve's attack"]
    (point,) = axes.plot(0, results["clean"], "o", color=CLEAN, markersize=8, clip_on=False)
    handles, names = [*handles, point], [*names, "clean"]
    handles.append(axes.axvline(scale * chosen, color=NEUTRAL, linewidth=0.9, linestyle=":"))
    names.append("the report's ε")
    tidy(axes, f"radius ε ({results['norm']}{', in 255ths' if unit else ''})", "robust accuracy")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, None)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    named_legend(axes, handles, names, columns=2)
    return figure


def _heat(axes: Axes, shares: np.ndarray, top: float, numbered: bool) -> AxesImage:
    """A map of ``shares`` [rows, columns], NaN left blank; ``top`` is the brightest colour's share."""
    image = axes.imshow(
        np.ma.masked_invalid(shares), aspect="auto", cmap=HEAT, vmin=0, vmax=top, interpolation="none", resample=False
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(color=NEUTRAL, labelcolor=NEUTRAL, length=0)
    if len(shares) <= _NUMBERED:
        for edge in np.arange(0.5, len(shares) - 1):
            axes.axhline(edge, color="#ffffff", linewidth=0.6)
    if numbered:
        for (row, column), share in np.ndenumerate(shares):
            if np.isfinite(share):
                ink = _CELL_INK[int(share > 0.45 * top)]
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
    return image


def _bar(figure: Figure, image: AxesImage, axes: Any, label: str) -> None:
    bar = figure.colorbar(
        image, ax=axes, format=PERCENT, pad=0.015, fraction=0.03, aspect=max(12, 7 * figure.get_figheight())
    )
    bar.outline.set_visible(False)
    assert bar.solids is not None  # a colorbar of an image has them
    bar.solids.set_edgecolor("face")
    bar.set_label(label, color=INK)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.tick_params(color=NEUTRAL, labelcolor=NEUTRAL)


def routing_map(uses: Mapping[str, Sequence[float]]) -> Figure:
    """Share of the images sent to each expert (column), a row for every name; rows of fewer experts end early."""
    shares = np.full((len(uses), max(map(len, uses.values()))), np.nan)
    for row, use in zip(shares, uses.values(), strict=True):
        row[: len(use)] = use
    figure = new_figure(min(10.5, max(WIDTH, 2.6 + 0.36 * shares.shape[1])), 1.1 + 0.36 * len(shares))
    axes = figure.subplots()
    even = min(1.0, 2 * np.nanmean(shares))  # so that even use is not the brightest
    image = _heat(axes, shares, max(_top(shares), even), shares.shape[1] <= _NUMBERED)
    axes.set_yticks(range(len(uses)), list(map(printable, uses)), parse_math=False)
    axes.set_xticks(range(0, shares.shape[1], max(1, shares.shape[1] // 32)))
    axes.set_xlabel("expert", color=INK)
    _bar(figure, image, axes, "of the images")
    return figure


def class_map(by_class: Mapping[str, Sequence[Sequence[float | None] | None]], classes: Sequence[str]) -> Figure:
    """Share of each class's images (column) sent to each expert (row): natural, and below it attacked.

    Args:
        by_class: ``"clean"`` and ``"adversarial"``: for each of C classes the shares of E experts, or None where the
            class has no image.
        classes: C names.
    """
    experts = max((len(row) for rows in by_class.values() for row in rows if row is not None), default=1)
    maps = {kind: np.full((experts, len(classes)), np.nan) for kind in ("clean", "adversarial")}
    for kind, shares in maps.items():
        for column, row in enumerate(by_class[kind]):
            if row is not None:
                shares[: len(row), column] = np.array(row, dtype=float)
    few = len(classes) <= _NUMBERED
    labels = [printable(name)[:14] for name in classes]
    upright = len(classes) <= _NUMBERED and max(map(len, labels)) <= 3
    height = 0.9 + max(1.2, (0.28 if experts <= _NUMBERED else 0.11) * experts) + (0 if upright else 0.5)
    figure = new_figure(max(WIDTH, 1.9 + 0.34 * len(classes)) if few else 10.5, 2 * height)
    panels = figure.subplots(2, 1)
    top = _top(np.concatenate([*maps.values()]))
    for axes, (shares, title) in zip(
        panels, ((maps["clean"], "natural"), (maps["adversarial"], "attacked")), strict=True
    ):
        image = _heat(axes, shares, top, few and experts <= _NUMBERED)
        axes.set_title(title, fontsize=10, color=INK)
        size = 9 if len(labels) <= 40 else 6
        turned = {} if upright else {"rotation": 90, "ha": "right", "va": "center", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(labels)), labels, fontsize=size, parse_math=False, **turned)
        step = max(1, experts // 16)
        axes.set_yticks(range(0, experts, step))
    for axes in panels:
        axes.set_ylabel("expert", color=INK)
    panels[-1].set_xlabel("class", color=INK)
    _bar(figure, image, list(panels), "of the class")
    return figure


def single_experts(experts: Sequence[Mapping[str, Any]], gated: Mapping[str, float]) -> Figure:
    """Accuracy of each expert alone (dots), clean and attacked through it, against the gated model's (lines).

    Args:
        experts: ``expert`` (its number), ``clean`` and ``robust`` shares.
        gated: the whole model's ``clean`` and ``robust`` share under the same attack.
    """
    figure = new_figure(min(10.5, max(WIDTH, 2.0 + 0.3 * len(experts))), 3.8)
    axes = figure.subplots()
    handles, names = [], []
    for kind, color, marker, style in (("clean", CLEAN, "o", "-"), ("robust", ROBUST, "s", "--")):
        handles.append(axes.axhline(gated[kind], color=color, linewidth=1.4, linestyle=style))
        names.append(f"gated model, {kind}")
        shares = [(row["expert"], row[kind]) for row in experts if row[kind] is not None]
        handles += axes.plot(*np.array(shares).reshape(-1, 2).T, marker, color=color, markersize=7)
        names.append(f"expert alone, {kind}")
    tidy(axes, "expert", "accuracy")
    axes.grid(False, axis="x")
    axes.set_ylim(0, 1.02)
    numbers = [row["expert"] for row in experts]
    axes.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    axes.set_xticks(numbers)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    named_legend(axes, handles, names, columns=2)
    return figure


def _top(shares: np.ndarray) -> float:
    """The largest share, which a heat map's brightest colour stands for; 1 where there is none above zero."""
    finite = shares[np.isfinite(shares)]
    return float(finite.max()) if finite.size and finite.max() > 0 else 1.0
