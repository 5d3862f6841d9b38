"""Going on with another configuration (``--override``): what it may change, that the change is really made, and what it
makes of the best validation so far."""

import io
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from robust_moe.commands import app
from robust_moe.config import load_config, save_config
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint, read_metrics, save_checkpoint
from robust_moe.optim import OPTIMIZERS, SCHEDULES
from robust_moe.settings import field_types


def fit(config, **options):
    console = Console(record=True, width=300, file=io.StringIO())
    trainer = Trainer(config, Reporter(console=console))
    outcome = trainer.fit(**options)
    return trainer, outcome, console.export_text()


def test_override_goes_on_and_says_what_changed(tiny):
    _, first, _ = fit(tiny("run.epochs=1"))
    with pytest.raises(CheckpointError, match=r"run.epochs: checkpoint has 1, got 2.*--override"):
        fit(tiny())
    _, outcome, said = fit(tiny("optim.lr=0.01"), override=True)
    assert "changed: optim.lr: checkpoint has 0.1, got 0.01" in said
    assert "changed: run.epochs: checkpoint has 1, got 2" in said
    assert outcome.steps == 8
    assert [line["epoch"] for line in read_metrics(outcome.folder, "epoch")] == [1, 2]
    assert load_config(outcome.folder / "config.yaml").optim.lr == 0.01
    assert outcome.best["robust"] >= first.best["robust"]
    assert fit(tiny("optim.lr=0.01"))[1].steps == 8  # the new configuration is the run's from then on


def test_override_starts_an_average_and_forgets_a_best_measured_otherwise(tiny):
    fit(tiny("run.epochs=1"))
    trainer, outcome, _ = fit(tiny("run.ema_decay=0.5", "eval.attack.eps=0.02"), override=True)
    assert trainer.state.average.batches == 4
    assert outcome.best["epoch"] == 2


@pytest.mark.parametrize(
    "change",
    [
        "run.batch_size=8",
        "run.seed=1",
        "optim.name=adam",
        "data.train_limit=32",
        "model.init_from=elsewhere",
        "model.dual.standard.init_from=elsewhere",
    ],
)
def test_override_refuses_what_the_saved_state_depends_on(tiny, change):
    fit(tiny("run.epochs=1"))
    with pytest.raises(CheckpointError, match=rf"--override cannot change.*{change.partition('=')[0]}: checkpoint has"):
        fit(tiny("run.epochs=1", change), override=True)


def test_the_command_hands_override_on(tiny, tmp_path, monkeypatch):
    asked = {}

    class Recorded(Trainer):
        def fit(self, **options):
            asked.update(options)
            raise CheckpointError("enough")

    monkeypatch.setattr("robust_moe.engine.trainer.Trainer", Recorded)
    save_config(tiny(), tmp_path / "run.yaml")
    for flags, expected in (((), False), (("--override",), True)):
        assert CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), *flags]).exit_code == 2
        assert asked == {"resume": True, "override": expected}


# --- every setting of the optimiser takes effect ---

SGD, ADAM = ("run.epochs=1",), ("run.epochs=1", "optim.name=adam", "optim.lr=1e-3")
CYCLIC = ("optim.schedule=cyclic", "optim.schedule.cycle_epochs=1")
CHANGES = {
    "lr": (SGD, "optim.lr=0.01"),
    "momentum": (SGD, "optim.momentum=0.5"),
    "nesterov": (SGD, "optim.nesterov=false"),
    "weight_decay": (SGD, "optim.weight_decay=0.1"),
    "betas": (ADAM, "optim.betas=[0.5,0.9]"),
    "eps": (ADAM, "optim.eps=0.01"),
    "weight_decay of adam": (ADAM, "optim.weight_decay=0.1"),
    "weight_decay_on": ((*SGD, "optim.weight_decay=0.1"), "optim.weight_decay_on=weights"),
    "schedule": (SGD, "optim.schedule.name=constant"),
    "power": (SGD, "optim.schedule.power=3"),
    "milestones": ((*SGD, "optim.schedule=multistep"), "optim.schedule.milestones=[0.2,0.3]"),
    "factor": ((*SGD, "optim.schedule=multistep"), "optim.schedule.factor=0.5"),
    "lr_min": ((*SGD, *CYCLIC), "optim.schedule.lr_min=0.05"),
    "cycle_epochs": ((*SGD, *CYCLIC), "optim.schedule.cycle_epochs=0.7"),
    "rise": ((*SGD, "optim.schedule=one_cycle"), "optim.schedule.rise=0.6"),
    "fall": ((*SGD, "optim.schedule=one_cycle"), "optim.schedule.fall=cosine"),
    "warmup_epochs": (SGD, "optim.warmup_epochs=2"),
    "grad_clip": (SGD, "optim.grad_clip=0.01"),
}


def test_every_setting_of_optimisers_and_schedules_is_tried():
    settings = {name for table in (OPTIMIZERS, SCHEDULES) for config in table.values() for name in field_types(config)}
    assert {name.partition(" ")[0] for name in CHANGES} == settings


@pytest.mark.parametrize("name", CHANGES)
def test_an_overridden_optimiser_setting_takes_effect(tiny, tmp_path, name):
    before, change = CHANGES[name]
    fit(tiny(*before))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    plain, _, _ = fit(tiny(*before, "run.epochs=2"), override=True)
    config = tiny(*before, "run.epochs=2", change, out="other")
    changed, _, said = fit(config, override=True)
    assert f"changed: {change.partition('=')[0]}: " in said
    fresh = config.optim.build(changed.model).param_groups
    saved = load_checkpoint(tmp_path / "other" / "last.pt")["optimizer"]["param_groups"]
    for groups in (changed.optimizer.param_groups, saved):
        for group, expected in zip(groups, fresh, strict=True):
            assert {k: v for k, v in group.items() if k not in ("params", "lr")} == {
                k: v for k, v in expected.items() if k not in ("params", "lr")
            }
    assert not torch.equal(plain.model.conv1.weight, changed.model.conv1.weight)


# --- the best so far ---


@pytest.mark.parametrize(
    "change", ["model.moe.top_k=1", "model.moe.noise_std=0.1", "eval.attack.eps=0.02", "run.ema_decay=0.5",
     "run.ema_epochs=1"],
)  # fmt: skip
def test_a_best_that_was_measured_otherwise_does_not_count(tiny, change):
    _, first, _ = fit(tiny("run.epochs=1"))
    state = load_checkpoint(first.folder / "last.pt")
    state["best"] |= {"robust": 2.0}  # beyond reach
    for name in ("last.pt", "best.pt"):
        save_checkpoint({key: value for key, value in state.items() if key != "format"}, first.folder / name)
    _, outcome, _ = fit(tiny(change), override=True)
    assert outcome.best["epoch"] == 2 and outcome.best["robust"] <= 1
    assert load_checkpoint(outcome.folder / "best.pt")["position"]["epoch"] == 2


# --- nothing left to do ---


@pytest.mark.parametrize("changes", [("eval.attack.steps=3",), ("run.max_steps=2",), ("optim.lr=0.01", "run.epochs=1")])
def test_a_finished_run_is_not_changed(tiny, changes):
    _, outcome, _ = fit(tiny())
    before = {path.name: path.read_bytes() for path in outcome.folder.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"last.pt: --override expects steps that are left to do, got a run of 8"):
        fit(tiny(*changes), override=True)
    assert {path.name: path.read_bytes() for path in outcome.folder.iterdir() if path.is_file()} == before
    assert fit(tiny())[1].best == outcome.best


def test_the_written_configuration_is_that_of_the_checkpoint(tiny):
    """Killed before the first checkpoint, an override has changed no file."""
    _, outcome, _ = fit(tiny("run.epochs=1"))
    trainer = Trainer(tiny("optim.lr=0.01"), Reporter(enabled=False))

    def killed(batch):
        raise KeyboardInterrupt

    trainer._step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(override=True)
    assert load_config(outcome.folder / "config.yaml") == tiny("run.epochs=1")
    assert fit(tiny("run.epochs=1"))[1].steps == 4


# --- what methods carry on ---


def test_a_guard_that_is_switched_off_lets_go_of_pgd(tiny):
    _, first, _ = fit(tiny("run.epochs=1", "method.name=fast_at"))
    state = load_checkpoint(first.folder / "last.pt")
    state["method"] = {"with_pgd": True, "met": True}
    save_checkpoint({key: value for key, value in state.items() if key != "format"}, first.folder / "last.pt")
    _, outcome, _ = fit(tiny("method.name=fast_at", "method.overfit_guard=false"), override=True)
    assert [line["on_pgd"] for line in read_metrics(outcome.folder, "train")][2:] == [0, 0]


def test_a_perturbation_that_is_carried_on_stays_in_the_new_ball(tiny):
    name = "method.name=free_at"
    fit(tiny("run.epochs=1", name, "method.attack.eps=0.3"))
    trainer = Trainer(tiny(name, "method.attack.eps=0.01"), Reporter(enabled=False))
    step, largest = trainer._step, []

    def watched(batch):
        largest.append(float(trainer.method._start(batch.images).abs().max()))
        step(batch)

    trainer._step = watched
    trainer.fit(override=True)
    assert 0 < max(largest) <= 0.01 + 1e-8


# --- settings that are newer than a checkpoint ---

NEWER = {
    "method": ("label_smoothing", "attack_steps_schedule"),
    "optim": ("weight_decay_on",),
    "run": ("ema_epochs",),
}


def test_a_checkpoint_that_is_older_than_a_setting_was_made_with_its_default(tiny):
    """So it goes on as it is, and only another value is a change."""
    one_cycle = "optim.schedule=one_cycle"
    _, outcome, _ = fit(tiny("run.epochs=1", one_cycle))
    state = load_checkpoint(outcome.folder / "last.pt")
    for section, names in NEWER.items():
        for name in names:
            del state["config"][section][name]
    del state["config"]["data"]["augment"]["flip_order"], state["config"]["optim"]["schedule"]["rise"]
    save_checkpoint({key: value for key, value in state.items() if key != "format"}, outcome.folder / "last.pt")
    with pytest.raises(CheckpointError) as error:
        fit(tiny(one_cycle, "optim.schedule.rise=0.5"))
    assert "optim.schedule.rise: checkpoint has 0.3, got 0.5" in str(error.value)
    assert "label_smoothing" not in str(error.value)
    _, _, said = fit(tiny("run.epochs=2", one_cycle, "optim.weight_decay_on=weights"), override=True)
    assert "changed: optim.weight_decay_on: checkpoint has 'all', got 'weights'" in said
    assert said.count("changed: ") == 2
