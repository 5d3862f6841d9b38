"""What several commands share: options, the one-line errors, how results are shown."""

from __future__ import annotations

import functools
import shlex
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from robust_moe.config import ConfigError, TrainConfig, flatten
from robust_moe.console import make_console
from robust_moe.data import DataError
from robust_moe.engine import CheckpointError
from robust_moe.evaluation import attack_table, results_table
from robust_moe.evaluation.tables import flag_lines, moe_table
from robust_moe.settings import import_plugins, read_list, shown
from robust_moe.signals import StopSignals

__all__ = [
    "STOPPED",
    "Dense",
    "DryRun",
    "Imports",
    "Overrides",
    "ResultFile",
    "SettingsCommand",
    "Traceback",
    "import_modules",
    "new_app",
    "one_line_errors",
    "show",
    "stoppable",
]

# What a user can cause and mend: one line, exit status 2. Anything else is a fault of ours and keeps its traceback.
USERS = (ConfigError, DataError, CheckpointError, FloatingPointError, ValueError, OSError)
GIVEN = "robust_moe.given"  # in a context of Click: the words after the command's name
STOPPED = 130  # exit status of a run that SIGINT or SIGTERM stopped, as shells have it

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, e.g. run.epochs=3.", show_default=False)
]
# a text, as a path does not tell an empty name from the working directory
ResultFile = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Result file, NAME.json; default: beside the checkpoint, another for other settings.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and what it costs, and stop.")]
Dense = Annotated[
    bool,
    typer.Option("--dense", help="The configuration's dense twin: the same network without experts, trained alike."),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module that registers components of your own, as from this folder; may be repeated. "
        "A run remembers it.",
        show_default=False,
    ),
]


class SettingsCommand(TyperCommand):
    """A command that takes settings as KEY=VALUE: ``--epochs 1`` is answered with ``run.epochs=1``, and an error that
    knows ``settings`` which would do with the whole command."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit as end:
            if settings := getattr(end.__cause__, "settings", ()):
                command = f"{ctx.command_path} {shlex.join([*ctx.meta[GIVEN], *settings])}"
                make_console(stderr=True).print(f"try: {command}", soft_wrap=True, highlight=False, markup=False)
            raise

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[GIVEN] = given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter:
            raise
        except Exception as error:  # NoSuchOption of Click, or of Typer's own copy of it
            option = getattr(error, "option_name", "")
            keys = _keys_of(option) if option and hasattr(error, "message") else []
            if keys:
                value = _value_of(option, given)
                settings = " or ".join(f"{key}={value}" for key in keys)
                error.message += f". Settings are given as KEY=VALUE, without dashes: {settings}"  # type: ignore[attr-defined]
            raise


def _keys_of(option: str) -> list[str]:
    """Keys of settings that end with an option's name, or are it with dashes for dots."""
    name = option.lstrip("-").replace("-", "_")
    return [key for key in flatten(TrainConfig()) if name in (key, key.replace(".", "_")) or key.endswith(f".{name}")]


def _value_of(option: str, args: Sequence[str]) -> str:
    """What follows an option on the command line, or a placeholder."""
    for place, word in enumerate(args):
        head, equals, value = word.partition("=")
        if head == option:
            after = args[place + 1] if place + 1 < len(args) else ""
            return value if equals else (after if after and not after.startswith("-") and "=" not in after else "VALUE")
    return "VALUE"


def new_app() -> typer.Typer:
    """An application for one command."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def import_modules(modules: Sequence[str] | None, overrides: Sequence[str] | None) -> list[str]:
    """``overrides``, and the ``modules`` of ``--import`` as ``run.imports``, which a run keeps; they are imported.

    Raises:
        ConfigError: a module that cannot be imported, or ``run.imports`` beside ``--import`` is no list.
    """
    chosen = list(overrides or [])
    if modules:
        import_plugins(modules)
        named: list[Any] = []
        for item in chosen:
            if item.startswith("run.imports="):
                value = read_list(item.partition("=")[2], "run.imports")
                if not isinstance(value, list):
                    raise ConfigError(f"run.imports: expected a list, got {shown(value)}")
                named += value
        chosen.append(f"run.imports=[{', '.join(map(str, [*named, *modules]))}]")
    return chosen


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """``command``, whose :data:`USERS` errors end it with one line and exit status 2."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except USERS as error:
            if kwargs.get("show_traceback"):
                traceback.print_exc()
            else:
                text = " ".join(_sentence(error).split())
                make_console(stderr=True).print(f"error: {text}", style="red", soft_wrap=True)
            raise typer.Exit(2) from error

    return wrapped


class _Interrupt(StopSignals):
    """SIGTERM is as Ctrl-C: what runs inside ends at once, which a journal of finished batches allows."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


@contextmanager
def stoppable(say: Callable[[str], object], resume: bool = True) -> Iterator[None]:
    """An evaluation inside that Ctrl-C or SIGTERM stops ends the command with a sentence that says how to go on, and
    with the exit status :data:`STOPPED`. ``resume``: the command goes on with what is there, as it does without
    ``--fresh``."""
    try:
        with _Interrupt():
            yield
    except KeyboardInterrupt:
        goes_on = "the same command goes on" if resume else "the same command without --fresh goes on"
        say(f"stopped; every finished batch of the evaluation is kept: {goes_on}")
        raise typer.Exit(STOPPED) from None


def _sentence(error: Exception) -> str:
    """What the system says without a name, such as a full disk, with that of the file."""
    if isinstance(error, OSError) and error.filename is not None and error.filename2 is None:
        return f"{error.filename}: could not be read or written ({error.strerror})"
    return str(error)


def show(to: Console, name: str, results: dict[str, Any], written: Path) -> None:
    """The tables and warnings of an evaluation, and where its files are."""
    to.print(_table(name, results))
    if len(results["attacks"]) > 1:
        to.print(attack_table(results))
    if results["moe"] is not None:
        to.print(moe_table(results))
    for line in flag_lines(results):
        to.print(line, soft_wrap=True)
    to.print(f"results: {written}", soft_wrap=True)
    to.print(f"report: {written.with_suffix('.html')}", soft_wrap=True)


def _table(name: str, results: dict[str, Any]) -> Table:
    data = results["data"]
    return results_table([(name, results)], f"{data['name']}, {results['count']:,} {data['split']} images")
