"""The commands of ``robust-moe``: train, eval, reproduce, env, demo."""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from robust_moe.config import ConfigError, load_config, preset_names
from robust_moe.data import DataError
from robust_moe.demo import run_demo
from robust_moe.engine import CheckpointError, Reporter, Trainer
from robust_moe.engine.experiment import checkpoint_file
from robust_moe.evaluation import attack_table, results_table, robustbench_json
from robust_moe.evaluation.tables import flag_lines, moe_table
from robust_moe.files import replace_file
from robust_moe.provenance import git_revision, versions
from robust_moe.report import PRESETS, assess, draw
from robust_moe.reproduce import SCALES, STUDIES, claim_line, reproduce
from robust_moe_kernels.env import report

__all__ = ["app"]

app = typer.Typer(
    help="Adversarial training and evaluation of mixture-of-experts vision models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a user can cause and mend: one line, exit status 2. Anything else is a fault of ours and keeps its traceback.
EXPECTED = (ConfigError, DataError, CheckpointError, FloatingPointError, ValueError, OSError)
STOPPED = 130  # exit status of a run that SIGINT or SIGTERM stopped, as shells have it

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. run.epochs=3.", show_default=False)
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]


def _console(stderr: bool = False) -> Console:
    return Console(highlight=False, stderr=stderr)


def _table(name: str, results: dict[str, Any]) -> Table:
    data = results["data"]
    return results_table([(name, results)], f"{data['name']}, {results['count']:,} {data['split']} images")


def _show(console: Console, name: str, results: dict[str, Any], written: Path) -> None:
    console.print(_table(name, results))
    if len(results["attacks"]) > 1:
        console.print(attack_table(results))
    if results["moe"] is not None:
        console.print(moe_table(results))
    for line in flag_lines(results):
        console.print(line, soft_wrap=True)
    console.print(f"results: {written}", soft_wrap=True)
    console.print(f"report: {written.with_suffix('.html')}", soft_wrap=True)


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except EXPECTED as error:
            if kwargs.get("show_traceback"):
                traceback.print_exc()
            else:
                text = " ".join(str(error).split())
                _console(stderr=True).print(f"error: {text}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from error

    return wrapped


@app.command()
@_one_line_errors
def train(
    config: Annotated[str, typer.Argument(help=f"A YAML file, or one of: {', '.join(preset_names())}.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on from last.pt, or start anew.")] = True,
    override: Annotated[
        bool, typer.Option("--override", help="Go on also with a changed configuration; says what changed.")
    ] = False,
    show_traceback: Traceback = False,
) -> None:
    """Train, then evaluate the best checkpoint on the test images, and draw the figures.

    Ctrl-C saves and stops; the same command goes on from there.
    """
    settings = load_config(config, overrides)
    reporter = Reporter(console=_console())
    trainer = Trainer(settings, reporter)
    outcome = trainer.fit(resume=resume, override=override)
    if not trainer.fabric.is_global_zero:
        return
    draw(outcome.folder)
    if not outcome.finished:
        raise typer.Exit(STOPPED)
    results, written = assess(outcome.folder, outcome.folder / "results.json", reporter=reporter)
    _show(reporter.console, outcome.folder.name, results, written)
    reporter.console.print(f"run folder: {outcome.folder}", soft_wrap=True)


@app.command("eval")
@_one_line_errors
def evaluate_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A .pt file, or a run folder: its best.pt.", show_default=False)],
    overrides: Overrides = None,
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
    out: Annotated[
        Path | None, typer.Option(help="Result file; default: beside the checkpoint, another for other settings.")
    ] = None,
    robustbench: Annotated[
        str | None,
        typer.Option(
            metavar="TITLE",
            help="With --preset standard: write RobustBench's entry of that name beside the results too.",
            show_default=False,
        ),
    ] = None,
    show_traceback: Traceback = False,
) -> None:
    """Clean and robust accuracy of a checkpoint; model and split are those of the configuration inside it.

    Writes results as JSON, arrays of every image and an HTML report; the same command goes on after a kill.

    Settings that may change: data.root, data.test_limit, eval.* (eval.seed: of the attack), model.dual.alpha,
    run.accelerator, run.threads.
    """
    settings = list(overrides or [])
    for name, value in (("steps", attack_steps), ("eps", attack_eps), ("restarts", attack_restarts)):
        if value is not None:
            settings.append(f"eval.attack.{name}={value}")
    if batch_size is not None:
        settings.append(f"eval.batch_size={batch_size}")
    if robustbench is not None and preset != "standard":
        raise ConfigError(f"robustbench: expected --preset standard, which it is about, got {preset!r}")
    file = checkpoint_file(checkpoint)
    reporter = Reporter(console=_console())
    results, written = assess(
        file,
        out,
        preset=preset,
        overrides=settings,
        split=split,
        count=n,
        resume=resume,
        beside=beside or (),
        reporter=reporter,
    )
    _show(reporter.console, file.resolve().parent.name if file.stem == "best" else file.stem, results, written)
    if robustbench is not None:
        entry = written.with_name(f"{written.stem}-robustbench.json")
        text = json.dumps(robustbench_json(results, robustbench), indent=2, allow_nan=False)
        replace_file(entry, f"{text}\n".encode())
        reporter.console.print(f"RobustBench entry: {entry}", soft_wrap=True)


@app.command("reproduce")
@_one_line_errors
def run_study(
    study: Annotated[str, typer.Argument(help=f"One of: {', '.join(STUDIES)}.", show_default=False)],
    overrides: Overrides = None,
    scale: Annotated[str, typer.Option(help=f"One of: {', '.join(SCALES)}.")] = "cpu",
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with train.parquet and test.parquet of CIFAR-10.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds every model is trained with.")] = 3,
    jobs: Annotated[
        int | None, typer.Option(help="Models at a time; default: one a CPU core, one on a GPU.", show_default=False)
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder of the run folders; default: runs/study-SCALE, or one for these settings."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the report; default: report-STUDY, in that of the runs.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on with what is there, or start anew.")] = True,
    show_traceback: Traceback = False,
) -> None:
    """Put published claims to the test: train the models over several seeds, measure, and say what held.

    Leaves study.json, figures and summary.md. Ctrl-C saves and stops; the same command (without --fresh) goes on.
    """
    reporter = Reporter(console=_console())
    done = reproduce(
        study,
        scale,
        data_root=data_root,
        overrides=overrides or [],
        seeds=seeds,
        workers=jobs,
        runs=runs,
        out=out,
        resume=resume,
        reporter=reporter,
    )
    for part in done.results["parts"].values():
        reporter.line(part["title"])
        for claim in part["claims"]:
            reporter.line(f"  {claim_line(claim)}")
    reporter.line(f"report: {done.path.with_name('summary.md')}")
    if not done.finished:
        raise typer.Exit(STOPPED)


@app.command()
def env() -> None:
    """Versions, devices, and which implementation of every op can run here."""
    console = _console()
    table = Table(title="software and devices")
    table.add_column("what")
    table.add_column("found")
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("git", git_revision() or "not a checkout")
    console.print(table)
    ops = Table(title="implementations")
    for column in ("op", "implementation", "device", "can run", "why not"):
        ops.add_column(column)
    for row in report():
        mark = ("default" if row.default else "yes") if row.available else "no"
        ops.add_row(row.op, row.impl, row.device, mark, row.reason)
    console.print(ops)


@app.command()
@_one_line_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/demo"),
    epochs: Annotated[int | None, typer.Option(help="Epochs of each run; default: the presets'.")] = None,
    show_traceback: Traceback = False,
) -> None:
    """Train a routed network and its dense twin on handwritten digits with PGD-7, and compare them (minutes)."""
    if len(run_demo(out, epochs, console=_console())) < 2:
        raise typer.Exit(STOPPED)
