"""The commands of ``robust-moe``, a module each. A module, and PyTorch with it, is imported when its command runs: the
list of commands is shown at once."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["COMMANDS", "app"]

COMMANDS = {  # name: (module, what the list says: the first sentence of its help)
    "train": ("train", "Train, then evaluate the best checkpoint on the test images, and draw the figures."),
    "eval": ("evaluate", "Clean and robust accuracy of a checkpoint, on the images of its configuration."),
    "certify": ("certify", "Certified accuracy over the radius, by bounds on the network or by randomised smoothing."),
    "sweep": ("sweep", "Train every combination of settings with several values, side by side on this machine."),
    "runs": ("runs", "The runs in a folder, side by side: state, accuracies, speed."),
    "export": (
        "export",
        "A trained model as a file that other programs run, or as a folder that from_pretrained reads.",
    ),
    "config": ("config", "Every setting in force, with its unit, its meaning and where it came from."),
    "reproduce": ("reproduce", "Put published claims to the test: train the models over several seeds, and measure."),
    "env": ("env", "Versions, devices, and which implementation of every op can run here."),
    "demo": ("demo", "Train a routed network and its dense twin on handwritten digits, and compare them."),
}


class Commands(TyperGroup):
    """Lists :data:`COMMANDS` without importing them, and imports the one that is called."""

    # ctx: of Click or of Typer's own copy of it, as the version of Typer has it

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> TyperCommand | None:
        return TyperCommand(name, help=COMMANDS[name][1]) if name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None  # or there was an error
        module = import_module(f"robust_moe.commands.{COMMANDS[name][0]}")
        command = typer.main.get_command(module.app)
        command.name = name
        return name, command, rest


app = typer.Typer(
    cls=Commands,
    help="Adversarial training and evaluation of mixture-of-experts vision models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # of every command below too
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robust-moe {metadata.version('robust-moe-kernels')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
