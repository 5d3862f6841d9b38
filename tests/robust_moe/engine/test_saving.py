"""Trainings whose checkpoints meet full disks, damage, another training in their folder."""

import errno
import io
import os
import shlex
import shutil
from contextlib import ExitStack

import pytest
from rich.console import Console
from small_runs import assert_same, assert_same_run

from robust_moe.config import ConfigError
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint, run_folder
from robust_moe.engine.run_checkpoints import past_checkpoints


def make(config):
    console = Console(record=True, width=400, file=io.StringIO())
    return Trainer(config, Reporter(enabled=False, console=console))


@pytest.fixture
def whole(tiny, tmp_path):
    """The folder of a run that nothing disturbed."""
    assert make(tiny("run.checkpoint_steps=1", out="whole")).fit().finished
    return tmp_path / "whole"


def test_a_training_outlives_a_disk_that_is_full_for_a_while(tiny, whole, tmp_path, monkeypatch):
    trainer, real = make(tiny("run.checkpoint_steps=1")), os.replace

    def replace(source, target):
        if str(target).endswith(".pt") and 2 <= trainer.state.step <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert trainer.fit().finished
    monkeypatch.undo()
    assert_same_run(tmp_path / "run", whole)
    said = trainer.reporter.console.export_text()
    assert "warning: " in said and "No space left on device" in said and "the training goes on" in said


def test_past_checkpoints_are_those_of_then_and_a_damaged_last_one_is_gone_on_from_by_hand(tiny, whole, tmp_path):
    config = tiny("run.checkpoint_steps=1", "run.keep=3")
    assert make(config).fit().finished
    folder = tmp_path / "run"
    assert list(past_checkpoints(folder)) == [5, 6, 7]
    last = folder / "last.pt"
    for path in (last, folder / "best.pt"):  # both of the last step here
        path.write_bytes(path.read_bytes()[:5000])
    damaged = last.read_bytes()
    with pytest.raises(CheckpointError, match=r"last.pt: expected a whole checkpoint, got a truncated") as error:
        make(config).fit()
    assert last.read_bytes() == damaged  # it never goes back by itself
    command = str(error.value).partition("to go on from the newest whole one: ")[2]
    name, source, target = shlex.split(command)
    assert (name, source, target) == ("cp", f"{folder}/step-7.pt", f"{folder}/last.pt")
    shutil.copy(source, target)
    assert load_checkpoint(last)["position"]["step"] == 7
    assert make(config).fit().finished
    states = [load_checkpoint(place / name) for place in (folder, whole) for name in ("last.pt", "best.pt")]
    for state in states:
        for name in ("out", "keep"):
            state["config"]["run"].pop(name)
    assert_same(states[0], states[2])
    assert_same(states[1], states[3])
    assert list(past_checkpoints(folder)) == [5, 6, 7]
    assert make(tiny()).fit(resume=False).finished
    assert not past_checkpoints(folder)  # of the run before


def test_where_a_file_system_has_no_locks_the_training_that_began_last_has_the_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "lock", lambda *_, **__: True)
    config = tiny("run.checkpoint_steps=1")
    first, folder = make(config), tmp_path / "run"
    step, left = first._step, {}

    def files():
        return {path.name: path.read_bytes() for path in folder.glob("*.pt")}

    with ExitStack() as others:

        def disturbed(batch):
            if first.state.step == 3 and not left:
                first.writer.wait()
                assert others.enter_context(make(config)).fit().finished  # and it keeps the folder
                left.update(files())
            step(batch)

        first._step = disturbed
        with pytest.raises(ConfigError, match=r"no other training works in, got .*run, where another one has begun"):
            first.fit()
        assert first.state.step in (4, 5)  # the save of step 4 met it, the next log line or save says so
        assert files() == left
        assert (folder / run_folder.LOCK).exists()  # the other's
    assert not (folder / run_folder.LOCK).exists()
