"""Folders that commands write to, the demo's and the studies': what is not theirs is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from output_files import (
    OLD_RUN,
    draw,
    everything,
    put,
    refused,
    write_run,
)

from robust_moe import demo
from robust_moe.config import ConfigError
from robust_moe.reproduce import STUDIES
from robust_moe.reproduce.preparation import remove
from robust_moe.reproduce.results import report_outputs

pytestmark = pytest.mark.usefixtures("idle")

COMMANDS_WITH_FOLDERS = {
    "run.out": ("train", "digits-dense", "run.out=PATH"),
    "out": ("demo", "--out", "PATH"),
    "runs": ("reproduce", "rt-er", "--runs", "PATH"),
    "out ": ("reproduce", "rt-er", "--out", "PATH"),
    "out  ": ("sweep", "digits-dense", "run.seed=0,1", "--out", "PATH"),
}


@pytest.mark.parametrize("what", ["checkpoint", "data", "FIFO", "link to a device", "socket", "link to itself"])
@pytest.mark.parametrize("argument", COMMANDS_WITH_FOLDERS)
def test_a_folder_is_not_made_where_something_else_is(tmp_path, monkeypatch, argument, what):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "here", what)
    command = [part.replace("PATH", str(tmp_path / "here")) for part in COMMANDS_WITH_FOLDERS[argument]]
    said = refused(tmp_path, *command)
    assert (
        said.startswith(f"{argument.strip()}: expected a folder to write to, got ") and str(tmp_path / "here") in said
    )


@pytest.mark.parametrize("argument", COMMANDS_WITH_FOLDERS)
def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch, argument):
    monkeypatch.chdir(tmp_path)
    said = refused(tmp_path, *(part.replace("PATH", "") for part in COMMANDS_WITH_FOLDERS[argument]))
    assert said == f"{argument.strip()}: expected a name, got ''\n"


@pytest.mark.parametrize(
    ("argument", "command"),
    [
        *COMMANDS_WITH_FOLDERS.items(),
        ("out", ("eval", "nothing.pt", "--out", "PATH.json")),
        ("out", ("certify", "nothing.pt", "--out", "PATH.json")),
        ("out", ("reproduce", "rt-er", "--out", "PATH", "--judge", "study.json")),
    ],
)
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, argument, command):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parents[3] / "benchmarks" / "results" / "study-cpu" / "study.json", tmp_path)
    (home / "a").write_text("a file")
    (home / "a.json").mkdir()
    said = refused(tmp_path, *(part.replace("PATH", "~/a") for part in command))
    assert said.startswith(f"{argument.strip()}: expected a f") and str(home / "a") in said


def test_the_demo_keeps_a_strangers_figure(tmp_path):
    draw(tmp_path / "comparison.png", "train")
    assert "out: expected a new name or a figure of robust-moe demo" in refused(tmp_path, "demo", "--out", tmp_path)
    draw(tmp_path / "comparison.png", "demo")  # but no run beside it
    assert "a figure of robust-moe demo" in refused(tmp_path, "demo", "--out", tmp_path)
    folder = tmp_path / demo.PRESETS[0]
    folder.mkdir()
    shutil.copy(OLD_RUN / "metrics.jsonl", folder)
    with pytest.raises(AssertionError, match="work began"):
        demo.run_demo(tmp_path)


@pytest.mark.parametrize("name", ["study.json", "summary.md", "rt-er-accuracy.png"])
def test_a_study_keeps_what_is_not_its_report(tmp_path, name):
    names = [path.name for path, _ in report_outputs(STUDIES["rt-er"], tmp_path)]
    name = next(each for each in names if each.endswith(".png")) if name.endswith(".png") else name
    (tmp_path / name).write_text("mine")
    for fresh in ("--resume", "--fresh"):
        said = refused(tmp_path, "reproduce", "rt-er", "--out", tmp_path, "--runs", tmp_path / "runs", fresh)
        assert said.startswith("out: expected a new name or ") and name in said


def test_a_study_started_anew_removes_its_own_files_alone(tmp_path):
    folder = tmp_path / "dense-at" / "seed-0"
    shutil.copytree(OLD_RUN, folder)
    (folder / "job.json").write_text('{"run": "dense-at", "seed": 0, "config": {}}')
    (folder / "log.txt").write_text("epoch 1/1")
    (folder / "notes.txt").write_text("mine")
    job = SimpleNamespace(run="dense-at", folder=folder)
    remove([job], tmp_path)
    assert {path.name for path in folder.iterdir()} == {"ended.pt", "notes.txt"}
    (folder / "last.pt").write_bytes(b"a stranger's")
    before = everything(tmp_path)
    with pytest.raises(ConfigError, match="runs: expected a new name or a checkpoint of an earlier run"):
        remove([job], tmp_path)
    assert everything(tmp_path) == before
    for path in folder.iterdir():
        path.unlink()
    noted = write_run(tmp_path / "run")
    noted.write_text(f"{noted.read_text()}# my note\n")
    before = everything(noted.parent)
    with pytest.raises(ConfigError, match=r"runs: expected a new name or .* which has no comments, got another file"):
        remove([SimpleNamespace(run="dense-at", folder=noted.parent)], tmp_path)
    assert everything(noted.parent) == before


def test_judging_again_keeps_what_is_not_a_summary(tmp_path):
    shutil.copy(Path(__file__).parents[3] / "benchmarks" / "results" / "study-cpu" / "study.json", tmp_path)
    (tmp_path / "summary.md").write_text("# My notes\n")
    said = refused(tmp_path, "reproduce", "all", "--judge", tmp_path / "study.json")
    assert said.startswith("out: expected a new name or the summary.md of an earlier report")
