"""``robust-moe reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robust_moe.commands.shared import (
    STOPPED,
    Imports,
    Overrides,
    SettingsCommand,
    Traceback,
    import_modules,
    new_app,
    one_line_errors,
)
from robust_moe.config import ConfigError
from robust_moe.console import make_console
from robust_moe.engine import Reporter
from robust_moe.outputs import expect_folder
from robust_moe.reproduce import SCALES, STUDIES, StudyResult, claim_line, judge_again, merge_studies, reproduce

__all__ = ["app"]

app = new_app()


@app.command(cls=SettingsCommand)
@one_line_errors
def run_study(
    study: Annotated[str, typer.Argument(help=f"One of: {', '.join(STUDIES)}.", show_default=False)],
    overrides: Overrides = None,
    scale: Annotated[str, typer.Option(help=f"One of: {', '.join(SCALES)}.")] = "cpu",
    seeds: Annotated[int, typer.Option(help="How many seeds every model is trained with.")] = 3,
    first_seed: Annotated[
        int,
        typer.Option(
            help="The first of them: with --seeds 2 --first-seed 3 seeds 3 and 4, to be put together with others "
            "by --judge."
        ),
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(help="Models at a time; default: one a CPU core, one on a GPU.", show_default=False)
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Folder of the run folders; default: runs/study-SCALE, or one for these settings."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Folder of the report; default: report-STUDY (-from-SEED), in that of the runs.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on with what is there, or start anew.")] = True,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="A study.json: decide its claims anew, without training; summary.md beside it or in --out. Repeated "
            "(--judge A.json --judge B.json): put their seeds together first, in --out.",
            show_default=False,
        ),
    ] = None,
    imports: Imports = None,
    show_traceback: Traceback = False,
) -> None:
    """Put published claims to the test: train the models over several seeds, and measure.

    data.root=FOLDER names the images: a folder with train.parquet and test.parquet (columns img or image, and label),
    as CIFAR-10 and CIFAR-100 are published on the Hugging Face Hub; with data.name=cifar10 one that holds the original
    batches.

    Leaves study.json, figures and summary.md. Ctrl-C saves and stops; the same command (without --fresh) goes on.
    """
    settings = import_modules(imports, overrides)
    reporter = Reporter(console=make_console())
    if judge:
        if overrides:
            raise ConfigError(
                "KEY=VALUE: expected no settings with --judge, which trains nothing (each further file is a further "
                f"--judge), got {overrides[0]!r}"
            )
        _show(*_judge(judge, study, out), reporter)
        return
    done = reproduce(
        study,
        scale,
        overrides=settings,
        seeds=seeds,
        first_seed=first_seed,
        workers=jobs,
        runs=runs,
        out=out,
        resume=resume,
        reporter=reporter,
    )
    _show(done, done.path.with_name("summary.md"), reporter)
    if not done.finished:
        raise typer.Exit(STOPPED)


def _judge(files: list[str], study: str, out: str | None) -> tuple[StudyResult, Path]:
    """(what was decided anew, of one file or of several together; its page)."""
    if len(files) == 1:
        folder = Path(files[0]).parent if out is None else expect_folder("out", out)
        return judge_again(files[0], study, out), folder / "summary.md"
    if out is None:
        raise ConfigError(f"out: expected a folder for what is put together of {len(files)} studies, got none")
    done = merge_studies(files, study, out)
    return done, done.path.with_name("summary.md")


def _show(done: StudyResult, page: Path, reporter: Reporter) -> None:
    for part in done.results["parts"].values():
        reporter.line(part["title"])
        for claim in part["claims"]:
            reporter.line(f"  {claim_line(claim)}")
    reporter.line(f"report: {page}")
