import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from robust_moe.cli import app
from robust_moe.config import save_config
from robust_moe_kernels.env import report


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def config(tiny, tmp_path):
    save_config(tiny("run.epochs=1"), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def test_train_then_eval(config, tmp_path):
    done = run("train", config, "optim.lr=0.05")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "run"
    state = {"config.yaml", "metrics.jsonl", "tensorboard", "last.pt", "best.pt"}
    shown = {"results.json", "results-masks.npz", "training.png", "routing.png"}
    assert {item.name for item in folder.iterdir()} == state | shown
    assert "lr: 0.05" in (folder / "config.yaml").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert results["count"] == 40
    assert f"{100 * results['clean']:.1f} [" in done.output
    assert "PGD-2, Linf eps = 1/10" in done.output

    options = ("--attack-steps", 3, "--attack-eps", "1/20", "--attack-restarts", 2)
    done = run("eval", folder, *options, "eval.batch_size=16")
    assert done.exit_code == 0, done.output
    again = json.loads((folder / "results-best-test.json").read_text())
    assert again["attack"] | {"steps": 3, "eps": "1/20", "alpha": "1/24", "restarts": 2} == again["attack"]
    assert again["clean"] == results["clean"]  # the same model on the same images
    assert again["routing"] == results["routing"]

    out = tmp_path / "elsewhere" / "val.json"
    done = run("eval", folder / "last.pt", "--split", "val", "--out", out)
    assert done.exit_code == 0, done.output
    val = json.loads(out.read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert val["data"]["split"] == "val"
    assert val["clean"] == last["val_clean"]

    again = run("train", config, "optim.lr=0.05")  # nothing left to do
    assert again.exit_code == 0
    assert "4 of 4 steps done" in again.output
    fresh = run("train", config, "--fresh")
    assert fresh.exit_code == 0
    assert json.loads((folder / "results.json").read_text())["model"]["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digits-blokmoe"], "did you mean 'digits-blockmoe'"),
        (["train", "CONFIG", "optim.lrr=1"], "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        (["train", "CONFIG", "method.name=pgdat"], "did you mean 'pgd_at'"),
        (["train", "CONFIG", "data.name=digit"], "did you mean 'digits'"),
        (["train", "CONFIG", "data.name=parquet", "data.root=/nowhere"], "/nowhere/train.parquet"),
        (["train", "CONFIG", "model.moe.layers=[layer9]"], "layer9"),
        (["train", "CONFIG", "run.out=/proc/nowhere"], "/proc/nowhere"),  # a folder that cannot be made
        (["eval", "nothing.pt"], "nothing.pt: expected a checkpoint file, found nothing"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(config, arguments, words):
    done = run(*[config if argument == "CONFIG" else argument for argument in arguments])
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_eval_refuses_other_architectures_and_damage(config, tmp_path):
    assert run("train", config).exit_code == 0
    folder = tmp_path / "run"
    done = run("eval", folder, "model.width=8")
    assert done.exit_code == 2
    assert "a checkpoint of another architecture" in done.stderr
    assert "conv1.weight: expected shape [8, 1, 3, 3], got [4, 1, 3, 3]" in done.stderr
    done = run("eval", folder, "data.image_size=12")
    assert done.exit_code == 2
    assert "expected image size 8" in done.stderr
    done = run("eval", folder, "--split", "tset")
    assert done.exit_code == 2
    assert "split: expected one of train, val, test, got 'tset'" in done.stderr
    done = run("train", config, "optim.lr=0.5")
    assert done.exit_code == 2
    assert "optim.lr: checkpoint has 0.1, got 0.5" in done.stderr
    (folder / "best.pt").write_bytes(b"broken")
    done = run("eval", folder, "--traceback")
    assert done.exit_code == 2
    assert "best.pt: expected a whole checkpoint" in done.stderr
    assert "Traceback" in done.stderr  # asked for


def test_env_names_every_op_and_implementation():
    done = run("env")
    assert done.exit_code == 0
    rows = report()
    assert rows
    for row in rows:
        assert row.op in done.output
        assert row.impl in done.output
    assert "torch" in done.output


def test_the_console_script_is_installed():
    command = [sys.executable, "-c", "from robust_moe.cli import main; main()", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in ("train", "eval", "env", "demo"):
        assert name in done.stdout
