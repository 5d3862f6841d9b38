"""``robust-moe config``, ``--dry-run``, the list of commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from robust_moe.commands import COMMANDS, app
from robust_moe.config import load_config, preset_names, save_config


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def rows(output: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells if row[0]}


def test_every_setting_in_force_says_where_it_comes_from():
    done = run("config", "digits-blockmoe", "method=trades", "method.beta=5")
    assert done.exit_code == 0, done.output
    found = rows(done.output)
    assert found["method.name"][0::2] == ["trades", "override"]
    assert found["method.beta"][0::2] == ["5.0", "override"]
    assert found["model.moe.layers"][0::2] == ['["layer4.1"]', "digits-blockmoe"]
    assert found["run.log_every"][0::2] == ["20", "default"]
    assert found["run.log_every"][1].endswith("[steps]")
    assert found["method.attack.eps"][1] == "radius of the ball, a number or an exact fraction"


@pytest.mark.parametrize("preset", preset_names())
def test_the_yaml_is_the_configuration(preset: str, tmp_path: Path):
    done = run("config", preset, "--yaml", "run.seed=7")
    assert done.exit_code == 0, done.output
    (tmp_path / "all.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "all.yaml") == load_config(preset, ["run.seed=7"])


def test_every_setting_has_a_meaning():
    for preset in preset_names():
        assert all(row[1] for row in rows(run("config", preset).output).values())


def test_a_dry_run_of_training_says_what_it_costs_and_writes_nothing(tiny, tmp_path):
    save_config(tiny(), tmp_path / "run.yaml")
    done = run("train", tmp_path / "run.yaml", "--dry-run")
    assert done.exit_code == 0, done.output
    facts = dict(line.split(": ", 1) for line in done.output.splitlines())
    assert facts["data"] == "digits: 64 training, 29 validation, 40 test images"
    assert facts["method"] == "pgd_at, 2 epochs, 16 images at a time"
    assert facts["model"].endswith(" multiply-adds a forward")
    assert facts["passes"].startswith("896 of an image, ")  # 2 epochs of 64 images, PGD-2: 2 * 2 + 3 passes
    assert facts["passes"].endswith(" multiply-adds")
    assert not (tmp_path / "run").exists()


def count(facts: dict[str, str]) -> int:
    """Passes of an image that a dry run names."""
    return int(facts["passes"].split()[2].replace(",", ""))


def test_a_dry_run_of_an_evaluation_counts_the_attacks_passes(tiny, tmp_path):
    save_config(tiny("run.epochs=1"), tmp_path / "run.yaml")
    assert run("train", tmp_path / "run.yaml").exit_code == 0
    before = {path.name for path in (tmp_path / "run").iterdir()}
    done = run("eval", tmp_path / "run", "--n", 20, "--preset", "standard", "--dry-run")
    assert done.exit_code == 0, done.output
    facts = dict(line.split(": ", 1) for line in done.output.splitlines())
    assert facts["data"] == "digits: 20 of 40 test images"
    assert facts["attack pgd"] == "at most 2 forwards and 2 backwards of an image"
    assert facts["attack square"] == "at most 5,002 forwards and 0 backwards of an image"
    assert {path.name for path in (tmp_path / "run").iterdir()} == before
    done = run("eval", tmp_path / "run", "--n", 20, "--preset", "full", "--dry-run")
    full = dict(line.split(": ", 1) for line in done.output.splitlines())
    assert full["attack pgd-margin"] == "at most 2 forwards and 2 backwards of an image"
    # 4 experts: PGD, the clean images and PGD's, and four climbs of 40 steps with a score each
    assert full["attack steering"] == "at most 206 forwards and 200 backwards of an image"
    joint, transfer, margin, steering = 3 + 4, 2 + 4, 2 + 4, 206 + 400
    extra = 20 * (joint + transfer + margin + steering)
    assert [count(facts) + extra, list(full)[:3]] == [count(full), list(facts)[:3]]
    wrong = run("eval", tmp_path / "run", "--preset", "fast", "--dry-run")
    assert wrong.exit_code == 2
    assert "preset: expected one of quick" in wrong.stderr
    wrong = run("eval", tmp_path / "run", "--split", "tests", "--dry-run")
    assert wrong.exit_code == 2
    assert "split: expected one of train, val, test, got 'tests'" in wrong.stderr


def test_the_list_of_commands_says_what_each_helps_with():
    listed = run("--help").output
    for name, (_, summary) in COMMANDS.items():
        assert name in listed
        words = " ".join(run(name, "--help").output.replace("│", " ").split())
        assert summary in words


def test_the_list_of_commands_imports_no_pytorch():
    script = (
        "import sys; from robust_moe.commands import app; app(['--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
