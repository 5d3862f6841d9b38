"""What tests of a command's outputs share: files of every kind, and a command that is refused without a change."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.config import load_config, save_config
from robust_moe.engine import Trainer
from robust_moe.evaluation import Journal
from robust_moe.evaluation.plots import new_figure, save_figure

FIT = Trainer.fit
OLD_RUN = Path(__file__).parents[1] / "robust_moe" / "config" / "old_run"  # files of a real run
CERTIFIED = {"format": 1, "by": "ibp", "guarantee": "holds"}
EVALUATED = {"format": 3, "attacks": [], "clean": 0.5}
STUDY = {"format": 3, "study": "rt-er", "parts": {}}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def everything(folder: Path) -> dict[str, object]:
    """What is in a folder: the bytes of files, where links lead, kinds of the rest."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def refused(folder: Path, *arguments) -> str:
    """The one sentence of a command that changes nothing in ``folder``."""
    before = everything(folder)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert everything(folder) == before
    return done.stderr.removeprefix("error: ")


def write_journal(path: Path, **identity) -> None:
    with Journal(path, {"model": "aa", **identity}) as journal:
        journal.put("sanity", {"seconds": 1.0})


def draw(path: Path, command: str) -> None:
    save_figure(new_figure(1, 1), path, command)


def put(path: Path, what: str) -> None:
    """Something of another kind at ``path``."""
    if what == "checkpoint":
        shutil.copy(OLD_RUN / "best.pt", path)
    elif what == "link to a checkpoint":
        shutil.copy(OLD_RUN / "best.pt", path.with_name("kept.pt"))
        path.symlink_to("kept.pt")
    elif what == "hard link to a checkpoint":
        shutil.copy(OLD_RUN / "best.pt", path.with_name("kept.pt"))
        os.link(path.with_name("kept.pt"), path)
    elif what == "journal":
        write_journal(path, preset="quick")
    elif what == "metrics":
        shutil.copy(OLD_RUN / "metrics.jsonl", path)
    elif what == "configuration":
        shutil.copy(OLD_RUN / "config.yaml", path)
    elif what == "data":
        path.write_bytes(b"PAR1" + bytes(range(256)))
    elif what == "JSON":
        path.write_text('{"format": 3, "images": []}')
    elif what == "folder":
        path.mkdir()
    elif what == "FIFO":
        os.mkfifo(path)
    elif what == "link to a device":
        path.symlink_to("/dev/null")
    elif what == "link to itself":
        path.symlink_to(path.name)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # a long path is no address
    else:
        raise AssertionError(what)


FILES = (
    "checkpoint",
    "link to a checkpoint",
    "hard link to a checkpoint",
    "journal",
    "metrics",
    "configuration",
    "data",
    "JSON",
)
OTHERS = {
    "folder": "got the folder",
    "FIFO": "got the FIFO",
    "link to a device": "got the device",
    "socket": "got the socket",
    "link to itself": "Too many levels of symbolic links",
}


def write_run(folder: Path, *overrides: str) -> Path:
    """The files of a real run, and a configuration as runs write it; returns the latter."""
    shutil.copytree(OLD_RUN, folder)
    shutil.copy(folder / "best.pt", folder / "last.pt")
    save_config(load_config("digits-dense", [f"run.out={folder}", *overrides]), folder / "config.yaml")
    return folder / "config.yaml"


def begins(*arguments) -> None:
    """The command is not refused: its work begins."""
    done = run(*arguments)
    assert isinstance(done.exception, AssertionError) and str(done.exception) == "work began", done.output
