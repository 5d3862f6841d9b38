"""What is carried to a machine without a package registry, and what is installed there."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu_campaign import runner, wheels

SCRIPT = runner.ROOT / "benchmarks" / "gpu_campaign" / "bare_machine.sh"


def plant(folder: Path, name: str, *required: str) -> Path:
    """A wheel with nothing but its metadata."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    fields = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {text}" for text in required)]
    with zipfile.ZipFile(path, "w") as content:
        content.writestr(f"{name}-1.0.dist-info/METADATA", "Metadata-Version: 2.1\n" + "\n".join(fields) + "\n")
        content.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        content.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def test_what_wheels_need_beyond_each_other(tmp_path):
    plant(tmp_path, "planted_one", "Planted.Two>=1", "torch[cuda]>=2; python_version > '3'", "sphinx; extra == 'dev'")
    plant(tmp_path, "planted_two", "typing; python_version < '3.5'", "numpy")
    assert wheels.needed(tmp_path) == ["numpy", "torch"]


def test_what_is_installed_is_left_as_it_is(tmp_path):
    planted = plant(tmp_path, "planted_one")
    plant(tmp_path, "numpy")
    assert wheels.missing(tmp_path) == [planted]


@pytest.mark.parametrize("arguments", [[], ["fetch"]])
def test_an_unknown_verb_is_said(arguments):
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


def test_the_commit_is_this_checkouts_or_the_one_that_was_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)  # inside of no checkout, whatever lies above
    assert runner.commit() is None
    (tmp_path / ".wheels").mkdir()
    (tmp_path / ".wheels" / "commit").write_text("abc-dirty\n")
    assert runner.commit() == "abc-dirty"
    for arguments in (
        ["init"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "--allow-empty", "-m", "planted"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert runner.commit() == head.stdout.strip()
