"""Benchmarks write over records of their own alone, and say in a sentence what they lack."""

import json
import sys
from types import ModuleType

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


def _module(monkeypatch: pytest.MonkeyPatch, name: str, run) -> None:
    """What the command imports as the benchmark of that name."""
    module = ModuleType(f"robust_moe.benchmarks.{name}")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_benchmark_that_lacks_a_package_is_left_out_and_the_others_are_written(tmp_path, monkeypatch, capsys):
    def lacking(_):
        raise ModuleNotFoundError("No module named 'pyautoattack.x'", name="pyautoattack.x")

    _module(monkeypatch, "autoattack", lacking)
    _module(monkeypatch, "apgd", lambda _: [])
    arguments = ["benchmarks", "--device", "cpu", "--out", str(tmp_path), "autoattack", "apgd"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == "left out, for want of a package: autoattack"
    assert "left out: autoattack needs pyautoattack, which is not installed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["apgd.json"]


def test_a_module_of_ours_that_is_missing_is_no_package_to_install(monkeypatch):
    def broken(_):
        raise ModuleNotFoundError("No module named 'robust_moe.gone'", name="robust_moe.gone")

    _module(monkeypatch, "apgd", broken)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--device", "cpu", "apgd"])
    with pytest.raises(ModuleNotFoundError, match=r"robust_moe\.gone"):
        command.main()


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "invalid choice: 'gpu'"), ("cuda", "--device: expected a CUDA device for 'cuda', PyTorch sees none")],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, capsys, device, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _module(monkeypatch, "apgd", lambda _: pytest.fail("work began"))
    monkeypatch.setattr("sys.argv", ["benchmarks", "--device", device, "apgd"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
