"""Command line of a clone's benchmarks: those of ``robust_moe.benchmarks``, and programs that need the clone."""

from __future__ import annotations

import importlib
import sys

from robust_moe.benchmarks.command import main as benchmarks
from robust_moe.console import show_any_text

# A program is imported when it is asked for by name: see robust_moe/benchmarks/command.py.

# Programs with options of their own: name -> (module whose ``main`` runs, what it shows).
PROGRAMS = {
    "gpu_campaign": ("benchmarks.gpu_campaign.runner", "all that fifteen minutes of a GPU can answer"),
    "launches": ("benchmarks.launches", "kernel launches of a step, counted without a GPU"),
    "schedule": ("benchmarks.schedule", "tiles of the grouped convolution and their schedule, without a GPU"),
    "sass": ("benchmarks.sass", "instructions and registers of its compiled loops, without a GPU"),
    "speedrun": ("benchmarks.speedrun", "the speed-run's ingredients, one by one, on the CPU"),
    "timm_blocks": ("benchmarks.timm_blocks", "which blocks of timm's residual networks become experts"),
    "cluster": ("benchmarks.cluster", "a step on 8, 64 and 512 GPUs, on paper"),
    "published": ("benchmarks.published", "what the published numbers of Robust Experts say about its claims"),
    "plots": ("benchmarks.plots", "figures of results"),
}


def main() -> None:
    show_any_text(sys.stdout)
    if sys.argv[1:2] and sys.argv[1] in PROGRAMS:
        name = sys.argv.pop(1)
        sys.argv[0] = f"python -m benchmarks {name}"
        sys.exit(importlib.import_module(PROGRAMS[name][0]).main())
    benchmarks("python -m benchmarks", {name: about for name, (_, about) in PROGRAMS.items()})


if __name__ == "__main__":
    main()
