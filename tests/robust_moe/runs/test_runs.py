"""``robust-moe runs``: what run folders say, damaged, foreign and live ones too, and how it is shown."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from datetime import UTC, datetime

import pytest
from fake_runs import NOON, epoch_line, make_run
from legible import assert_legible
from output_files import OLD_RUN, everything, put, refused, run
from rich.console import Console

from robust_moe.config import ConfigError
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.run_folder import LOCK, alone_in, is_running
from robust_moe.runs import find_runs, read_run, runs_table, write_page
from robust_moe.runs.page import MOST_NAMED, curves, differing
from robust_moe.runs.summary import FINISHED, RUNNING, STOPPED, UNKNOWN
from robust_moe.runs.table import COLUMNS, written_at


def shown(table: object, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False).print(table)
    return out.getvalue()


def test_what_a_run_folder_says(tmp_path):
    run = read_run(make_run(tmp_path / "a", "method=trades", "model.moe.layers=[layer2.1]", "model.moe.num_experts=6"))
    assert (run.name, run.state, run.method, run.model) == ("a", FINISHED, "trades", "resnet_small E6")
    assert (run.epoch, run.epochs, run.best_epoch, run.speed, run.written) == (3, 3, 2, 1234.5, NOON)
    assert [run.clean, run.robust, run.best] == pytest.approx([0.3, 0.2, 0.25])
    assert (run.test_clean, run.test_robust, run.problems) == (None, None, ())
    begun = read_run(make_run(tmp_path / "b", "model.mixture.num_experts=3", epochs=0))
    assert (begun.state, begun.epoch, begun.clean, begun.best, begun.best_epoch) == (STOPPED, 0, None, None, None)
    assert begun.model == "resnet_small E3"
    assert read_run(make_run(tmp_path / "c", "run.max_steps=8", epochs=2)).state == FINISHED
    assert read_run(make_run(tmp_path / "d", "run.max_steps=9", epochs=2)).state == STOPPED
    assert read_run(make_run(tmp_path / "e", "data.validation_fraction=0")).model == "resnet_small"


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    results = json.loads((OLD_RUN / "results.json").read_text())
    shutil.copytree(OLD_RUN, tmp_path / "old")
    run = read_run(tmp_path / "old")
    assert (run.state, run.model, run.epoch, run.speed) == (FINISHED, "resnet_small E4", 3, None)
    if results["format"] == 3:
        assert (run.test_clean, run.test_robust) == (results["clean"], results["robust"])
    else:
        assert "evaluate again" in run.problems[0]


def test_a_trained_run_is_read(tiny):
    config = tiny("run.max_steps=3", "run.epochs=9")
    Trainer(config, Reporter(enabled=False)).fit()
    run = read_run(config.run.out)
    assert (run.state, run.epochs, run.problems) == (FINISHED, 9, ())
    assert run.clean is not None and run.robust is not None and run.speed > 0


def test_a_run_is_running_while_its_training_holds_the_folder(tmp_path):
    folder = make_run(tmp_path / "a", epochs=1)
    with alone_in(folder):
        assert read_run(folder).state == RUNNING
        assert is_running(folder)  # the look took no lock away
    assert read_run(folder).state == STOPPED
    (folder / LOCK).touch()  # as a killed training leaves it
    assert read_run(folder).state == STOPPED
    with alone_in(folder):
        pass


DAMAGE = {  # what is done to a run's files, and what its line says
    "no configuration": (lambda folder: (folder / "config.yaml").unlink(), "found nothing"),
    "no YAML": (lambda folder: (folder / "config.yaml").write_text("a: [1"), "got no readable YAML"),
    "no text": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"), "got no readable YAML"),
    "deep YAML": (lambda folder: (folder / "config.yaml").write_text("{a: " * 5000), "got no readable YAML"),
    "a list": (lambda folder: (folder / "config.yaml").write_text("[1, 2]"), "got one without method.name, model.name"),
    "another program's": (lambda folder: (folder / "config.yaml").write_text("model: {name: x}"), "run.epochs"),
    "no number": (
        lambda folder: (folder / "config.yaml").write_text("model: {name: x}\nmethod: {name: y}\nrun: {epochs: -1}"),
        "run.epochs: expected a whole number >= 1, got '-1'",
    ),
    "too large": (lambda folder: (folder / "config.yaml").write_text("#" * 2**21), "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_of_a_damaged_run_one_line_says_what_is_wrong(tmp_path, damage):
    make_run(tmp_path / "good")
    spoil, words = DAMAGE[damage]
    spoil(make_run(tmp_path / "bad"))
    bad, good = find_runs(tmp_path)
    assert (bad.name, bad.state, good.state) == ("bad", UNKNOWN, FINISHED)
    assert (
        len(bad.problems) == 1 and words in bad.problems[0] and str(tmp_path / "bad" / "config.yaml") in bad.problems[0]
    )
    assert "bad" in shown(runs_table([bad, good], "title", datetime.now()))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"kind": "epoch", "step": 12, "epoch": 3, "val_rob', "damaged lines: 3"),
        (json.dumps(epoch_line(3, val_robust=1.5)), "val_robust: expected a finite number >= 0 and <= 1, got 1.5"),
        (json.dumps(epoch_line(3, train_loss="low")), "train_loss: expected a finite number, got 'low'"),
        (json.dumps(epoch_line(-1)), "epoch: expected a whole number >= 1, got -1"),
        ('{"kind": "epoch", "step": 12}', "expected epoch, step, got nothing for epoch"),
    ],
)
def test_a_damaged_line_costs_that_epoch_alone(tmp_path, line, words):
    folder = make_run(tmp_path / "a", epochs=2)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n{json.dumps(epoch_line(4))}\n")
    run = read_run(folder)
    assert [line["epoch"] for line in run.lines] == [1, 2, 4]
    assert len(run.problems) == 1 and words in run.problems[0]


def test_runs_are_found_below_a_folder_by_name(tmp_path):
    for name in ("study/dense/seed-1", "study/dense/seed-0", "alone"):
        make_run(tmp_path / name)
    (tmp_path / "presets").mkdir()
    shutil.copy(OLD_RUN / "config.yaml", tmp_path / "presets")  # a configuration alone is no run
    (tmp_path / "foreign").mkdir()
    put(tmp_path / "foreign" / "last.pt", "data")
    (tmp_path / "again").symlink_to(tmp_path / "study")
    runs = find_runs(tmp_path)
    assert [run.name for run in runs] == ["alone", "foreign", "study/dense/seed-0", "study/dense/seed-1"]
    assert [run.state for run in runs] == [FINISHED, UNKNOWN, FINISHED, FINISHED]
    (only,) = find_runs(tmp_path / "study" / "dense" / "seed-1")  # the folder itself
    assert only.name == "seed-1"
    with pytest.raises(ConfigError, match=r"folder: expected a folder of run folders, got .*nowhere"):
        find_runs(tmp_path / "nowhere")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read anything")
def test_a_closed_folder_is_one_line(tmp_path):
    folder = make_run(tmp_path / "a")
    folder.chmod(0)
    try:
        (run,) = find_runs(tmp_path)
    finally:
        folder.chmod(0o755)
    assert (run.name, run.state) == ("a", UNKNOWN)
    assert "Permission denied" in run.problems[0]


def test_the_table_fits_80_characters_and_cuts_no_number(tmp_path):
    long = "a-long-name-of-a-study/dense-at-with-averaged-weights/optim.lr=0.05,run.seed=10"
    make_run(tmp_path / long, "method=trades", "model=preact_resnet18", "model.moe.layers=[layer4.1]", of=300)
    make_run(tmp_path / "b", speed=123456.7, of=200)
    runs = find_runs(tmp_path)
    text = shown(runs_table(runs, "runs", datetime(2027, 3, 2)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for whole in ("stopped", "3/300", "3/200", "30.0", "20.0", "25.0", "1,234", "123,457", "2026-03", "trades"):
        assert whole in text
    assert "method of all" not in text


def test_what_all_runs_have_is_told_once(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"seed={seed}", f"run.seed={seed}", "method=trades")
    text = shown(runs_table(find_runs(tmp_path), "runs", datetime.fromtimestamp(NOON)))
    assert "method of all: trades\nmodel of all: resnet_small" in "\n".join(line.strip() for line in text.splitlines())
    assert text.count("trades") == 1
    assert text.count("12:00") == 2  # of today the hour
    assert "03-01" in shown(runs_table(find_runs(tmp_path), "runs", datetime(2026, 3, 2)))


def test_a_run_that_was_never_written_has_no_time(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    (folder / "last.pt").touch()
    run = read_run(folder)
    assert (run.state, written_at(run, datetime.now())) == (STOPPED, "")


def test_the_command_writes_table_and_page_and_changes_no_run(tmp_path):
    make_run(tmp_path / "runs" / "a", "run.seed=1")
    make_run(tmp_path / "runs" / "b", "run.seed=2", "optim.lr=0.5", epochs=2)
    (make_run(tmp_path / "runs" / "c") / "config.yaml").write_text("[")
    before = everything(tmp_path / "runs")
    table, page = tmp_path / "new" / "runs.csv", tmp_path / "new" / "runs.html"
    for _ in range(2):  # the second time over its own files
        done = run("runs", tmp_path / "runs", "--csv", table, "--html", page)
        assert done.exit_code == 0, done.output
        assert f"c: {tmp_path / 'runs' / 'c' / 'config.yaml'}: expected the configuration of a run" in done.output
    assert everything(tmp_path / "runs") == before
    first, second, third = csv.DictReader(table.read_text().splitlines())
    assert tuple(first) == COLUMNS
    utc = f"{datetime.fromtimestamp(NOON, UTC):%Y-%m-%dT%H:%M:%SZ}"
    assert [first[name] for name in ("run", "state", "epoch", "epochs", "written")] == ["a", FINISHED, "3", "3", utc]
    assert float(first["best_val_robust"]) == 0.25 and first["test_robust"] == ""
    assert [second["state"], third["state"]] == [STOPPED, UNKNOWN]
    assert "expected the configuration" in third["problems"]
    text = page.read_text()
    for words in ("<title>runs: runs compared</title>", "optim.lr", "run.seed", "What could not be read"):
        assert words in text
    assert "run.out</th>" not in text and "eval.batch_size" not in text  # only what differs


def test_other_files_are_kept(tmp_path):
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "data.csv").write_text("image,label\n")
    (tmp_path / "page.html").write_text("<title>mine</title>")
    for option, name in (("--csv", "data.csv"), ("--html", "page.html"), ("--html", "runs"), ("--csv", "")):
        said = refused(tmp_path, "runs", tmp_path / "runs", option, tmp_path / name if name else "")
        assert said.startswith(f"{option.strip('-')}: expected a")
    assert "differ" in refused(tmp_path, "runs", tmp_path / "runs", "--csv", tmp_path / "a", "--html", tmp_path / "a")
    assert refused(tmp_path, "runs", tmp_path / "nowhere").startswith("folder: expected a folder of run folders")
    (tmp_path / "empty").mkdir()
    assert "found none in" in refused(tmp_path, "runs", tmp_path / "empty")


@pytest.mark.parametrize("count", [1, 3, MOST_NAMED, MOST_NAMED + 8])
def test_curves_show_every_run_and_are_legible_at_400_pixels(tmp_path, count):
    for number in range(count):
        folder = make_run(tmp_path / f"optim.lr={number}.$x_y$")
        lines = [epoch_line(epoch, val_robust=0.01 * epoch * number) for epoch in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    figure = curves(find_runs(tmp_path))
    assert_legible(figure)
    robust, clean, loss = figure.axes
    names = [text.get_text() for text in robust.get_legend().get_texts()]
    best = f"optim.lr={count - 1}.$x_y$"
    assert names[0] == best  # the best first
    assert len(names) == min(count, MOST_NAMED) + (count > MOST_NAMED)
    assert names[-1] == ("8 others" if count > MOST_NAMED else "optim.lr=0.$x_y$")
    for axes, value in ((robust, 0.03 * (count - 1)), (clean, 0.3), (loss, 2 / 3)):
        assert len([line for line in axes.lines if len(line.get_xdata())]) == count
        named = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
        assert named[0].get_ydata()[-1] == pytest.approx(value)
    looks = {(line.get_color(), line.get_linestyle()) for line in robust.lines if line.get_marker() not in ("None", "")}
    assert len(looks) == min(count, MOST_NAMED)  # told apart


def test_the_page_of_hostile_names_is_the_same_every_time(tmp_path):
    make_run(tmp_path / "runs" / "<script>alert(1)</script>")
    make_run(tmp_path / "runs" / "begun", epochs=0)
    runs = find_runs(tmp_path / "runs")
    write_page(runs, tmp_path / "a.html", "<b>")
    write_page(runs, tmp_path / "b.html", "<b>")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    text = (tmp_path / "a.html").read_text()
    assert "<script>" not in text and "<b>" not in text and "&lt;script&gt;" in text
    assert '<table class="wide">' in text  # on a narrow screen its rows are blocks
    assert differing(runs) == []
    write_page([run for run in runs if run.name == "begun"], tmp_path / "c.html", "one")
    assert "no run has finished an epoch" in (tmp_path / "c.html").read_text()
