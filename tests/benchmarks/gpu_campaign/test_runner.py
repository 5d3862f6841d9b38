"""The campaign's runner, with planted parts: none costs the others anything, nothing that was measured is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu_campaign import runner
from benchmarks.gpu_campaign.pack import pack
from benchmarks.gpu_campaign.plan import PARTS, Part, allot, chosen
from benchmarks.gpu_campaign.record import Record, read
from benchmarks.gpu_campaign.runner import Campaign

GOOD = """
def run(record):
    record.row(speed=7)
    record.say("a sentence")
    with open(record.folder / "runs", "a") as file:
        file.write("good ")
    return f"found it, dry {record.dry}"
"""
RAISES = """
def run(record):
    record.row(speed=1)
    raise ValueError("planted\\nsecond line")
"""
DIES = """
import os
def run(record):
    record.row(speed=1)
    os.abort()
"""
# Holds a pipe open, as does its child: the reader sees the end of it when both are gone.
HANGS = """
import subprocess, sys, threading
def run(record):
    pipe = open(record.folder / "pipe", "wb")
    subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"], pass_fds=[pipe.fileno()])
    record.row(speed=1)
    record.row(speed=2)
    threading.Event().wait()
"""
FATAL = """
def run(record):
    record.row(fatal=True)
    return "no GPU"
"""


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], Part]:
    """``plant(number, source)``: a part of that source."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(number: int, source: str) -> Part:
        (tmp_path / f"planted{number}.py").write_text(source)
        return Part(number, f"planted{number}", "planted", 1, 100, 100, number + 1, f"planted{number}")

    return make


def campaign(tmp_path: Path, *parts: Part, **settings) -> Campaign:
    for folder in ("work", "out"):
        (tmp_path / folder).mkdir(exist_ok=True)
    return Campaign(parts, tmp_path / "work", tmp_path / "out", **{"budget": 900.0, "_every": list(parts)} | settings)


def results(tmp_path: Path) -> dict[str, dict]:
    return json.loads((tmp_path / "out" / "results.json").read_text())["parts"]


def test_a_part_that_fails_or_dies_costs_the_others_nothing(tmp_path, plant, capsys):
    parts = [plant(0, RAISES), plant(1, DIES), plant(2, "import nothing_of_this_name\n"), plant(3, GOOD)]
    assert campaign(tmp_path, *parts).run() == 1
    found = results(tmp_path)
    assert [part["status"] for part in found.values()] == ["failed", "failed", "failed", "done"]
    assert found["planted0"]["found"] == "ValueError: planted"
    assert "ended with status -6" in found["planted1"]["found"] and found["planted1"]["rows"] == [{"speed": 1}]
    assert found["planted2"]["found"].startswith("ModuleNotFoundError: No module named 'nothing_of_this_name'")
    assert found["planted3"]["rows"] == [{"speed": 7}] and found["planted3"]["said"] == ["a sentence"]
    told = capsys.readouterr().out
    assert "part 0, planted0" in told and "failed: ValueError: planted\n" in told
    assert "part 3, planted3" in told and "found it, dry False\n    a sentence" in told
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "second line" in log and log.index("part 0, planted0") < log.index("part 3, planted3")


def test_a_part_that_hangs_is_ended_with_all_it_started_and_keeps_its_rows(tmp_path, plant):
    made = campaign(tmp_path, plant(0, HANGS), plant(1, GOOD))
    lines = tmp_path / "work" / "0-planted0.jsonl"
    made.clock = lambda: 200.0 if lines.is_file() and lines.read_text().count("\n") == 2 else 0.0
    os.mkfifo(tmp_path / "work" / "pipe")
    pipe = os.open(tmp_path / "work" / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert made.run() == 1
    os.set_blocking(pipe, True)
    assert os.read(pipe, 1) == b""  # nobody holds it any more
    os.close(pipe)
    found = results(tmp_path)
    assert found["planted0"]["status"] == "stopped at its limit of 100 s"
    assert found["planted0"]["rows"] == [{"speed": 1}, {"speed": 2}]
    assert found["planted0"]["found"] == "its numbers so far are kept (2 rows)"
    assert found["planted1"]["status"] == "done"


STOPPED = """
import sys
from benchmarks.gpu_campaign import runner
from benchmarks.gpu_campaign.plan import Part
runner.PARTS = (Part(0, "planted0", "planted", 1, 100, 100, 1, "planted0"),)
runner.main(["--work", sys.argv[1], "--budget", "900"])
"""


def test_told_to_stop_the_runner_ends_the_part_in_progress(tmp_path, plant):
    plant(0, HANGS)
    work = tmp_path / "work"
    work.mkdir()
    os.mkfifo(work / "pipe")
    command = [sys.executable, "-c", STOPPED, str(work)]
    paths = (runner.ROOT, runner.ROOT / "python", tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    with open(work / "pipe", "rb") as pipe:  # opens when the part has opened its end
        process.send_signal(signal.SIGTERM)
        assert pipe.read() == b""
    assert process.wait(60) == 128 + signal.SIGTERM


def test_the_same_command_goes_on_after_what_is_done(tmp_path, plant, capsys):
    parts = [plant(0, GOOD), plant(1, RAISES), plant(2, GOOD)]
    count = tmp_path / "work" / "runs"
    assert campaign(tmp_path, *parts).run() == 1
    assert count.read_text().split() == ["good"] * 2
    plant(1, GOOD)  # mended
    assert campaign(tmp_path, *parts).run() == 0
    assert count.read_text().split() == ["good"] * 3  # the one that had failed
    assert "part 0, planted0: done before (found it, dry False); --fresh repeats it" in capsys.readouterr().out
    assert campaign(tmp_path, *parts, fresh=True).run() == 0
    assert count.read_text().split() == ["good"] * 6
    assert campaign(tmp_path, *parts[:1], dry=True).run() == 0  # other settings: done again
    assert count.read_text().split() == ["good"] * 7
    assert results(tmp_path)["planted0"]["found"] == "found it, dry True"


def test_other_sources_are_measured_anew(tmp_path, plant, monkeypatch):
    part = plant(0, GOOD)
    campaign(tmp_path, part).run()
    monkeypatch.setattr(runner, "source_digest", lambda: "changed")
    campaign(tmp_path, part).run()
    assert (tmp_path / "work" / "runs").read_text().split() == ["good"] * 2


def test_without_a_gpu_nothing_else_runs(tmp_path, plant, capsys):
    assert campaign(tmp_path, plant(0, FATAL), plant(1, GOOD)).run() == 1
    assert list(results(tmp_path)) == ["planted0"]
    assert "nothing else can run" in capsys.readouterr().out


def test_the_budget_drops_parts_by_priority(tmp_path, plant):
    parts = [plant(number, GOOD) for number in range(3)]  # the last of them matters least
    now = [0.0]

    def take_all(part: Part, limit: float) -> dict:
        now[0] += limit
        return made._result(part, "done", limit, limit, "found")

    made = campaign(tmp_path, *parts, budget=2.2, clock=lambda: now[0])
    made._run = take_all
    assert made.run() == 1
    assert [part["status"] for part in results(tmp_path).values()] == ["done", "done", "left out"]
    assert results(tmp_path)["planted2"]["found"] == "too little of the budget is left"


def test_seconds_go_to_the_least_then_the_usual_then_the_most():
    first, second, third = (
        Part(0, "a", "", 10, 20, 30, 2),
        Part(1, "b", "", 10, 20, 1000, 1),
        Part(2, "c", "", 50, 60, 70, 3),
    )
    assert allot([first, second, third], 5) == {}
    assert allot([first, second, third], 15) == {1: 15}
    assert allot([first, second, third], 25) == {0: 10, 1: 15}
    assert allot([first, second, third], 69) == {0: 20, 1: 49}  # the third does not fit; the second may take most
    assert allot([first, second, third], 75) == {0: 10, 1: 15, 2: 50}
    assert allot([first, second, third], 2000) == {0: 30, 1: 1000, 2: 70}
    whole = allot(PARTS, runner.BUDGET)
    assert set(whole) == {part.number for part in PARTS} and sum(whole.values()) <= runner.BUDGET
    assert all(whole[part.number] >= part.least for part in PARTS)


def test_parts_by_number_range_and_name():
    assert [part.number for part in chosen(None)] == list(range(10))
    assert [part.number for part in chosen("7,0-2, layer")] == [0, 1, 2, 5, 7]
    for text in ("10", "3-x", "gate", "", "-1"):
        with pytest.raises(ValueError, match=r"--parts: expected some of 0 environment, .* got"):
            chosen(text)


def test_what_is_packed_is_few_small_files(tmp_path):
    parts = [Part(0, "few", "", 1, 1, 1, 1), Part(1, "many", "", 1, 1, 1, 2)]
    for part, count in zip(parts, (3, 20_000), strict=True):
        rows = [{"value": number} for number in range(count)]
        (tmp_path / f"{part.stem}.json").write_text(json.dumps({"found": "", "rows": rows}))
        (tmp_path / f"{part.stem}.log").write_bytes(b"begin\n" + b"x" * 3 * 2**20 + b"\nend")
    (tmp_path / "tiles.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    pack(parts, {"commit": "c"}, tmp_path, out, limit=100_000)
    assert {path.name for path in out.iterdir()} == {"results.json", "log.txt", "tiles.json"}
    assert all(path.stat().st_size <= 100_000 for path in out.iterdir())
    found = json.loads((out / "results.json").read_text())
    few, many = found["parts"]["few"], found["parts"]["many"]
    assert found["commit"] == "c" and len(few["rows"]) == 3 and "rows_left_out" not in few
    assert many["rows_left_out"] + len(many["rows"]) == 20_000 and many["rows"][0] == {"value": 0}
    log = (out / "log.txt").read_text()
    assert log.startswith("===== part 0, few\nbegin\n") and log.endswith("\nend") and "bytes or more left out" in log


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    record = Record(tmp_path / "lines", tmp_path, 60)
    record.row(kind="a row's own", value=1)
    record.say("a sentence")
    with open(tmp_path / "lines", "a") as file:
        file.write('{"row": {"val')
    assert read(tmp_path / "lines") == {
        "rows": [{"kind": "a row's own", "value": 1}],
        "said": ["a sentence"],
        "found": None,
    }


def test_out_of_memory_takes_a_smaller_batch_and_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    record = Record(tmp_path / "lines", tmp_path, 60)
    tried = []

    def run(batch: int) -> None:
        tried.append(batch)
        if batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    fits = 2
    assert record.with_smaller_batches(8, run, "a product") == 2
    assert tried == [8, 4, 2]
    said = read(tmp_path / "lines")["said"]
    assert said[0] == "a product: out of memory with a batch of 8, going on with 4" and len(said) == 2
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        record.with_smaller_batches(2, run, "a product")


def test_little_time_is_said(tmp_path):
    record = Record(tmp_path / "lines", tmp_path, 1000)
    assert not record.out_of_time(5, "a case") and record.out_of_time(5000, "a case")
    (said,) = read(tmp_path / "lines")["said"]
    assert re.fullmatch(r"a case: left out, \d+ s are left and it wants 5000", said)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "FILE/out"], "--out: expected a folder to write to, got FILE/out (Not a directory)"),
        (["--work", "FILE"], "--work: expected a folder to write to, got FILE (File exists)"),
        (["--parts", "12"], "--parts: expected some of 0 environment"),
        (["--budget", "0"], "--budget: expected seconds > 0, got 0"),
        (["--budget", "nan"], "--budget: expected seconds > 0, got nan"),
        (["--data", "FOLDER"], "--data: expected a folder with train.parquet and test.parquet, got FOLDER"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, capsys, arguments, expected):
    (tmp_path / "file").write_text("")
    places = {"FILE": str(tmp_path / "file"), "FOLDER": str(tmp_path)}

    def fill(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    given = ["--work", str(tmp_path / "work"), *map(fill, arguments)]
    assert runner.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {fill(expected)}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *(("--work", name) for name in (f"{runner.PARTS[0].stem}.json", "tiles.json", "run/best.pt")),
        *(("--out", name) for name in ("results.json", "log.txt")),
    ],
)
def test_a_folder_keeps_what_is_not_a_campaigns(tmp_path, capsys, monkeypatch, option, name):
    monkeypatch.setattr(Campaign, "run", lambda _: pytest.fail("work began"))
    path = tmp_path / option.strip("-") / name
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    assert runner.main(["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: expected a new name or ") and error.count("\n") == 1
    assert error.endswith(f"got another file at {path}\n")
    assert path.read_text() == '{"mine": 1}'
    assert runner.main(["--work", str(tmp_path / "else"), "--out", ""]) == 2
    assert capsys.readouterr().err == "error: --out: expected a name, got ''\n"


def test_the_runner_needs_no_torch():
    program = "import sys, benchmarks.gpu_campaign.runner; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=runner.ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
