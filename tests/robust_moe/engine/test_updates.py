"""The engine around a method's updates: who moves, gradients never applied twice, averages, guards, resuming."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from robust_moe.config import ConfigError
from robust_moe.data import Batch
from robust_moe.engine import Reporter, Trainer, WeightAverage, load_checkpoint, read_metrics
from robust_moe.engine.ema import average_decay
from robust_moe.engine.experiment import load_experiment
from robust_moe.engine.fabric import make_fabric
from robust_moe.engine.guards import GateWatch
from robust_moe.engine.updates import Updater
from robust_moe.methods import METHODS, Method, Objective
from robust_moe.optim import OPTIMIZERS
from robust_moe_kernels.modules import FusedConvMoE

NEVER_EQUAL = ("seconds", "val_seconds", "images_per_second")
DUAL = ("model.moe.layers=[]", "model.mixture.num_experts=2", "model.dual.enabled=true")

SHORT_RUN = (
    "method.attack_steps_schedule=[[0,1],[0.7,3]]",  # the last piece begins after the stop
    "method.label_smoothing=0.2",
    "optim.schedule=one_cycle",
    "optim.weight_decay_on=weights",
    "data.augment.flip=true",
    "data.augment.flip_order=alternating",
    "run.ema_epochs=1",
)


def fit(config, **options):
    console = Console(record=True, width=300, file=io.StringIO())
    trainer = Trainer(config, Reporter(console=console))
    outcome = trainer.fit(**options)
    return trainer, outcome, console.export_text()


def metrics(folder):
    return [{k: v for k, v in line.items() if k not in NEVER_EQUAL} for line in read_metrics(folder)]


class Halves(Method):
    """Lowers the left half's output, then the right half's; both depend on everything."""

    def objectives(self, model, batch, step_seed, forward):
        for half in (model.left, model.right):
            yield Objective(lambda: (forward(batch.images).sum(), {}), trains=list(half.parameters()))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x):
        return self.left(x) * self.right(x)


def updater(config, model, method):
    fabric = make_fabric(config)
    wrapped, optimizer = fabric.setup(model, config.optim.build(model))
    return Updater(fabric, model.train(), wrapped, optimizer, method, None), optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_updates_are_two_optimisers_on_a_half_each(tiny, name):
    # a gradient applied twice, a weight decay or a momentum step of the half that rests would all show
    config = tiny(f"optim.name={name}", "optim.lr=0.05", "optim.weight_decay=0.1")
    torch.manual_seed(0)
    model, reference = Two(), Two()
    reference.load_state_dict(model.state_dict())
    batch = Batch(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    engine, _ = updater(config, model, Halves(config.method, config.model))
    alone = {half: config.optim.build(getattr(reference, half)) for half in ("left", "right")}
    for _ in range(3):
        logs, nonfinite = engine.run(batch, 0)
        losses = []
        for optimizer in alone.values():
            reference.zero_grad()
            loss = reference(batch.images).sum()
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
        assert nonfinite is None
        assert torch.equal(logs["loss"], torch.stack(losses).mean())
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.grad is None


def test_a_method_that_leaves_eval_mode_is_named(tiny):
    class Careless(Halves):
        def objectives(self, model, batch, step_seed, forward):
            model.right.eval()
            yield Objective(lambda: (forward(batch.images).sum(), {}))

    config = tiny()
    engine, _ = updater(config, Two(), Careless(config.method, config.model))
    batch = Batch(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    with pytest.raises(RuntimeError, match="Careless: expected to leave 'right' in train mode, as it was, got eval"):
        engine.run(batch, 0)


def test_a_nan_gradient_under_a_finite_loss_ends_the_run(tiny, monkeypatch):
    class Rooted(METHODS["standard"].owner):
        def objectives(self, model, batch, step_seed, forward):
            def compute():
                loss, logs = self.classify(model, forward, batch.images, batch.labels)
                zero = model.fc.bias.sum() * 0
                return loss + torch.where(zero == 0, zero, (zero - 1).sqrt()), logs  # NaN behind the branch not taken

            yield Objective(compute)

    monkeypatch.setattr(METHODS["standard"], "owner", Rooted)
    trainer = Trainer(tiny("method.name=standard", "run.log_every=1"), Reporter(enabled=False))
    with pytest.raises(FloatingPointError, match=r"^grad_norm: expected finite numbers.*crash.pt"):
        trainer.fit()
    assert (trainer.folder / "crash.pt").is_file()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("method.attack.eps=0", "method.attack.alpha=0"), "method.attack: the attack does not raise the loss"),
        (("optim.lr=1e-30", "optim.weight_decay=0"), "layer2.1: its gate's weights do not move, though they get a"),
    ],
)
def test_what_does_nothing_is_said_once(tiny, overrides, text):
    _, _, said = fit(tiny("run.log_every=1", *overrides))
    assert said.count(text) == 1


def test_a_rate_of_zero_is_no_fault_of_the_gate(tiny):
    """A cycle begins at lr_min, here 0; with a line a step the first has no other rate to go by."""
    cycle = "optim.schedule={name: cyclic, cycle_epochs: 2}"
    _, outcome, said = fit(tiny(cycle, "run.log_every=1", "run.epochs=1"))
    assert read_metrics(outcome.folder, "train")[0]["lr"] == 0
    assert "its gate" not in said


@pytest.mark.parametrize("length", ["run.epochs=2", "run.max_steps=5"])
def test_a_warm_up_longer_than_the_run_is_refused_before_anything_is_written(tiny, length):
    config = tiny(length, "optim.warmup_epochs=3")
    with pytest.raises(ConfigError, match=r"optim.warmup_epochs: expected no longer than the run, [58] steps, 4 an"):
        fit(config)
    assert not Path(config.run.out).exists()
    assert fit(tiny("run.epochs=1", "optim.warmup_epochs=1"))[1].finished


def test_a_gradient_in_an_update_of_the_experts_is_none_of_the_gates_learning():
    """The update that trains the gate gives it none."""
    layer = FusedConvMoE.from_conv(nn.Conv2d(1, 2, 1), 2, 1)
    gate, experts = list(layer.gate.parameters()), list(layer.experts.parameters())
    for trained in (experts, gate):  # of the first update
        watch = GateWatch(layer)
        layer(torch.rand(4, 1, 2, 2)).square().sum().backward()
        found = watch.gradients()
        assert bool(found[""])
        watch.look(0.1, found, trained)
        for parameter in gate:
            parameter.grad = torch.zeros_like(parameter)
            parameter.data += 1
        watch.look(0.1, watch.gradients(), gate)
        no_gradient = {"": "the mixture: its gate gets no gradient, so its routing does not learn"}
        assert watch.warnings() == (no_gradient if trained is experts else {})


def test_a_healthy_run_warns_of_nothing(tiny):
    _, outcome, said = fit(tiny("optim.lr=0.05", "run.log_every=4"))
    assert "does not raise" not in said
    assert "its gate" not in said
    assert read_metrics(outcome.folder, "train")[0]["attack_gain"] > 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("trades", ()),
        ("pgd_at", SHORT_RUN),
        ("mart", ("optim.name=adam", "optim.lr=1e-3")),
        ("free_at", ("method.replays=2",)),
        ("fast_at", ("run.ema_decay=0.9",)),
        ("rt_er", ("method.awp_gamma=0.005",)),
        ("advmoe", ("run.ema_decay=0.99", "optim.schedule=multistep")),
        ("prc", ("method.adversary=router",)),
        ("robust_gate", ("method.every=2", "method.attacked=own")),
        ("jtdmoe", DUAL),
        ("jtdmoe", (*DUAL, "method.form=released", "optim.name=adamw", "optim.lr=1e-3")),
    ],
)
def test_stopped_and_resumed_every_method_ends_in_the_same_numbers(tiny, name, overrides):
    settings = (f"method.name={name}", "run.checkpoint_steps=3", *overrides)
    _, whole, _ = fit(tiny(*settings, out="whole"))
    trainer = Trainer(tiny(*settings, out="stopped"), Reporter(enabled=False))
    step = trainer._step

    def interrupted(batch):
        if trainer.state.step == 5:
            raise KeyboardInterrupt
        step(batch)

    trainer._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    _, resumed, _ = fit(tiny(*settings, out="stopped"))
    assert resumed.finished
    assert metrics(whole.folder) == metrics(resumed.folder)
    one, two = (load_checkpoint(found.folder / "last.pt") for found in (whole, resumed))
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    if one["ema"] is not None:
        assert all(torch.equal(value, two["ema"]["model"][key]) for key, value in one["ema"]["model"].items())


# --- averages ---


def test_the_average_is_the_recurrence_of_weights_and_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, 0.6)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(1, 9):
        model.train()(torch.rand(5, 3) * step)
        with torch.no_grad():
            model[0].weight += torch.rand_like(model[0].weight)
        average.update(model)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            whole = not value.is_floating_point()
            expected[name] = value.double() if whole else decay * expected[name] + (1 - decay) * value.double()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert int(average.model[1].num_batches_tracked) == 8
    assert not average.model.training


def test_a_decay_in_epochs_looks_back_as_far_at_any_batch_size(tiny):
    assert average_decay(tiny("run.ema_decay=0.9").run, 50) == 0.9
    assert average_decay(tiny().run, 50) == 0
    for steps in (4, 50, 400):
        decay = average_decay(tiny("run.ema_epochs=1.5").run, steps)
        assert decay ** (1.5 * steps) == pytest.approx(math.exp(-1), rel=1e-9)
    for epochs in ("1e-300", "1e-9", "1e20", "1e300"):  # an average is kept, and moves, whatever the time
        assert 0 < average_decay(tiny(f"run.ema_epochs={epochs}").run, 50) < 1
    trainer, _, _ = fit(tiny("run.ema_epochs=2", "run.epochs=1"))  # of four batches each
    assert trainer.state.average.decay == pytest.approx(math.exp(-1 / 8))


def test_the_average_is_validated_saved_and_evaluated(tiny):
    trainer, outcome, _ = fit(tiny("run.ema_decay=0.8", "optim.lr=0.05"))
    seen = trainer.validation.accuracy(trainer.state.average.model)
    last = read_metrics(outcome.folder, "epoch")[-1]
    assert (seen.clean, seen.robust) == (last["val_clean"], last["val_robust"])
    state = load_checkpoint(outcome.folder / "last.pt")
    assert not torch.equal(state["model"]["conv1.weight"], state["ema"]["model"]["conv1.weight"])
    for overrides, weights in (([], state["ema"]["model"]), (["eval.ema_eval=false"], state["model"])):
        _, model, _, _ = load_experiment(outcome.folder / "last.pt", overrides)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
