"""The figure of V-MoE's authors: error against the radius of the attack, before and after which loss and routes are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from robust_moe.evaluation.plots import MARKERS, PERCENT, RUNS, new_figure, tidy
from robust_moe.reproduce import runs

__all__ = ["error_over_radius"]


def error_over_radius(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Error, and the mean routing change of a model's layers, over the radius in 255ths; the band is the seeds' range.
    ``found``: by run and seed, what was measured."""
    figure = new_figure(9.0, 4.0, "V-MoE's attack: 40 steps of a 40th of the radius")
    for axes, (of, label) in zip(
        figure.subplots(1, 2), ((_error, "error"), (_change, "routing change, mean of layers")), strict=True
    ):
        for number, (run, seeds) in enumerate(found.items()):
            curves = [each["radii_curve"] for each in seeds.values()]
            values = [value for curve in curves if (value := of(curve)) is not None]
            if not values:
                continue
            radii, color = 255 * np.array(curves[0]["eps"]), RUNS[number % len(RUNS)]
            axes.fill_between(radii, np.min(values, 0), np.max(values, 0), color=color, alpha=0.15, linewidth=0)
            style = f"-{MARKERS[number % len(MARKERS)]}"
            axes.plot(radii, np.mean(values, 0), style, color=color, markersize=3, label=runs.RUNS[run].title)
        tidy(axes, "radius, 255ths", label)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PERCENT)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, fontsize=8, loc="outside lower center")
    return figure


def _error(curve: Mapping[str, Any]) -> np.ndarray:
    return np.array(curve["error"])


def _change(curve: Mapping[str, Any]) -> np.ndarray | None:
    """None: a dense model."""
    layers = [layer["routing_change"] for layer in curve["layers"].values()]
    return np.mean(layers, 0) if layers else None
