import subprocess
import sys
import textwrap

import pytest
import torch

from robust_moe.config import save_config
from robust_moe.engine import load_checkpoint, read_metrics

# the command itself; every process leaves the model it begins and ends with
SCRIPT = """
    import copy
    import torch
    from robust_moe.cli import main
    from robust_moe.engine import Trainer

    fit, set_up = Trainer.fit, Trainer._set_up

    def recorded(self, resume=True, override=False):
        outcome = fit(self, resume, override)
        states = self.start, self.model.state_dict()
        torch.save(states, self.folder / f"rank{self.fabric.global_rank}.pt")
        return outcome

    def prepared(self, *options):
        set_up(self, *options)
        self.start = copy.deepcopy(self.model.state_dict())

    Trainer.fit, Trainer._set_up = recorded, prepared
    if __name__ == "__main__":
        main()
"""


@pytest.fixture
def train(tiny, tmp_path):
    """``train(name, devices)``: (first, last) model of each process, trained in the folder ``tmp_path / name``."""
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))

    def run(name, devices, *overrides):
        save_config(tiny(f"run.devices={devices}", "run.epochs=1", *overrides, out=name), tmp_path / f"{name}.yaml")
        command = [sys.executable, str(tmp_path / "train.py"), "train", str(tmp_path / f"{name}.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
        assert done.returncode == 0, done.stderr
        return [torch.load(tmp_path / name / f"rank{rank}.pt", weights_only=True) for rank in range(devices)]

    return run


def differences(one, two):
    """Largest difference of every parameter and buffer."""
    assert one.keys() == two.keys()
    return {name: (value - two[name]).abs().max().item() for name, value in one.items()}


def test_two_processes_train_one_model(train, tmp_path):
    (start, one), (other, two) = train("run", 2)
    assert set(differences(start, other).values()) == {0.0}
    assert max(differences(start, one).values()) > 1e-3  # it went somewhere
    assert set(differences(one, two).values()) == {0.0}  # bit for bit
    folder = tmp_path / "run"
    kinds = [line["kind"] for line in read_metrics(folder)]
    assert kinds == ["train", "train", "routing", "routing", "epoch"]  # written by one of them, once
    state = load_checkpoint(folder / "last.pt")
    assert state["position"] == {"epoch": 1, "batch": 0, "step": 4}  # the batch of 16 is over both
    assert set(differences(one, state["model"]).values()) == {0.0}
    first, second = (rng["torch"] for rng in state["rng"])
    assert not torch.equal(first, second)
    assert (folder / "results.json").exists()


def test_two_processes_compute_what_one_does(train, tmp_path):
    # in single precision, as the engine computes experts; tests/robust_moe/engine/test_ranks.py has every method in
    # double. Without what turns a rounding into a pixel (the sign of a gradient): no gradient steps in the attack
    settings = ("run.sync_batch_norm=true", "method.attack.steps=0", "data.augment.flip=true", "run.log_every=1")
    (_, one), (_, two) = train("both", 2, *settings)
    ((start, alone),) = train("alone", 1, *settings)
    assert set(differences(one, two).values()) == {0.0}
    assert max(differences(start, alone).values()) > 1e-2
    assert max(differences(one, alone).values()) < 1e-6  # sums in another order: 6e-8
    lines = zip(read_metrics(tmp_path / "both", "train"), read_metrics(tmp_path / "alone", "train"), strict=True)
    for both, single in lines:
        assert both["lr"] == single["lr"]
        for name in ("task_loss", "accuracy", "balance_loss"):
            assert both[name] == pytest.approx(single[name], abs=1e-6)


def test_two_processes_train_networks_though_each_may_leave_some_without_an_image(train):
    mixture = ("model.moe.layers=[]", "model.mixture.num_experts=4", "model.mixture.routing=hard")
    (start, one), (_, two) = train("networks", 2, *mixture, "method.attack.steps=1")
    assert set(differences(one, two).values()) == {0.0}
    moved = differences(start, one)
    assert max(value for name, value in moved.items() if name.startswith("gate.")) > 0
    assert max(value for name, value in moved.items() if name.startswith("experts.")) > 1e-3
