"""No command writes over what it reads, or over what another made: it is refused before any work."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from output_files import (
    CERTIFIED,
    EVALUATED,
    FILES,
    OLD_RUN,
    OTHERS,
    STUDY,
    draw,
    everything,
    put,
    refused,
    write_journal,
)
from torch import nn

import robust_moe
from robust_moe.config import ConfigError
from robust_moe.engine import Reporter, Trainer
from robust_moe.evaluation.plots import new_figure
from robust_moe.outputs import (
    certificate_outputs,
    clear_outputs,
    evaluation_outputs,
    expect_outputs,
    remove_folder,
    run_outputs,
)

pytestmark = pytest.mark.usefixtures("idle")

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
