"""``robust-moe eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_moe.commands.shared import (
    DryRun,
    Imports,
    Overrides,
    ResultFile,
    SettingsCommand,
    Traceback,
    import_modules,
    new_app,
    one_line_errors,
    show,
    stoppable,
)
from robust_moe.config import ConfigError
from robust_moe.console import make_console
from robust_moe.dry_run import evaluation_facts
from robust_moe.engine import Reporter
from robust_moe.engine.experiment import checkpoint_file
from robust_moe.engine.foreign import foreign_of
from robust_moe.engine.world import meet, world_of
from robust_moe.evaluation import PRESETS
from robust_moe.evaluation.common import checkpoint_name
from robust_moe.outputs import robustbench_file
from robust_moe.report import assess

__all__ = ["app"]

app = new_app()


@app.command(cls=SettingsCommand)
@one_line_errors
def evaluate_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run folder: its best.pt; a checkpoint; a folder of save_pretrained; with --model a plain state "
            "dict; an exported model (.pt2), whose code may run here.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What a plain state dict is of: a model.name such as torchvision:resnet18, or a preset or YAML file. "
            "All settings may be given then.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Of a plain state dict or an exported model, what its images are normalised by: data, none, imagenet, "
            "cifar10, ... or MEAN/STD such as 0.5,0.5,0.5/0.25,0.25,0.25; default: of a state dict the data's "
            "statistics, of an exported model none.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {what}" for name, what in PRESETS.items()) + ".")
    ] = "quick",
    n: Annotated[
        int | None, typer.Option("--n", help="Only so many images, the first of every class.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="As eval.batch_size=...", show_default=False)] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on where a killed evaluation was, or start anew.")
    ] = True,
    attack_steps: Annotated[int | None, typer.Option(help="As eval.attack.steps=...", show_default=False)] = None,
    attack_eps: Annotated[
        str | None, typer.Option(help="As eval.attack.eps=..., e.g. 8/255.", show_default=False)
    ] = None,
    attack_restarts: Annotated[int | None, typer.Option(help="As eval.attack.restarts=...", show_default=False)] = None,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="A result file of another model to show in the report; may be repeated.", show_default=False),
    ] = None,
    out: ResultFile = None,
    robustbench: Annotated[
        str | None,
        typer.Option(
            metavar="TITLE",
            help="With --preset standard or full: write RobustBench's entry of that name beside the results too.",
            show_default=False,
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Attack in bfloat16 where that is faster; every verdict is scored in float32, and the results say so.",
        ),
    ] = False,
    dry_run: DryRun = False,
    imports: Imports = None,
    show_traceback: Traceback = False,
) -> None:
    """Clean and robust accuracy of a checkpoint, on the images of its configuration.

    Writes results as JSON, arrays of every image and an HTML report. Ctrl-C stops, and the same command goes on
    after the last finished batch, also after a kill. Under torchrun its processes share the batches.

    Settings of a checkpoint that may change: data.root, data.test_limit, eval.* (eval.seed: of the attack),
    model.dual.alpha, model.moe.inference, model.mixture.inference, run.accelerator, run.threads.
    """
    settings = import_modules(imports, overrides)
    for name, value in (("steps", attack_steps), ("eps", attack_eps), ("restarts", attack_restarts)):
        if value is not None:
            settings.append(f"eval.attack.{name}={value}")
    if batch_size is not None:
        settings.append(f"eval.batch_size={batch_size}")
    if robustbench is not None and preset not in ("standard", "full"):
        raise ConfigError(f"robustbench: expected --preset standard, which it is about, got {preset!r}")
    file = checkpoint_file(checkpoint)
    foreign = foreign_of(file, model, normalize)
    if dry_run:
        for what, value in evaluation_facts(file, settings, preset=preset, split=split, count=n, foreign=foreign):
            make_console().print(f"{what}: {value}", soft_wrap=True)
        return
    world = world_of(1)
    meet(world)
    reporter = Reporter(console=make_console())
    reporter.enabled = reporter.enabled and world.rank == 0
    with stoppable(reporter.line, resume):
        results, written = assess(
            file,
            out,
            preset=preset,
            overrides=settings,
            split=split,
            count=n,
            resume=resume,
            beside=beside or (),
            robustbench=robustbench,
            fast=fast,
            foreign=foreign,
            reporter=reporter,
            world=world,
        )
    if world.rank > 0:
        return
    show(reporter.console, checkpoint_name(file.resolve()), results, written)
    if robustbench is not None:
        reporter.line(f"RobustBench entry: {robustbench_file(written)}")
