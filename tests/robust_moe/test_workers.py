"""Processes side by side: what ends one of them ends no other, and is said."""

from __future__ import annotations

import io
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from robust_moe import workers
from robust_moe.engine import Reporter
from robust_moe.workers import Work, run_side_by_side


class Script(Work):
    """Python code, run in a folder of its own; finished where it leaves a file ``done`` there."""

    threads = None

    def __init__(self, folder: Path, code: str, cost: int = 1) -> None:
        folder.mkdir()
        self.folder, self.code, self.cost = folder, textwrap.dedent(code), cost
        self.name, self.log = folder.name, folder / "log.txt"

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.code, str(self.folder)]

    def finished(self) -> str | None:
        return "done" if (self.folder / "done").exists() else None

    def progress(self) -> float:
        raise FileNotFoundError(str(self.folder))  # as where the folder has just been deleted


ENDS = "import pathlib, sys; pathlib.Path(sys.argv[1], 'done').touch()"
KILLED = """
    import os, signal
    print("the last line, which says nothing of the kill", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
DELETED = "import shutil, sys; shutil.rmtree(sys.argv[1]); sys.exit(1)"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (KILLED, "exit status -9: killed by SIGKILL"),
        (DELETED, "exit status 1: its log cannot be read: No such file or directory"),
        ("print('said\\n\\n'); raise SystemExit(3)", "exit status 3: said"),
        ("raise SystemExit(3)", "exit status 3: no output"),
    ],
)
def test_what_ended_a_process_is_said_and_the_next_runs(tmp_path, monkeypatch, code, words):
    monkeypatch.setattr(workers, "REFRESH", 0.0)  # looks at the progress, again and again
    works = [Script(tmp_path / "first", code, cost=2), Script(tmp_path / "second", ENDS)]
    said = io.StringIO()
    outcome = run_side_by_side("test", works, 1, Reporter(console=Console(file=said, width=200)))
    assert outcome.failed == {"first": f"{words} (log: {tmp_path / 'first' / 'log.txt'})"}
    assert not outcome.stopped and works[1].finished()
    assert f"first failed: {words.partition(': ')[2]}" in said.getvalue() and "second: done" in said.getvalue()
