"""Benchmarks write over records of their own alone."""

import json

import pytest

from benchmarks import launches, schedule
from robust_moe.benchmarks import command
from robust_moe.benchmarks.records import write_record

MAINS = {"apgd": command.main, "launches": launches.main, "schedule": schedule.main}


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize("content", ["mine", '{"benchmark": "another"}', "[]"])
def test_another_file_in_a_records_place_is_kept(tmp_path, monkeypatch, capsys, name, content):
    for module, work in ((launches, "count"), (schedule, "rows")):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("work began"))
    path = tmp_path / f"{name}.json"
    path.write_text(content)
    monkeypatch.setattr("sys.argv", ["benchmarks", *([name] if name == "apgd" else []), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        MAINS[name]()
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"--out: expected a new name or an earlier record of {name}, got another file at {path}")
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("out", "words"), [("", "expected a name, got ''"), ("FILE", "expected a folder to write to, got ")]
)
def test_what_is_no_folder_is_refused(tmp_path, monkeypatch, capsys, out, words):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("sys.argv", ["benchmarks", "--out", out.replace("FILE", str(tmp_path / "file"))])
    with pytest.raises(SystemExit):
        schedule.main()
    assert f"argument --out: {words}" in capsys.readouterr().err


def test_a_record_is_written_over_by_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "rows", lambda: [{"batch": 1}])
    monkeypatch.setattr("sys.argv", ["benchmarks", "--out", str(tmp_path)])
    write_record(tmp_path, "schedule", json.dumps({"benchmark": "schedule", "rows": []}))
    schedule.main()
    assert json.loads((tmp_path / "schedule.json").read_text())["rows"] == [{"batch": 1}]
