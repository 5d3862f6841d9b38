"""No command writes over what it reads, or over what another made: it is refused before any work."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import robust_moe
from robust_moe import certify as certifying
from robust_moe import demo, report
from robust_moe.commands import app
from robust_moe.config import ConfigError, load_config, save_config
from robust_moe.engine import Reporter, Trainer, trainer
from robust_moe.engine.log import MetricLog
from robust_moe.evaluation import Journal
from robust_moe.evaluation.plots import new_figure, save_figure
from robust_moe.outputs import (
    certificate_outputs,
    clear_outputs,
    evaluation_outputs,
    expect_outputs,
    remove_folder,
    run_outputs,
)
from robust_moe.reproduce import study as studying
from robust_moe.reproduce.preparation import remove

FIT = Trainer.fit
OLD_RUN = Path(__file__).parents[1] / "config" / "old_run"  # files of a real run
CERTIFIED = {"format": 1, "by": "ibp", "guarantee": "holds"}
EVALUATED = {"format": 3, "attacks": [], "clean": 0.5}
STUDY = {"format": 3, "study": "rt-er", "parts": {}}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """Any work is a failure."""

    def work(*_, **__):
        raise AssertionError("work began")

    for module, name in ((report, "load_experiment"), (certifying, "load_experiment"), (studying, "run_jobs")):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(Trainer, "fit", work)
    monkeypatch.setattr(trainer, "load_checkpoint", work)
    monkeypatch.setattr(trainer, "load_splits", work)


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
COMMANDS = {  # the file behind --out, what else would be written
    "eval": ("a result file of robust-moe eval", ("a-samples.npz", "a.html", "a.journal")),
    "certify": ("a result file of robust-moe certify", ("a.png", "a.journal")),
}
BESIDE = [(command, name) for command, (_, names) in COMMANDS.items() for name in names]


@pytest.mark.parametrize("what", [*FILES, *OTHERS])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_result_file_takes_no_other_files_place(tmp_path, command, what):
    out = tmp_path / "a.json"
    put(out, what)
    for fresh in ("--resume", "--fresh"):
        said = refused(tmp_path, command, "nothing.pt", "--out", out, fresh)
        if what in OTHERS:
            assert said.startswith("out: expected a file to write, got ") and OTHERS[what] in said
        else:
            assert said == f"out: expected a new name or {COMMANDS[command][0]}, got another file at {out}\n"


@pytest.mark.parametrize("what", [*(what for what in FILES if what != "journal"), *OTHERS])
@pytest.mark.parametrize(("command", "name"), BESIDE)
def test_nor_do_the_files_beside_it(tmp_path, command, name, what):
    put(tmp_path / name, what)
    said = refused(tmp_path, command, "nothing.pt", "--out", tmp_path / "a.json", "--fresh")
    assert said.startswith("out: expected ") and str(tmp_path / name) in said


@pytest.mark.parametrize(("first", "second"), [("foo", "foo-results"), ("foo-results", "foo")])
def test_another_results_arrays_are_kept(tmp_path, first, second):
    arrays = tmp_path / "foo-samples.npz"
    path = tmp_path / f"{first}.json"
    path.write_text(json.dumps({**EVALUATED, "samples": arrays.name}))
    np.savez(arrays, index=1, label=2, clean=3)
    for fresh in ("--resume", "--fresh"):
        said = refused(tmp_path, "eval", "nothing.pt", "--out", tmp_path / f"{second}.json", fresh)
        assert (
            said
            == f"out: expected other names for the arrays of robust-moe eval, got {arrays}, which belongs to {path}\n"
        )
    for name in (f"{first}.json", "other.json"):
        expect_outputs("out", evaluation_outputs(tmp_path / name, None))
    path.write_text(json.dumps({**EVALUATED, "samples": "other.npz"}))  # it has others
    expect_outputs("out", evaluation_outputs(tmp_path / f"{second}.json", None))


@pytest.mark.parametrize(
    ("command", "content"),
    [("eval", CERTIFIED), ("eval", STUDY), ("certify", EVALUATED), ("certify", STUDY)],
)
def test_another_commands_result_is_kept(tmp_path, command, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert "out: expected a new name or a result file" in refused(
        tmp_path, command, "nothing.pt", "--out", tmp_path / "a.json", "--fresh"
    )


@pytest.mark.parametrize(("command", "foreign"), [("eval", {"by": "ibp"}), ("certify", {"preset": "quick"})])
def test_another_commands_journal_is_kept(tmp_path, command, foreign):
    write_journal(tmp_path / "a.journal", **foreign)
    said = refused(tmp_path, command, "nothing.pt", "--out", tmp_path / "a.json", "--fresh")
    assert "out: expected a new name or the journal of" in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("", "out: expected a name, got ''"),
        ("/dev/null", "out: expected a file to write, got the device /dev/null"),
        (".", "out: expected a file to write, got the folder ."),
        ("FOLDER/a.pt", "out: expected a file whose name ends in .json, got FOLDER/a.pt"),
        ("FOLDER/here/a.json", "out: expected a file to write, got FOLDER/here/a.json (Not a directory)"),
        (f"FOLDER/{'x' * 246}.json", "(File name too long)"),  # with the name of its temporary file
    ],
)
def test_names_that_cannot_be_written_are_refused(tmp_path, command, out, words):
    (tmp_path / "here").write_text("a file")
    out, words = (text.replace("FOLDER", str(tmp_path)) for text in (out, words))
    assert words in refused(tmp_path, command, "nothing.pt", "--out", out)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    said = refused(tmp_path, "eval", "nothing.pt", "--out", tmp_path / "locked" / "a.json")
    assert "is not writable" in said


def test_a_file_to_be_shown_beside_is_not_written_over(tmp_path):
    path = tmp_path / "a.json"
    shutil.copy(OLD_RUN / "results.json", path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 3}))
    said = refused(tmp_path, "eval", "nothing.pt", "--beside", path, "--out", path)
    assert said == f"out: expected another file than beside, which is read, got {path}\n"


# --- training ---------------------------------------------------------------------------------------------------------

TRAINED = (
    "last.pt",
    "best.pt",
    "crash.pt",
    "metrics.jsonl",
    "config.yaml",
    "training.png",
    "results.json",
    "results.html",
)


@pytest.mark.parametrize("fresh", ["--resume", "--fresh"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_folder_keeps_what_is_not_a_runs(tmp_path, name, fresh):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(b"a stranger's")
    said = refused(tmp_path, "train", "digits-dense", f"run.out={tmp_path / 'run'}", fresh)
    assert said.startswith("run.out: expected a new name or ") and str(tmp_path / "run" / name) in said


@pytest.mark.parametrize("what", ["folder", "FIFO", "link to a device"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_writes_no_device_or_folder(tmp_path, name, what):
    (tmp_path / "run").mkdir()
    shutil.copy(OLD_RUN / "metrics.jsonl", tmp_path / "run")  # though the folder is a run's
    if name == "metrics.jsonl":
        (tmp_path / "run" / name).unlink()
    put(tmp_path / "run" / name, what)
    said = refused(tmp_path, "train", "digits-dense", f"run.out={tmp_path / 'run'}", "--fresh")
    assert said.startswith("run.out: expected a file to write, got ")


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


@pytest.mark.parametrize("fresh", ["--resume", "--fresh"])
@pytest.mark.parametrize("override", ["data.root=/data #1/x#2", "model.init_from=a#b.pt", "run.out=exp#1"])
def test_a_setting_with_a_number_sign_is_no_comment(tmp_path, monkeypatch, override, fresh):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", FIT)
    (tmp_path / "a#b.pt").write_bytes(b"weights")
    path = write_run(tmp_path / "exp#1", override)
    assert "#" in path.read_text().replace(str(tmp_path), "")
    begins("train", "digits-dense", f"run.out={path.parent}", override, fresh)
    begins("train", path, fresh)


COMMENTS = ("# why\n{}", "{}# my note\n", "{}# my note", "{}\n  # my note\n")


@pytest.mark.parametrize("form", COMMENTS)
def test_a_run_with_a_note_in_its_configuration_is_resumed_but_not_started_anew(tmp_path, monkeypatch, form):
    monkeypatch.setattr(Trainer, "fit", FIT)
    path = write_run(tmp_path / "exp#1")
    path.write_text(form.format(path.read_text()))
    for source in ("digits-dense", path):
        begins("train", source, f"run.out={path.parent}")
        for option in ("--fresh", "--override"):
            said = refused(tmp_path, "train", source, f"run.out={path.parent}", option)
            assert said == (
                "run.out: expected a new name or the configuration of an earlier run, which has no comments, "
                f"got another file at {path}\n"
            )
    for name in ("last.pt", "best.pt"):  # with nothing to go on from it would be written over
        (path.parent / name).unlink()
    assert "which has no comments" in refused(tmp_path, "train", "digits-dense", f"run.out={path.parent}")


def test_a_comment_behind_a_setting_is_one(tmp_path):
    path = write_run(tmp_path / "run")
    for line in ("  seed: 0", "run:"):
        assert path.read_text().count(f"{line}\n") == 1
        commented = path.read_text().replace(f"{line}\n", f"{line} # the third\n")
        (tmp_path / "config.yaml").write_text(commented)
        with pytest.raises(ConfigError, match="which has no comments, got another file"):
            expect_outputs("run.out", run_outputs(tmp_path))


@pytest.mark.parametrize("fresh", ["--resume", "--fresh"])
@pytest.mark.parametrize("form", ["run: {{out: {}}}\n", "# why: the warm-up matters\nrun:\n  out: {}\n", "all"])
def test_a_run_does_not_write_over_the_configuration_that_it_reads(tmp_path, form, fresh):
    path = tmp_path / "h2" / "config.yaml"
    path.parent.mkdir()
    if form == "all":
        save_config(load_config("digits-dense", [f"run.out={path.parent}"]), path)
        form = path.read_text().replace("epochs: ", "epochs:   ")
    path.write_text(form.replace("{}", str(path.parent)).replace("{{", "{").replace("}}", "}"))
    assert refused(tmp_path, "train", path, fresh) == (
        "run.out: expected another folder than that of the configuration that is read, as a run writes its own "
        f"config.yaml, got {path.parent}\n"
    )
    begins("train", path, f"run.out={tmp_path / 'other'}", fresh)


@pytest.mark.parametrize("fresh", ["--resume", "--fresh"])
def test_a_run_goes_on_by_its_own_configuration(tmp_path, fresh):
    path = write_run(tmp_path / "run")
    begins("train", path, fresh)
    path.write_text(path.read_text().replace("  seed: 0\n", "", 1))  # of an earlier version
    begins("train", path, fresh)
    save_config(load_config("digits-dense", [f"run.out={path.parent}"]), path)
    for name in ("last.pt", "best.pt", "metrics.jsonl"):  # killed before its first step
        (path.parent / name).unlink()
    begins("train", path, fresh)


def test_a_run_started_anew_keeps_other_programs_events_and_figures(tmp_path):
    folder = write_run(tmp_path / "run").parent
    events = folder / "tensorboard"
    events.mkdir()
    kept = {
        "events.out.tfevents.1700000000.host.12.0": b"train/loss",  # of another SummaryWriter
        "events.out.tfevents.1700000000.host.12.0.mine": b"train/epoch",
        "events.out.tfevents.note": b"train/epoch",
        "events.out.tfevents.note.robust-moe": b"train/epoch",
    }
    ours = {
        "events.out.tfevents.1700000000.host.a.12.0.robust-moe": b"",
        "events.out.tfevents.1700000000.host.a.12.0": b"..train/epoch..",  # of an earlier version
    }
    for name, content in (kept | ours).items():
        (events / name).write_bytes(content)
    clear_outputs(run_outputs(folder), anew=True)
    assert {path.name: path.read_bytes() for path in events.iterdir()} == kept


def test_a_runs_events_are_known_by_their_names(tmp_path):
    log = MetricLog(tmp_path)
    log.write("train", 1, {"epoch": 1})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path in dict(run_outputs(tmp_path))
    path = path.rename(path.with_suffix(""))  # as earlier versions named it
    assert path in dict(run_outputs(tmp_path))


@pytest.mark.parametrize(("name", "kind"), [("training.png", "epoch"), ("routing.png", "routing")])
def test_a_figure_without_a_mark_is_a_runs_only_if_its_metrics_are(tmp_path, name, kind):
    folder = write_run(tmp_path / "run").parent
    others = [
        line for line in (OLD_RUN / "metrics.jsonl").read_text().splitlines(True) if f'"kind": "{kind}"' not in line
    ]
    new_figure(1, 1).savefig(folder / name)
    line = json.dumps({"kind": kind, "step": 1})
    (folder / "metrics.jsonl").write_text("".join(others) + f"{line}\n")
    expect_outputs("run.out", run_outputs(folder))
    (folder / "metrics.jsonl").write_text("".join(others))
    said = refused(tmp_path, "train", "digits-dense", f"run.out={folder}", "--fresh")
    assert (
        said == f"run.out: expected a new name or a figure of robust-moe train, got another file at {folder / name}\n"
    )
    draw(folder / name, "train")
    expect_outputs("run.out", run_outputs(folder))


def test_a_run_does_not_write_over_the_checkpoint_that_it_starts_from(tmp_path):
    shutil.copytree(OLD_RUN, tmp_path / "run")
    for source in ("run", "run/best.pt"):
        given = (f"run.out={tmp_path / 'run'}", f"model.init_from={tmp_path / source}", "--fresh")
        said = refused(tmp_path, "train", "digits-dense", *given)
        assert said.startswith("run.out: expected another file than model.init_from, which is read, got ")


COMMANDS_WITH_FOLDERS = {
    "run.out": ("train", "digits-dense", "run.out=PATH"),
    "out": ("demo", "--out", "PATH"),
    "runs": ("reproduce", "rt-er", "--runs", "PATH"),
    "out ": ("reproduce", "rt-er", "--out", "PATH"),
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
    names = [path.name for path, _ in studying.report_outputs(studying.STUDIES["rt-er"], tmp_path)]
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


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["checkpoint", "data", "JSON", "FIFO", "link to a device"])
@pytest.mark.parametrize("argument", ["results", "report"])
def test_the_function_refuses_them_too(tmp_path, monkeypatch, argument, what):
    def model(_):
        raise AssertionError("work began")

    path = tmp_path / "a.json"
    put(path, what)
    before = everything(tmp_path)
    network = nn.Linear(1, 1)
    monkeypatch.setattr(network, "forward", model)
    x, y = torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ConfigError, match=f"^{argument}: expected "):
        robust_moe.evaluate(network, x, y, eps=0.1, **{argument: path}, resume=False)
    with pytest.raises(ConfigError, match=f"^{argument}: expected a name, got ''"):
        robust_moe.evaluate(network, x, y, eps=0.1, **{argument: ""})
    assert everything(tmp_path) == before


# --- what goes on being written over ----------------------------------------------------------------------------------


def test_an_earlier_result_of_the_same_command_is_written_over(tmp_path):
    page = tmp_path / "a.html"
    outputs = evaluation_outputs(tmp_path / "a.json", page, entry=True)
    expect_outputs("out", outputs)  # nothing is there
    page.write_text("<!DOCTYPE html>\n<title>net: robustness report</title>\n")
    (tmp_path / "a.json").write_text(json.dumps({**EVALUATED, "format": 1}))  # of any version
    (tmp_path / "a-robustbench.json").write_text('{"autoattack_acc": "1", "clean_acc": "2"}')
    np.savez(tmp_path / "a-samples.npz", index=1, label=2, clean=3)
    write_journal(tmp_path / "a.journal", preset="quick")
    expect_outputs("out", outputs)
    clear_outputs(outputs, anew=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 10, 20, 40])
def test_a_journal_cut_in_its_first_line_is_any_commands(tmp_path, length):
    path = tmp_path / "a.journal"
    write_journal(path, by="ibp")
    path.write_bytes(path.read_bytes()[:length])
    for outputs in (evaluation_outputs(tmp_path / "a.json", None), certificate_outputs(tmp_path / "a.json")):
        expect_outputs("out", outputs)


def test_a_figure_is_known_by_its_mark_and_by_what_is_beside_it(tmp_path):
    outputs = certificate_outputs(tmp_path / "a.json")
    draw(tmp_path / "a.png", "certify")
    with pytest.raises(ConfigError, match=r"a figure of robust-moe certify, got another file at .*a\.png"):
        expect_outputs("out", outputs)
    (tmp_path / "a.json").write_text(json.dumps(CERTIFIED))
    expect_outputs("out", outputs)
    new_figure(1, 1).savefig(tmp_path / "a.png")  # as earlier versions drew it
    expect_outputs("out", outputs)
    draw(tmp_path / "a.png", "train")
    with pytest.raises(ConfigError, match=r"a figure of robust-moe certify, got another file"):
        expect_outputs("out", outputs)


def test_an_old_run_is_gone_on_with_and_damaged_files_are_still_its(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(OLD_RUN, folder)
    expect_outputs("run.out", run_outputs(folder))
    (folder / "last.pt").write_bytes(b"torn")
    expect_outputs("run.out", run_outputs(folder))
    (folder / "notes.txt").write_text("mine")
    remove_folder(folder, run_outputs(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["ended.pt", "notes.txt"]


def test_a_killed_writes_file_is_removed_and_no_other(tmp_path):
    outputs = run_outputs(tmp_path)
    left = [".last.pt.123.tmp", ".results.json.1.tmp", ".training.png.77.tmp"]
    mine = [".last.pt.tmp", ".notes.txt.123.tmp", "last.pt.123.tmp", ".last.pt.abc.tmp", ".last.pt.123.tmp2"]
    for name in (*left, *mine):
        (tmp_path / name).write_text(name)
    clear_outputs(outputs, anew=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)


def test_two_outputs_of_one_name_are_refused(tmp_path):
    first, second = (tmp_path / "a.json", tmp_path / "x" / ".." / "a.json")
    (tmp_path / "x").mkdir()
    with pytest.raises(
        ConfigError, match=r"report: expected names that differ, got .* for a result file of .* and a report"
    ):
        expect_outputs("report", evaluation_outputs(first, second))


def test_a_quiet_trainer_is_refused_too(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_bytes(b"a stranger's")
    with pytest.raises(ConfigError, match=r"run\.out: expected a new name or a checkpoint of an earlier run"):
        Trainer(tiny(), Reporter(enabled=False))
