"""``robust-moe sweep``: what is refused, passed over, gone on with and said."""

from __future__ import annotations

import json
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
from fake_runs import make_run, write_results
from output_files import everything, refused, run
from rich.console import Console
from small_runs import TINY, assert_same_run

from robust_moe.commands import sweep as command
from robust_moe.config import ConfigError, load_config, save_config
from robust_moe.engine import Reporter, Trainer, read_metrics
from robust_moe.runs import plan_sweep, run_sweep
from robust_moe.runs import sweep as sweeping

GRID = ("optim.lr=0.05,0.1", "run.seed=0,1")

# takes the place of a training: says that it ran, and leaves the run folder that is planted for it
STUB = """
    import os, pathlib, shutil, signal, sys
    assert sys.argv[1] == "train"
    folder = pathlib.Path(sys.argv[-1].removeprefix("run.out="))
    root = folder.parents[1]
    with open(root / "order", "a") as order:
        order.write(f"{folder.name} {os.environ.get('OMP_NUM_THREADS')}\\n")
    if folder.name == os.environ.get("FAILS"):
        sys.exit("error: planted")
    if folder.name == os.environ.get("STOPS"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        os.kill(os.getppid(), signal.SIGTERM)
        sys.stdin.read()  # until the signal comes
    shutil.copytree(root / "planted" / folder.name, folder, dirs_exist_ok=True)
"""


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """(runs of a sweep, what ran so far): the command line's worker trains nothing."""
    (tmp_path / "stub.py").write_text(textwrap.dedent(STUB))
    monkeypatch.setattr(command, "run_sweep", partial(run_sweep, worker=(sys.executable, tmp_path / "stub.py")))
    runs = plan_sweep("digits-dense", [*GRID, "run.epochs=3"], tmp_path / "out")
    for each in runs:
        planted = make_run(tmp_path / "planted" / each.name)
        save_config(each.config, planted / "config.yaml")
        write_results(planted)
    order = tmp_path / "order"
    return runs, lambda: [line.split()[0] for line in order.read_text().splitlines()] if order.exists() else []


def sweep(tmp_path: Path, *more: str):
    return run("sweep", "digits-dense", *GRID, "run.epochs=3", "--out", tmp_path / "out", *more)


def test_every_combination_is_trained_once(stubbed, tmp_path):
    runs, ran = stubbed
    done = sweep(tmp_path)
    assert done.exit_code == 0, done.output
    assert sorted(ran()) == [each.name for each in runs] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "4 runs, 0 finished already" in done.output
    assert done.output.count("test images: SA 50.0%  RA 25.0%") == 4
    assert done.output.count("3/3") == 4  # the table at the end
    done = sweep(tmp_path)
    assert done.exit_code == 0 and "4 runs, 4 finished already" in done.output and len(ran()) == 4
    more = run("sweep", "digits-dense", GRID[0], "run.seed=0,1,2", "run.epochs=3", "--out", tmp_path / "out")
    assert len(ran()) == 6  # two more values, and only they: for them nothing is planted
    assert more.exit_code == 2 and "2 of 6 runs failed" in more.stderr


def test_a_run_that_fails_is_said_and_the_others_go_on(stubbed, tmp_path, monkeypatch):
    runs, ran = stubbed
    monkeypatch.setenv("FAILS", runs[1].name)
    done = sweep(tmp_path, "--jobs", "2")
    assert done.exit_code == 2
    assert f"warning: {runs[1].name} failed: error: planted" in done.output
    said = f"error: 1 of 4 runs failed; {runs[1].name}: exit status 1: error: planted (log: "
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert len(ran()) == 4 and done.output.count("3/3") == 3
    monkeypatch.delenv("FAILS")
    assert sweep(tmp_path).exit_code == 0
    assert ran()[4:] == [runs[1].name]


def test_a_signal_stops_all_and_the_same_command_goes_on(stubbed, tmp_path, monkeypatch):
    runs, ran = stubbed
    monkeypatch.setenv("STOPS", runs[1].name)
    done = sweep(tmp_path, "--jobs", "1")
    assert done.exit_code == 130, done.output
    assert "stopped; the same command goes on" in done.output and "failed" not in done.output
    assert ran() == [runs[0].name, runs[1].name]
    monkeypatch.delenv("STOPS")
    assert sweep(tmp_path, "--jobs", "1").exit_code == 0
    assert ran()[2:] == [runs[1].name, runs[2].name, runs[3].name]


def test_a_trained_run_without_its_evaluation_goes_on(stubbed, tmp_path):
    runs, ran = stubbed
    assert sweep(tmp_path).exit_code == 0
    (runs[2].folder / "results.json").unlink()
    assert sweep(tmp_path).exit_code == 0
    assert ran()[4:] == [runs[2].name]


def test_side_by_side_runs_share_the_cores(stubbed, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "cpu_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    quiet = Reporter(enabled=False, console=Console(quiet=True))
    runs, _ = stubbed
    planned = plan_sweep("digits-dense", [*GRID, "run.epochs=3", "run.threads=null"], tmp_path / "out")
    command.run_sweep(planned[:2], 2, quiet)
    command.run_sweep(planned[2:], 1, quiet)
    command.run_sweep(plan_sweep("digits-dense", [*GRID, "run.threads=3"], tmp_path / "other" / "out")[:1], 2, quiet)
    lines = dict(line.split() for line in (tmp_path / "order").read_text().splitlines())
    assert lines == {runs[0].name: "4", runs[1].name: "4", runs[2].name: "None", runs[3].name: "None"}
    assert (tmp_path / "other" / "order").read_text() == f"{runs[0].name} 3\n"  # as asked for
    with pytest.raises(ConfigError, match="jobs: expected a count >= 1, got 0"):
        run_sweep(planned, 0, quiet)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.lrr=0.1,0.2"], "unknown key 'optim.lrr' of optimiser 'sgd'; did you mean 'optim.lr'"),
        (["method=pgd_at,trades", "method.beta=1,2"], "unknown key 'method.beta'"),  # of one combination
        (["run.seed=0,-1"], "run.seed: expected a whole number"),
        (["run.out=a,b"], "run.out: expected no setting of a sweep, whose runs are in folders of --out"),
        (["run.seed=0,1", "run.out=a"], "run.out: expected no setting of a sweep"),
        (["optim.lr=0.1,0.10"], "sweep: expected runs that differ, got the same for optim.lr=0.1 and optim.lr=0.10"),
        (["optim.lr=,0.1"], "optim.lr: expected values with commas between them"),
        (["run.seed=0,1", "run.seed=2"], "run.seed: expected one list of values, got the setting twice"),
        (["run.seed=3"], "sweep: expected a setting with several values"),
        (["model.moe.layers=[layr],[layer2.1]"], None),  # of the network, which is not made yet: its run says so
    ],
)
def test_what_cannot_run_is_refused_before_the_first_run(tmp_path, monkeypatch, settings, words):
    def work(*_, **__):
        raise AssertionError("work began")

    monkeypatch.setattr(command, "run_sweep", work)
    out = tmp_path / "out"
    if words is None:
        done = run("sweep", "digits-dense", *settings, "--out", out)
        assert str(done.exception) == "work began"
    else:
        assert words in refused(tmp_path, "sweep", "digits-dense", *settings, "--out", out)
        assert words in refused(tmp_path, "sweep", "digits-dense", *reversed(settings), "--out", out)
    assert not out.exists()


def test_a_run_with_other_settings_is_not_taken_for_one_of_the_sweep(stubbed, tmp_path):
    runs, ran = stubbed
    assert sweep(tmp_path).exit_code == 0
    before = everything(tmp_path / "out")
    said = run("sweep", "digits-dense", *GRID, "run.epochs=4", "--out", tmp_path / "out").stderr
    assert said.startswith("error: out: expected runs of this sweep, got one with other settings in ")
    assert "run.epochs: 3 there, 4 asked for" in said and said.count("\n") == 1
    assert everything(tmp_path / "out") == before and len(ran()) == 4
    assert sweep(tmp_path, "run.log_every=5").exit_code == 0  # changes no number
    (runs[0].folder / "config.yaml").write_text("# mine\n")
    said = refused(tmp_path, "sweep", "digits-dense", *GRID, "run.epochs=3", "--out", tmp_path / "out")
    assert said.startswith("run.out: expected a new name or the configuration of an earlier run")
    assert len(ran()) == 4


def test_real_runs_are_those_of_single_commands(tmp_path):
    save_config(load_config(None, [*TINY, "run.epochs=1", f"run.out={tmp_path / 'nowhere'}"]), tmp_path / "tiny.yaml")
    done = run("sweep", tmp_path / "tiny.yaml", "run.seed=0,1", "--out", tmp_path / "out", "--jobs", 2)
    assert done.exit_code == 0, done.output
    Trainer(load_config(tmp_path / "tiny.yaml", ["run.seed=1", f"run.out={tmp_path / 'alone'}"]), Reporter(False)).fit()
    assert_same_run(tmp_path / "out" / "run.seed=1", tmp_path / "alone")
    (line,) = read_metrics(tmp_path / "out" / "run.seed=0", "epoch")
    assert f"{100 * line['val_clean']:.1f}" in done.output
    assert json.loads((tmp_path / "out" / "run.seed=0" / "results.json").read_text())["seed"] == 0
    assert not (tmp_path / "nowhere").exists()
