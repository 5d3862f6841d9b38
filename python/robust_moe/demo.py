"""The demonstration: adversarial training of a routed network and of its dense twin on real images, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from robust_moe.config import load_config
from robust_moe.console import make_console
from robust_moe.engine import Reporter, Trainer
from robust_moe.evaluation import plot_comparison, results_table
from robust_moe.evaluation.tables import attack_name
from robust_moe.outputs import expect_folder, expect_outputs, figure, run_outputs
from robust_moe.report import assess, draw

__all__ = ["PRESETS", "run_demo"]

PRESETS = ("digits-blockmoe", "digits-dense")


def run_demo(
    out: str | Path = "runs/demo",
    epochs: int | None = None,
    *,
    overrides: list[str] | None = None,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Train both :data:`PRESETS` with PGD-7, attack their best checkpoints with PGD-20, and draw the figures.

    Each gets a run folder ``out/<preset>``: config.yaml, metrics.jsonl, tensorboard/, best.pt, last.pt, results.json
    and PNG figures; ``out/comparison.png`` puts them side by side. A run that is already there is gone on with.

    Args:
        epochs: None: the presets' own.
        overrides: settings for both, e.g. ``["run.seed=1"]``.
        console: None: standard output.

    Returns:
        The results of each preset, as in its results.json; those of the runs that a signal stopped are missing.
    """
    console = console or make_console()
    reporter = Reporter(console=console)
    out = expect_folder("out", out)
    folders = {preset: out / preset for preset in PRESETS}
    runs = [output for folder in folders.values() for output in run_outputs(folder)]
    expect_outputs("out", [*runs, (out / "comparison.png", figure("demo"))])
    results: dict[str, dict[str, Any]] = {}
    for preset in PRESETS:
        length = [] if epochs is None else [f"run.epochs={epochs}"]
        config = load_config(preset, [*(overrides or []), *length, f"run.out={out / preset}"])
        console.rule(preset)
        with Trainer(config, reporter) as trainer:
            if not trainer.fit(resume=True).finished:
                return results
            results[preset], _ = assess(out / preset, out / preset / "results.json", reporter=reporter)
            draw(out / preset, say=reporter.warn)
    rows = list(results.items())
    label = attack_name(rows[0][1])
    plot_comparison(rows, out / "comparison.png", title=f"Handwritten digits: clean and robust accuracy ({label})")
    console.print(results_table(rows, f"Handwritten digits, {rows[0][1]['count']} test images"))
    reporter.line(f"run folders, figures and results: {out}")
    return results
