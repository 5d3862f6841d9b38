"""What is printed: on any console, and no name is markup; a full disk is one sentence that names the file."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.console import make_console
from robust_moe.engine import Reporter
from robust_moe.evaluation import attack_table, results_table
from robust_moe.evaluation.common import expect_comparable
from robust_moe.evaluation.results import read_results, samples_file
from robust_moe.evaluation.tables import moe_table

NAME = "[bold]x[/bold] [red] :smile: [/]"
ATTACK = {
    "name": NAME,
    "chain": NAME,
    "settings": {"steps": 2, "restarts": 1},
    "attacked": 4,
    "broken": 2,
    "robust_after": 0.25,
    "alone": 0.25,
    "passes_per_image": {"forward": 3.0, "backward": 2.0},
    "seconds": 1.0,
}
RESULTS = {
    "format": 3,
    "model": {"parameters": 1000},
    "data": {"name": "digits", "split": "test"},
    "count": 8,
    "eps": "1/10",
    "norm": "Linf",
    "attacks": [ATTACK],
    "autoattack": None,
    "clean": 0.5,
    "clean_interval": [0.4, 0.6],
    "robust": 0.25,
    "robust_interval": [0.2, 0.3],
    "seconds": 2.0,
}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


@pytest.mark.parametrize("literal", [True, False])  # our own console, and anyone's
def test_brackets_in_names_are_no_markup(monkeypatch, literal):
    out = io.StringIO()
    monkeypatch.setenv("COLUMNS", "300")
    if literal:
        monkeypatch.setattr(sys, "stdout", out)
    console = make_console() if literal else Console(file=out, width=300)
    console.print(results_table([(NAME, RESULTS)], f"title {NAME}"))
    console.print(attack_table(RESULTS))
    reporter = Reporter(console=console)
    reporter.line(f"line {NAME}")
    reporter.warn(NAME)
    text = out.getvalue()
    assert text.count(NAME) >= 5
    assert f"title {NAME}" in text
    assert f"line {NAME}\n" in text
    assert f"warning: {NAME}\n" in text
    assert "50.0 [40.0, 60.0]" in text
    assert "[95 % interval]" in text


def test_a_bars_names_are_no_markup():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=300, color_system=None)
    with Reporter(console=console).task(f"epoch {NAME}", total=4) as advance:
        advance(4, note=f"note {NAME}")
    assert f"epoch {NAME}" in out.getvalue()
    assert f"note {NAME}" in out.getvalue()


def test_the_configuration_is_shown_as_it_is():
    done = run("config", "digits-dense", f"run.out={NAME}")
    assert done.exit_code == 0, done.output
    assert NAME in done.output


def in_ascii(*arguments: str, encoding: str = "ascii") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from robust_moe.cli import main; main()", *arguments]
    env = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    return subprocess.run(command, env=env, capture_output=True, check=False)


def test_a_console_without_a_character_shows_its_code():
    done = in_ascii("train", "digits-dense", "--dry-run", "run.out=r\u00e9sultat")
    assert done.returncode == 0, done.stderr
    assert b"r\\xe9sultat" in done.stdout
    done = in_ascii("config", "digits-dense", "run.out=r\u00e9sultat")
    assert done.returncode == 0, done.stderr
    assert b"r\\xe9sultat" in done.stdout


def test_reporters_and_tables_end_on_an_ascii_console(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    reporter = Reporter()
    reporter.line("\u03b5 = 8/255")
    reporter.console.print(results_table([("r\u00e9sultat \udcff", RESULTS)], "\u03b5"))
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert "\\u03b5 = 8/255" in text
    assert "r\\xe9sultat \\udcff" in text


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX's")
@pytest.mark.parametrize("what", ["metrics", "events", "journal", "figure", "results"])
def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path, what):
    # the operating system itself refuses to write past 8 KiB
    script = """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from robust_moe.commands.shared import one_line_errors
        from robust_moe.engine import MetricLog
        from robust_moe.evaluation import Journal
        from robust_moe.evaluation.plots import new_figure, save_figure
        from robust_moe.files import replace_file
        import typer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder, what = Path(sys.argv[1]), sys.argv[2]
        log = MetricLog(folder) if what in ("metrics", "events") else None
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

        @one_line_errors
        def command():
            if what in ("metrics", "events"):  # numbers are longer among the events, other values are not there
                values = {"names": ["x" * 200]} if what == "metrics" else {f"loss{i}": 1 for i in range(20)}
                try:
                    for step in range(100):
                        log.write("routing", step, values)
                finally:
                    log.close()
            elif what == "journal":
                with Journal(folder / "a.journal", {}) as journal:
                    for key in range(100):
                        journal.put(str(key), {"image": np.zeros(100)})
            elif what == "figure":
                figure = new_figure(4, 4)
                figure.figimage(np.random.default_rng(0).random((200, 200)))
                save_figure(figure, folder / "a.png", "train")
            else:
                replace_file(folder / "a.json", b"x" * 9000)

        try:
            command()
        except typer.Exit as stop:
            sys.exit(stop.exit_code)
    """
    names = {"metrics": "metrics.jsonl", "journal": "a.journal", "figure": "a.png", "results": "a.json"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    path = next(tmp_path.glob("tensorboard/events.*")) if what == "events" else tmp_path / names[what]
    assert done.stderr == f"error: {path}: could not be read or written (File too large)\n"
    assert not list(tmp_path.glob(".*"))
    if what == "metrics":  # whole lines, as many as there was room for
        lines = path.read_text().splitlines(keepends=True)
        assert len(lines) > 10
        assert all(json.loads(line)["kind"] == "routing" for line in lines)
        assert all(line.endswith("\n") for line in lines)
    elif what == "events":  # whole records
        steps = [event.step for event in EventFileLoader(str(path)).Load() if event.summary.value]
        assert len(steps) > 10
        assert steps == list(range(len(steps)))
    elif what != "journal":
        assert not path.exists()


# --- results to be shown beside ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("count", "8", "count: expected a whole number >= 1"),
        ("count", 0, "count: expected a whole number >= 1"),
        ("clean", None, "clean: expected a finite number >= 0 and <= 1, got None"),
        ("clean", 1.5, "clean: expected a finite number >= 0 and <= 1, got 1.5"),
        ("clean_interval", [0.1], "clean_interval: expected a list of 2 items, got [0.1]"),
        ("robust", "0.5", "robust: expected a finite number"),
        ("robust", None, "robust: expected a share with its interval where there are attacks"),
        ("robust_interval", None, "robust: expected a share with its interval where there are attacks"),
        ("attacks", {}, "attacks: expected a list"),
        ("attacks", [{**ATTACK, "settings": []}], "attacks[0].settings: expected names and values, got []"),
        ("attacks", [{"name": "pgd"}], "attacks[0]: expected name, chain, settings"),
        ("model", [], "model: expected names and values, got []"),
        ("model", {"parameters": "many"}, "model.parameters: expected a whole number"),
        ("data", {"name": 3, "split": "test"}, "data.name: expected text, got 3"),
        ("eps", 0.1, "eps: expected text, got 0.1"),
        ("norm", ["Linf"], "norm: expected one of"),
    ],
)
def test_an_entry_of_another_type_is_refused_before_the_evaluation(tmp_path, key, value, words):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**RESULTS, key: value}))
    before = path.read_bytes()
    done = run("eval", tmp_path / "no checkpoint", "--beside", path)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {path}: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ["other.json"]
    assert path.read_bytes() == before


def test_whole_results_are_read(tmp_path):
    path = tmp_path / "other.json"
    for content in (RESULTS, {**RESULTS, "attacks": [], "robust": None, "robust_interval": None}):
        path.write_text(json.dumps(content))
        assert read_results(path) == content


@pytest.mark.parametrize("arrays", [None, "torn", {"clean": np.ones(8)}, {"clean": np.ones(3, bool)}])
def test_missing_arrays_are_said_before_the_evaluation(tmp_path, arrays):
    """The worst case over the common attack needs the arrays, as the other has one more that ran before it."""
    chained = [{**ATTACK, "name": name, "chain": "a", "alone": None} for name in ("one", "two")]
    other = {**RESULTS, "attacks": [*chained, {**ATTACK, "name": "pgd", "chain": "pgd", "alone": None}]}
    other["samples"] = str(samples_file(tmp_path / "results.json"))
    if arrays == "torn":
        (tmp_path / "samples.npz").write_bytes(b"PK\x03\x04 torn")
    elif arrays is not None:
        np.savez(tmp_path / "samples.npz", **arrays, **{"broken/pgd": np.zeros(8, bool)})
    planned = {"count": 8, "data": {}, "attacks": [{**ATTACK, "name": "pgd", "chain": "pgd"}]}
    with pytest.raises(ValueError, match=r"expected (the arrays|clean of bool \[8\])"):
        expect_comparable(planned, [("twin", other)])
    np.savez(tmp_path / "samples.npz", **{"clean": np.ones(8, bool), "broken/pgd": np.zeros(8, bool)})
    expect_comparable(planned, [("twin", other)])


def test_nothing_of_an_older_configuration_survives_fresh(tiny, tmp_path):
    from robust_moe.engine import Trainer

    folder = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "config" / "old_run", folder)
    np.savez(folder / "samples.npz", index=1, label=2, clean=3)
    (folder / "results-best-test-pgd-1.json").write_text("of eval, which has a name of its own")
    (folder / ".results.json.12.tmp").write_text("left by a kill")
    trainer = Trainer(tiny("run.epochs=1", "run.max_steps=1"), Reporter(enabled=False))
    trainer.fit(resume=False)
    left = {path.name for path in folder.iterdir()}
    own = {"config.yaml", "last.pt", "best.pt", "metrics.jsonl", "tensorboard"}
    assert left - {"routing.png"} == own | {"ended.pt", "results-best-test-pgd-1.json"}


@pytest.mark.parametrize(
    ("how", "options", "words"),
    [
        (signal.SIGINT, [], "the same command goes on\n"),
        (signal.SIGTERM, [], "the same command goes on\n"),
        (signal.SIGINT, ["--fresh"], "the same command without --fresh goes on\n"),
    ],
)
def test_a_stopped_evaluation_says_how_to_go_on(monkeypatch, tmp_path, how, options, words):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("robust_moe.commands.evaluate.assess", lambda *_, **__: os.kill(os.getpid(), how))
    (tmp_path / "best.pt").write_bytes(b"")
    done = run("eval", tmp_path / "best.pt", *options)
    assert done.exit_code == 130
    assert done.output == f"stopped; every finished batch of the evaluation is kept: {words}"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stopped_demonstration_says_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr("robust_moe.commands.demo.run_demo", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    done = run("demo", "--out", tmp_path)
    assert (done.exit_code, done.output.count("the same command goes on")) == (130, 1)


def test_tables_fit_80_columns_and_cut_nothing():
    """Of long names, many images and an evaluation with attacks that others have not."""
    attacks = [
        {**ATTACK, "name": name, "chain": name, "attacked": 10000, "broken": 10000, "seconds": 12345.6}
        | {"passes_per_image": {"forward": 5002.0, "backward": 1000.0}}
        for name in ("ra_r_targeted", "square alone", "attack_of_my_own_module")
    ]
    moe = dict.fromkeys(("sa", "ra", "ra_e", "ra_r", "ra_r_targeted", "joint", "transfer", "union"), 1.0)
    moe |= {f"{name}_interval": [0.9999, 1.0] for name in list(moe)}
    sure = dict.fromkeys(("clean", "robust"), 1.0) | {f"{name}_interval": [1.0, 1.0] for name in ("clean", "robust")}
    results = RESULTS | sure | {"attacks": attacks, "moe": moe, "model": {"parameters": 123456789}}
    other = RESULTS | sure | {"attacks": attacks[:1]}
    results["attacks"][0]["alone"] = 0.25
    tables = [results_table([("cifar10-blockmoe-seed12", results), ("digits-dense", other)], "title")]
    for table in (*tables, attack_table(results), moe_table(results)):
        out = io.StringIO()
        Console(file=out, width=80).print(table)
        text = out.getvalue()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        for row in range(len(table.rows)):  # every number whole
            for column in table.columns[1:]:
                assert str(list(column.cells)[row]) in text
    assert "100.0 [100.0, 100.0]" in text.replace("\n", " ")
