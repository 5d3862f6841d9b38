"""An optimiser and a schedule from outside the package, with settings of their own: one class each, registered."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from robust_moe.config import ConfigError, load_config
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint
from robust_moe.engine.experiment import load_experiment
from robust_moe.optim import OPTIMIZERS, SCHEDULES, SGD, learning_rate

MODULE = '''
from __future__ import annotations

from dataclasses import dataclass

import torch

from robust_moe.optim import OPTIMIZERS, SCHEDULES, OptimizerConfig, Place, Schedule
from robust_moe.settings import ConfigError, setting


@SCHEDULES.register("stairs")
class Stairs(Schedule):
    """Down in equal steps to one above zero."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Schedule.Config):
        steps: int = setting(4, "of the stairs", at_least=1)
        top: float | None = setting(None, "refuse a higher peak", above=0)

        def expect_peak(self, lr: float) -> None:
            if self.top is not None and lr > self.top:
                raise ConfigError(f"top: expected at least lr = {lr}, got {self.top}")

    def rate(self, lr: float, place: Place) -> float:
        return lr * (1 - int(place.share * self.config.steps) / self.config.steps)


@OPTIMIZERS.register("sign_sgd")
class SignSGD(torch.optim.Optimizer):
    """The sign of an average of the gradient (Bernstein et al., 2018, arXiv:1802.04434)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(OptimizerConfig):
        memory: float = setting(0.5, "share of the old average in the new", at_least=0, below=1)

    def __init__(self, params, lr, weight_decay, memory):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "memory": memory})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.mul_(group["memory"]).add_(p.grad, alpha=1 - group["memory"])
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(average.sign(), alpha=group["lr"])
'''
CHOSEN = (
    "run.imports=[signs_and_stairs]",
    "optim={name: sign_sgd, lr: 0.01, memory: 0.75, schedule: {name: stairs, steps: 2}}",
)


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module in the working folder; the tables and the imported modules are afterwards as they were."""
    (tmp_path / "signs_and_stairs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for table in (OPTIMIZERS, SCHEDULES):
        monkeypatch.setattr(table, "_entries", dict(table.items()))
    monkeypatch.delitem(sys.modules, "signs_and_stairs", raising=False)
    yield
    sys.modules.pop("signs_and_stairs", None)


def fit(config, **options):
    trainer = Trainer(config, Reporter(enabled=False))
    return trainer, trainer.fit(**options)


def test_a_run_uses_their_settings_and_goes_on_from_its_checkpoint(tiny):
    trainer, whole = fit(tiny(*CHOSEN, out="whole"))
    assert type(trainer.optimizer.optimizer).__name__ == "SignSGD"
    (group,) = trainer.optimizer.param_groups
    assert (group["memory"], group["weight_decay"]) == (0.75, 5e-4)
    assert group["lr"] == 0.005  # of the last of eight steps, on the lower of two stairs

    fit(tiny(*CHOSEN, "run.epochs=1", out="parts"))
    with pytest.raises(CheckpointError, match=r"optim.memory: checkpoint has 0.75, got 0.5"):
        fit(tiny(*CHOSEN, "optim.memory=0.5", "run.epochs=1", out="parts"))
    steady = (*CHOSEN, "optim.schedule.steps=1")  # the rate of a step does not depend on the run's length
    fit(tiny(*steady, "run.epochs=1", out="again"))
    gone_on, _ = fit(tiny(*steady, out="again"), override=True)
    at_once, _ = fit(tiny(*steady, out="at_once"))
    for name, value in at_once.model.state_dict().items():
        assert torch.equal(gone_on.model.state_dict()[name], value), name

    saved = load_checkpoint(whole.folder / "last.pt")
    assert saved["schedule"] == {"name": "stairs", "step": 8}
    assert load_experiment(whole.folder / "last.pt")[0].optim == tiny(*CHOSEN).optim


def test_their_settings_are_checked_like_ours(tiny):
    for override, message in {
        "optim.memory=1": r"optim.memory: expected a number in \[0, 1\), got 1.0",
        "optim.memry=1": "unknown key 'optim.memry' of optimiser 'sign_sgd'; did you mean 'optim.memory'",
        "optim.momentum=0.5": "unknown key 'optim.momentum' of optimiser 'sign_sgd'",
        "optim.schedule.steps=0": "optim.schedule.steps: expected a whole number >= 1, got 0",
        "optim.schedule.step=2": "'optim.schedule.step' of schedule 'stairs'; did you mean 'optim.schedule.steps'",
        "optim.schedule.top=0.001": "optim.schedule.top: expected at least lr = 0.01, got 0.001",
    }.items():
        with pytest.raises(ConfigError, match=message):
            tiny(*CHOSEN, override)


def test_settings_that_all_have_survive_another_name():
    load_config(None, [CHOSEN[0]])
    both = load_config(None, [CHOSEN[0], "optim.lr=0.2", "optim.schedule=stairs", "optim.name=sign_sgd"]).optim
    assert (both.lr, both.schedule.name, both.memory) == (0.2, "stairs", 0.5)
    rates = [learning_rate(SGD.Config(lr=0.2, schedule=both.schedule), step, 8, 4) for step in range(8)]
    assert rates == pytest.approx([0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.05, 0.05])
