"""One training in a folder at a time, whatever became of the last one."""

import io
import os
import subprocess
import sys
import textwrap

import pytest
from rich.console import Console
from small_runs import assert_same_run
from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.commands import train as train_command
from robust_moe.config import ConfigError, save_config
from robust_moe.engine import Reporter, Trainer, run_folder
from robust_moe.engine.run_folder import LOCK, alone_in, is_running
from robust_moe.files import lock
from robust_moe.report import assess

OTHERS = "run.out: expected a folder that no other training works in, got {folder}"


def trainer(config):
    return Trainer(config, Reporter(enabled=False, console=Console(quiet=True, file=io.StringIO())))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_second_training_is_refused_and_nothing_is_lost(tiny, tmp_path):
    trainer(tiny(out="alone")).fit()
    first = trainer(tiny())
    step, refused = first._step, []

    def disturbed(batch):
        step(batch)
        first.writer.wait()  # a checkpoint of the first may be on its way
        before = files(first.folder)
        for resume in (True, False):
            with pytest.raises(ConfigError) as error:
                trainer(tiny()).fit(resume=resume)
            refused.append(str(error.value))
        assert files(first.folder) == before

    first._step = disturbed
    assert first.fit().finished
    assert refused == [OTHERS.format(folder=tmp_path / "run")] * 16
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    assert trainer(tiny()).fit(resume=False).finished  # the first has let go
    assert LOCK not in files(first.folder)


# trains until it is asked, says so, and waits for an answer that never comes
WAITING = """
    import sys
    from robust_moe.config import load_config
    from robust_moe.engine import Reporter, Trainer

    trainer = Trainer(load_config(sys.argv[1]), Reporter(enabled=False))
    step = trainer._step

    def waiting(batch):
        if trainer.state.step == 5:
            print("ready", flush=True)
            sys.stdin.read()
        step(batch)

    trainer._step = waiting
    trainer.fit()
"""


def test_the_command_is_refused_in_one_sentence_until_the_other_process_is_killed(tiny, tmp_path):
    trainer(tiny(out="alone")).fit()
    config = tmp_path / "run.yaml"
    save_config(tiny(), config)
    command = [sys.executable, "-c", textwrap.dedent(WAITING), str(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert "ready\n" in other.stdout  # read up to there: the run may have warned
        second = CliRunner().invoke(app, ["train", str(config)])
        other.kill()
    assert second.exit_code == 2
    assert second.stderr == f"error: {OTHERS.format(folder=tmp_path / 'run')}\n"
    assert (tmp_path / "run" / LOCK).exists()  # the file outlives its process, the lock does not
    assert trainer(tiny()).fit().finished
    assert not (tmp_path / "run" / LOCK).exists()
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_the_folder_is_the_command_s_until_its_evaluation_is_written(tiny, tmp_path, monkeypatch):
    save_config(tiny("run.epochs=1"), tmp_path / "run.yaml")
    refused = []

    def disturbed(folder, *rest, **options):
        with pytest.raises(ConfigError) as error:
            trainer(tiny("run.epochs=1")).fit(resume=False)
        refused.append(str(error.value))
        return assess(folder, *rest, **options)

    monkeypatch.setattr(train_command, "assess", disturbed)
    assert CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")]).exit_code == 0
    assert refused == [OTHERS.format(folder=tmp_path / "run")]
    assert {"results.json", "last.pt"} <= files(tmp_path / "run").keys()
    assert LOCK not in files(tmp_path / "run")
    with trainer(tiny("run.epochs=1")) as mine:
        for _ in range(2):  # the second goes on under the lock of the first
            assert mine.fit().finished
        assert LOCK in files(mine.folder)
    assert LOCK not in files(mine.folder)


def test_a_refused_run_leaves_no_folder(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"layr2"):
        trainer(tiny("model.moe.layers=[layr2.1]", out="deep/run")).fit()
    assert not (tmp_path / "deep").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"layr2"):
        trainer(tiny("model.moe.layers=[layr2.1]", out="mine")).fit()
    assert (tmp_path / "mine").exists()


def test_a_note_in_the_configuration_stays_while_the_run_goes_on(tiny):
    config = tiny("run.checkpoint_steps=2", out="run#1")
    first = trainer(config)
    step, path = first._step, first.folder / "config.yaml"

    def killed(batch):
        step(batch)
        if first.state.step == 5:
            raise KeyboardInterrupt

    first._step = killed
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    noted = f"{path.read_text()}# my note\n"
    path.write_text(noted)
    before = files(first.folder)
    for options in ({"resume": False}, {"override": True}):
        with pytest.raises(
            ConfigError, match="the configuration of an earlier run, which has no comments, got another"
        ):
            trainer(config).fit(**options)
    assert files(first.folder) == before
    assert trainer(config).fit().steps == 8
    assert path.read_text() == noted
    assert files(first.folder)["last.pt"] != before["last.pt"]


def test_a_training_that_starts_while_its_folder_is_looked_at_waits_for_the_look(tmp_path, monkeypatch):
    (tmp_path / LOCK).touch()
    with open(tmp_path / LOCK, "rb") as look:
        assert lock(look, shared=True)
        assert not is_running(tmp_path)  # another look is no training
        monkeypatch.setattr(run_folder.time, "sleep", lambda _: look.close())
        with alone_in(tmp_path):
            assert look.closed and is_running(tmp_path)


def test_what_is_no_file_in_the_place_of_the_lock_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    assert not is_running(tmp_path)
