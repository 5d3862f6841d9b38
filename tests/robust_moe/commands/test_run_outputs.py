"""A training writes over the files of a run alone, and its configuration only where nothing of it is lost."""

from __future__ import annotations

import json
import shutil

import pytest
from output_files import (
    FIT,
    OLD_RUN,
    begins,
    draw,
    put,
    refused,
    write_run,
)

from robust_moe.config import ConfigError, load_config, save_config
from robust_moe.engine import Trainer
from robust_moe.engine.events import Events
from robust_moe.engine.log import MetricLog
from robust_moe.evaluation.plots import new_figure
from robust_moe.outputs import (
    clear_outputs,
    expect_outputs,
    run_outputs,
)

pytestmark = pytest.mark.usefixtures("idle")

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
    path.unlink()
    events = Events(tmp_path / "tensorboard")
    events.add(1, {"train/epoch": 1.0})  # as earlier versions logged it
    events.close()
    path = events.path.rename(events.path.with_suffix(""))  # and named the file
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
