"""What is carried to a machine without a package registry, and what is installed there."""

from __future__ import annotations

import os
import shutil
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
    done = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=800)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and done.stderr.count("\n") == 1


PYTHON = """#!/usr/bin/env bash
case "$*" in
  *EXT_SUFFIX*) echo .planted.so ;;
  *build_ext*) echo built >>builds; touch robust_moe_kernels/_C.planted.so ;;
esac
"""


def test_the_extension_is_built_where_its_sources_are_others(tmp_path):
    for name in ("benchmarks/gpu_campaign", "csrc", "robust_moe_kernels"):
        (tmp_path / name).mkdir(parents=True)
    source, python = tmp_path / "csrc" / "a.cpp", tmp_path / "python3"
    script = shutil.copy(SCRIPT, tmp_path / "benchmarks" / "gpu_campaign")
    (tmp_path / "setup.py").write_text("")
    source.write_text("one")
    python.write_text(PYTHON)
    python.chmod(0o755)

    def builds() -> int:
        env = os.environ | {"PYTHON": str(python)}
        subprocess.run(["bash", script, "run"], env=env, check=True, capture_output=True, timeout=800)
        return (tmp_path / "builds").read_text().count("built")

    assert builds() == 1
    os.utime(source, (2e9, 2e9))  # as after a transfer
    assert builds() == 1
    source.write_text("two")
    os.utime(source, (1e9, 1e9))
    assert builds() == 2 == builds()


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
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, timeout=800)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert runner.commit() == head.stdout.strip()
