"""The workflows under .github: what they call is there. That they run is for the service to say; this finds a target,
an extra or a file that was renamed."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="the extra train is not installed: pip install '.[train]'")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEELS = PROJECT["tool"]["cibuildwheel"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
# What the commands of workflows, and of cibuildwheel's tests, may be: a further one gets a check of its own below.
INSTALLED = {"pip", "python", "sudo"}
# Versions before these run on Node 20, whose removal from the runners was announced for September 2026.
ON_NODE_24 = {"actions/checkout": 5, "actions/setup-python": 6, "actions/upload-artifact": 6}
# Runners of these labels are gone (actions/runner-images issues 11101, 12045, 13046, 13518): such a job never starts.
RETIRED = {"ubuntu-20.04", "windows-2019", "macos-13", "macos-14"}


def load(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(workflow: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    yield from workflow["jobs"].values()


def faults_of(line: str) -> list[str]:
    """What a command line calls that is not there."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # settings before it
    command, arguments = words[0], words[1:]
    faults = []
    if command == "make":
        faults += [f"make {target}" for target in arguments if target not in TARGETS]
    elif "/" in command:
        file = ROOT / command
        if not (file.is_file() and os.access(file, os.X_OK)):
            faults.append(command)
    elif command not in INSTALLED:
        faults.append(command)
    if command == "python" and arguments[0].endswith(".py"):
        file = arguments[0].replace("{project}", ".")
        faults += [] if (ROOT / file).is_file() else [file]
    for extras in re.findall(r"\.\[([\w,-]+)\]", line):
        faults += [name for name in extras.split(",") if name not in PROJECT["project"]["optional-dependencies"]]
    return faults


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("make docs", []),
        ("make doc", ["make doc"]),
        (".ci/run", []),
        (".ci/walk", [".ci/walk"]),
        (".ci/check_wheels.py", [".ci/check_wheels.py"]),  # is there, but nothing that can be executed
        ("RMK_BUILD=cpu python .ci/check_import.py cpu", []),
        ("python .ci/check_imports.py", [".ci/check_imports.py"]),
        ("python {project}/.ci/check_import.py cpu", []),
        ("pip install .[train,tests]", ["tests"]),
        ("tox", ["tox"]),
    ],
)
def test_what_is_missing_is_found(line, missing):
    assert faults_of(line) == missing


def test_there_are_workflows_for_tests_wheels_and_docs():
    assert {path.stem for path in WORKFLOWS} == {"tests", "wheels", "docs"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_is_there(path):
    workflow = load(path)
    assert workflow[True]  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for job in jobs(workflow):
        assert job["timeout-minutes"] <= 120
        assert job["runs-on"]
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d[\d.]*", step["uses"]), step["uses"]
            else:
                assert [fault for line in step["run"].splitlines() for fault in faults_of(line)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_asks_for_runners_and_actions_that_still_run(path):
    for job in jobs(load(path)):
        matrix = job.get("strategy", {}).get("matrix", {}).get("include", [])
        labels = {row["runs-on"] for row in matrix} or {job["runs-on"]}
        assert not labels & RETIRED
        for action, _, version in (step["uses"].partition("@v") for step in job["steps"] if "uses" in step):
            assert int(version.split(".")[0]) >= ON_NODE_24.get(action, 0), action


def test_what_a_job_keeps_is_what_it_made():
    """An artifact's folder is one that a step before it writes to."""
    for path in WORKFLOWS:
        for job in jobs(load(path)):
            kept = [step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
            text = "\n".join(str(step) for step in job["steps"])
            for folder in (name.split("/*")[0] for name in kept):
                made = {"build/site": "make docs", "wheelhouse": "pypa/cibuildwheel", "dist": "--outdir dist"}[folder]
                assert made in text
    assert re.search(r"^site_dir: build/site$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_wheels_are_built_for_every_system_and_python_that_is_promised():
    (job,) = (job for job in jobs(load(ROOT / ".github/workflows/wheels.yml")) if "strategy" in job)
    systems = {(row["runs-on"].split("-")[0], row["archs"]) for row in job["strategy"]["matrix"]["include"]}
    assert systems == {("ubuntu", "x86_64"), ("ubuntu", "aarch64"), ("macos", "arm64"), ("windows", "AMD64")}
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert WHEELS["build"] == [f"cp{version.replace('.', '')}-*" for version in versions]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"


def test_a_wheel_is_tried_where_it_was_built():
    assert faults_of(WHEELS["test-command"]) == []
    mode = WHEELS["environment"]["RMK_BUILD"]
    assert WHEELS["test-command"].endswith(f" {mode}")
    assert WHEELS["macos"]["environment"]["RMK_BUILD"] == mode  # a system's table replaces the whole one
