"""``robust-moe train``."""

from __future__ import annotations

from typing import Annotated

import typer

from robust_moe.commands.shared import (
    STOPPED,
    Dense,
    DryRun,
    Imports,
    Overrides,
    SettingsCommand,
    Traceback,
    import_modules,
    new_app,
    one_line_errors,
    show,
    stoppable,
)
from robust_moe.config import load_config, preset_names
from robust_moe.console import make_console
from robust_moe.data import suggesting_settings
from robust_moe.dry_run import training_facts
from robust_moe.engine import Reporter
from robust_moe.engine.run_folder import expect_other_folder
from robust_moe.report import assess, draw

__all__ = ["app"]

app = new_app()


@app.command(cls=SettingsCommand)
@one_line_errors
def train(
    config: Annotated[str, typer.Argument(help=f"A YAML file, or one of: {', '.join(preset_names())}.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on from last.pt, or start anew.")] = True,
    override: Annotated[
        bool, typer.Option("--override", help="Go on also with a changed configuration; says what changed.")
    ] = False,
    dense: Dense = False,
    dry_run: DryRun = False,
    imports: Imports = None,
    show_traceback: Traceback = False,
) -> None:
    """Train, then evaluate the best checkpoint on the test images, and draw the figures.

    Ctrl-C saves and stops; the same command goes on from there.
    """
    settings = load_config(config, import_modules(imports, overrides), dense=dense)
    if dry_run:
        with suggesting_settings(settings.data):
            facts = training_facts(settings)
        for what, value in facts:
            make_console().print(f"{what}: {value}", soft_wrap=True)
        return
    expect_other_folder(config, settings.run.out)
    from robust_moe.engine import Trainer  # with Lightning Fabric, only now: a refused setting is said in half the time

    reporter = Reporter(console=make_console())
    with Trainer(settings, reporter) as trainer:  # the folder is this command's until the evaluation is written
        with suggesting_settings(settings.data):
            outcome = trainer.fit(resume=resume, override=override)
        first = trainer.fabric.is_global_zero
        if first:
            draw(outcome.folder, say=reporter.warn)
        if not outcome.finished:
            raise typer.Exit(STOPPED)
        with stoppable(reporter.line):
            results, written = assess(
                outcome.folder, outcome.folder / "results.json", reporter=reporter, world=trainer.world
            )
    if not first:
        return
    show(reporter.console, outcome.folder.name, results, written)
    reporter.console.print(f"run folder: {outcome.folder}", soft_wrap=True)
