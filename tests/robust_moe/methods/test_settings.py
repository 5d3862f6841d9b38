"""Settings that some methods have: smoothed labels, and an attack whose steps grow over the run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robust_moe.attacks import PGD
from robust_moe.attacks.graph import StepGraphs
from robust_moe.config import ConfigError
from robust_moe.data import Batch
from robust_moe.engine import Reporter, Trainer
from robust_moe.engine.experiment import make_method, make_model
from robust_moe.methods import METHODS
from robust_moe.seeding import derive_seed

DATA = {"class_names": list("0123456789"), "channels": 1, "image_size": 8, "mean": [0.3], "std": [0.4]}
DENSE = ("model.moe.layers=[]", "model.moe.balance=none")
SMOOTHING = 0.3
SETTINGS = {"label_smoothing": "0.3", "attack_steps_schedule": "[[0,1],[0.5,2]]"}
DUAL = ("model.mixture.num_experts=2", "model.dual.enabled=true")


def setting(config):
    torch.manual_seed(0)
    model = make_model(config, DATA).train()
    return model, Batch(torch.rand(12, 1, 8, 8), torch.arange(12) % 10, torch.arange(12) + 40)


def smoothed(logits, labels):
    """Cross-entropy with the targets written out."""
    targets = torch.full_like(logits, SMOOTHING / logits.shape[1])
    targets += (1 - SMOOTHING) * F.one_hot(labels, logits.shape[1])
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def test_smoothed_labels_are_those_of_the_training_loss_and_not_of_the_attack(tiny):
    config = tiny(f"method.label_smoothing={SMOOTHING}", *DENSE)
    model, batch = setting(config)
    reference, _ = setting(config)
    method = make_method(config)
    (update,) = method.updates(model, batch, 9)
    plain = PGD(0.1, 2, seed=9)(reference, batch.images, batch.labels, batch.index)
    torch.testing.assert_close(update.loss, smoothed(reference(plain), batch.labels))
    torch.testing.assert_close(update.logs["task_loss"], update.loss.detach())


def test_of_trades_the_cross_entropy_of_clean_images_is_smoothed(tiny):
    losses = {}
    for smoothing in (0.0, SMOOTHING):
        config = tiny("method.name=trades", f"method.label_smoothing={smoothing}", *DENSE)
        model, batch = setting(config)
        (update,) = make_method(config).updates(model, batch, 9)
        losses[smoothing] = update
    model, batch = setting(config)
    clean = model(batch.images)
    torch.testing.assert_close(losses[SMOOTHING].logs["task_loss"], smoothed(clean, batch.labels).detach())
    assert torch.equal(losses[SMOOTHING].logs["robust_loss"], losses[0.0].logs["robust_loss"])  # images, divergence


class WrittenNorm(nn.Module):
    """A batch norm in eval mode, written out."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        mean, variance, weight, bias = (
            value[:, None, None]
            for value in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        )
        return (x - mean) / (variance + self.norm.eps).sqrt() * weight + bias


def with_written_norms(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, WrittenNorm(child))
    return model


ONE_STEP = ("run.max_steps=1", "run.epochs=1", "optim.momentum=0", "optim.nesterov=false", "optim.weight_decay=0")


def test_in_eval_mode_the_weights_step_on_what_the_running_statistics_give(tiny):
    """One step of SGD on CE(F(x'), y), by hand."""
    config = tiny("method.train_mode=eval", *DENSE, *ONE_STEP)
    trainer = Trainer(config, Reporter(enabled=False))
    step, seen = trainer._step, []

    def watched(batch):
        seen.append((batch, copy.deepcopy(trainer.model)))
        step(batch)

    trainer._step = watched
    trainer.fit()
    ((batch, before),) = seen
    seed = derive_seed(config.run.seed, "attack", 0)
    x = config.method.attack.build(seed=seed)(before, batch.images, batch.labels, batch.index)
    by_hand = with_written_norms(before)
    loss = F.cross_entropy(by_hand(x), batch.labels)
    weights = list(by_hand.parameters())
    (rate,) = {group["lr"] for group in trainer.optimizer.param_groups}
    for weight, gradient, now in zip(
        weights, torch.autograd.grad(loss, weights), trainer.model.parameters(), strict=True
    ):
        torch.testing.assert_close(now, weight - rate * gradient, rtol=1e-4, atol=1e-6)
        assert not torch.equal(now, weight)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"standard"}))
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_only_in_train_mode_do_running_statistics_move(tiny, name, mode):
    shape = DUAL if name == "jtdmoe" else ()
    layers = DENSE[:1] if shape else ()
    trainer = Trainer(
        tiny(f"method.name={name}", f"method.train_mode={mode}", *layers, *shape, "run.epochs=1"),
        Reporter(enabled=False),
    )
    trainer.fit()
    moved = {key: value for key, value in trainer.model.named_buffers() if "running_" in key or "num_batches" in key}
    fresh = {key: torch.full_like(value, float(key.endswith("running_var"))) for key, value in moved.items()}
    assert moved
    assert all(torch.equal(moved[key], fresh[key]) for key in moved) == (mode == "eval")


HEEDED = {
    "label_smoothing": {"standard", "pgd_at", "trades", "free_at", "fast_at", "prc", "robust_gate"},
    "attack_steps_schedule": {"pgd_at", "trades", "mart"},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("option", HEEDED)
def test_a_method_has_a_setting_or_refuses_it(tiny, name, option):
    if name == "jtdmoe":
        shape = DUAL
    else:
        shape = () if name in ("rt_er", "advmoe", "prc", "robust_gate") else DENSE[:1]
    chosen = (
        f"method.name={name}",
        f"method.{option}={SETTINGS[option]}",
        *(DENSE[:1] if shape == DUAL else ()),
        *shape,
    )
    if name in HEEDED[option]:
        make_method(tiny(*chosen))
        return
    with pytest.raises(ConfigError, match=rf"unknown key 'method.{option}' of method '{name}'"):
        tiny(*chosen)


def test_only_pgd_has_a_number_of_steps_to_schedule(tiny):
    with pytest.raises(ConfigError, match=r"method.attack.name: expected 'pgd'.*follows a schedule.*got 'apgd-ce'"):
        make_method(tiny("method.attack.name=apgd-ce", "method.attack_steps_schedule=[[0,1]]"))


@pytest.mark.parametrize("nothing", ["steps=0", "alpha=0"])
def test_a_schedule_keeps_a_path_that_has_to_have_a_length(tiny, nothing):
    with pytest.raises(ConfigError, match=r"method.attack: expected steps and alpha above 0.*got steps \d and alpha"):
        make_method(tiny(f"method.attack.{nothing}", "method.attack_steps_schedule=[[0,1]]"))
    make_method(tiny(f"method.attack.{nothing}"))


@pytest.mark.parametrize(
    ("alpha", "lengths"),
    [
        ("0.04", (0.125, 0.08, 0.04, 0.02)),  # a path of 0.16; one step of it would be longer than 1.25 eps
        ("null", (0.125, 0.125, 0.0625, 0.03125)),  # 2.5 eps
    ],
)
def test_the_path_of_the_attack_stays_as_long_and_no_step_is_longer_than_eps_allows(tiny, alpha, lengths):
    pieces = "method.attack_steps_schedule=[[0,1],[0.25,2],[0.5,4],[0.75,8]]"
    config = tiny("method.attack.steps=4", f"method.attack.alpha={alpha}", pieces, *DENSE)
    method = make_method(config)
    model, batch = setting(config)
    seen = []
    for progress in (0.0, 0.24, 0.25, 0.5, 0.99):
        method.progress = progress
        method.craft(model, batch, 0)
        seen.append((method.attack.steps, method.attack.alpha))
    expected = list(zip((1, 2, 4, 8), lengths, strict=True))
    assert seen == [(steps, pytest.approx(length)) for steps, length in (expected[0], *expected)]


def test_scheduled_images_are_those_of_an_attack_with_these_settings(tiny):
    config = tiny("method.attack_steps_schedule=[[0,1],[0.5,3]]", "method.attack.steps=4", "method.attack.alpha=0.03")
    method = make_method(config)
    model, batch = setting(config)
    method.progress = 0.6
    plain = PGD(0.1, 3, alpha=0.03 * 4 / 3, seed=5)(model, batch.images, batch.labels, batch.index)
    assert torch.equal(method.craft(model, batch, 5).images, plain)


def test_the_trainer_says_how_much_of_the_run_is_finished(tiny):
    trainer = Trainer(tiny("method.attack_steps_schedule=[[0,1],[0.5,3]]"), Reporter(enabled=False))
    step, seen = trainer._step, []

    def watched(batch):
        step(batch)
        seen.append((trainer.method.progress, trainer.method.attack.steps))

    trainer._step = watched
    trainer.fit()
    assert seen == [(number / 8, 1 if number < 4 else 3) for number in range(8)]


class Recorder:
    """Stands in for CUDA graphs: a recording has its number of steps fixed in it, as a graph has."""

    def __init__(self, attack):
        self.attack, self.captured, self.replayed = attack, [], []

    def why_not(self, x):
        return None

    def capture(self, function, inputs, beside):
        steps = self.attack.steps
        function(*inputs)  # as the warm-up of a capture
        self.captured.append(steps)
        recorder = self

        class Recording:
            def replay(self, inputs):
                assert recorder.attack.steps == steps
                recorder.replayed.append(steps)
                return function(*inputs)

        return Recording()


def test_each_number_of_steps_is_captured_as_a_graph_of_its_own(tiny):
    config = tiny("method.attack_steps_schedule=[[0,1],[0.5,3]]", *DENSE)
    eager, method = make_method(config), make_method(config)
    recorder = Recorder(method.attack)
    method.attack.graphs = StepGraphs("auto", recorder)
    model, batch = setting(config)
    for number, progress in enumerate((0.0, 0.1, 0.2, 0.5, 0.6, 0.7)):
        method.progress = eager.progress = progress
        assert torch.equal(method.craft(model, batch, number).images, eager.craft(model, batch, number).images)
    assert recorder.captured == [1, 3]  # the second batch of each piece
    assert recorder.replayed == [1, 1, 3, 3]


@pytest.mark.parametrize("attack", ["fab", "square", "autoattack"])
def test_several_processes_refuse_an_attack_that_images_leave_in_train_mode(tiny, attack):
    chosen, train = f"method.attack={attack}", "method.attack_mode=train"
    with pytest.raises(ConfigError, match=f"method.attack_mode: expected eval with method.attack.name={attack}"):
        make_method(tiny(chosen, train), 2)
    make_method(tiny(chosen), 2)
    make_method(tiny(chosen, train), 1)
    make_method(tiny("method.attack_mode=train"), 2)  # PGD keeps all images
