import subprocess
import sys
from pathlib import Path

import torch

from robust_moe.config import save_config
from robust_moe.engine import load_checkpoint, read_metrics


def test_two_processes_train_one_model(tiny, tmp_path):
    config = tiny("run.devices=2", "run.epochs=1")
    save_config(config, tmp_path / "config.yaml")
    command = [str(Path(sys.executable).with_name("robust-moe")), "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    kinds = [line["kind"] for line in read_metrics(folder)]
    assert kinds == ["train", "train", "routing", "routing", "epoch"]  # written by one of them, once
    state = load_checkpoint(folder / "last.pt")
    assert state["position"] == {"epoch": 1, "batch": 0, "step": 4}  # the batch of 16 is over both
    one, two = (rng["torch"] for rng in state["rng"])
    assert not torch.equal(one, two)
    assert (folder / "results.json").exists()

    # the same on one process: the same images in the same steps, but BN statistics of half a batch
    save_config(tiny("run.epochs=1", out="single"), tmp_path / "single.yaml")
    done = subprocess.run([*command[:2], str(tmp_path / "single.yaml")], capture_output=True, check=False, timeout=200)
    assert done.returncode == 0
    single = read_metrics(tmp_path / "single", "train")
    for both, alone in zip(read_metrics(folder, "train"), single, strict=True):
        assert both["lr"] == alone["lr"]
        assert abs(both["task_loss"] - alone["task_loss"]) < 0.5
