"""What a run costs in passes, against what a trained network saw; and how many epochs a time buys."""

import pytest

from robust_moe.config import ConfigError, load_config
from robust_moe.engine import Reporter, Trainer, epochs_within, passes_of_run
from robust_moe.methods import fast_at, free_at, mart, pgd_at
from robust_moe.methods.adversarial import AdversarialMethod
from robust_moe.optim import learning_rate

DENSE = ("model.moe.layers=[]", "model.moe.balance=none", "eval.limit=1", "eval.attack.steps=0")
IMAGES = 64  # of the tiny run, in batches of 16


def trained(config, monkeypatch):
    """What the classifier of a network in training saw, without validation and the looks at the attack's gain: images
    that went forward, images whose gradient came back, and those of them whose weights were to get one."""
    for method in (fast_at, free_at, mart, pgd_at):
        monkeypatch.setattr(method, "probed_gain", lambda *_: {})
    monkeypatch.setattr(AdversarialMethod, "probed_climb", lambda *_: {})
    seen, training = dict.fromkeys(("forward", "inputs", "weights"), 0), []

    def forward(module, inputs, output):
        if not training:
            return
        seen["forward"] += len(output)
        trains = module.weight.requires_grad

        def backward(grad):
            seen["inputs"] += len(grad)
            seen["weights"] += len(grad) * trains

        if output.requires_grad:
            output.register_hook(backward)

    trainer = Trainer(config, Reporter(enabled=False))
    set_up, step = trainer._set_up, trainer._step

    def hooked(*options):
        set_up(*options)
        trainer.model.fc.register_forward_hook(forward)

    def counted(batch):
        training.append(True)
        step(batch)
        training.clear()

    trainer._set_up, trainer._step = hooked, counted
    trainer.fit()
    return seen


@pytest.mark.parametrize(
    ("settings", "forward", "inputs", "weights"),
    [
        (("method.attack.steps=3",), 4, 4, 1),
        (("method.name=standard",), 1, 1, 1),
        (("method.name=trades",), 2 + 1 + 2, 2 + 2, 2),
        (("method.name=mart",), 2 + 2, 2 + 2, 2),
        (("method.name=free_at", "method.replays=3"), 3, 3, 3),
        (("method.name=fast_at", "method.overfit_guard=false"), 2, 2, 1),
        (("method.attack.restarts=2",), 2 * 2 + 2 + 1, 2 * 2 + 1, 1),
        (("method.awp_gamma=0.005",), 2 + 2, 2 + 2, 2),
    ],
)
def test_a_batch_costs_what_its_network_sees(tiny, monkeypatch, settings, forward, inputs, weights):
    config = tiny(*settings, *DENSE, "run.epochs=1", "run.max_steps=2")
    seen = trained(config, monkeypatch)
    assert seen == {"forward": 32 * forward, "inputs": 32 * inputs, "weights": 32 * weights}
    assert passes_of_run(config, IMAGES) == sum(seen.values())


def test_a_growing_attack_costs_its_pieces(tiny, monkeypatch):
    schedule = "method.attack_steps_schedule=[[0,1],[0.4,2],[0.7,4]]"
    config = tiny(schedule, *DENSE, "run.epochs=2")  # of 8 batches 4 from 0/8, 2 from 4/8, 2 from 6/8
    assert passes_of_run(config, IMAGES) == 16 * (4 * (2 + 3) + 2 * (4 + 3) + 2 * (8 + 3))
    assert passes_of_run(config, IMAGES) == sum(trained(config, monkeypatch).values())


def test_incomplete_batches_count_where_they_are_trained_on(tiny):
    config = tiny("method.name=standard", *DENSE, "run.epochs=3")
    assert passes_of_run(config, 63) == 3 * 3 * 48  # three whole batches of 16
    assert passes_of_run(config, 10) == 3 * 3 * 10  # fewer images than a batch


def test_seventeen_passes_an_image_of_pgd_7():
    config = load_config(None, ["method.attack.steps=7", "run.epochs=30", "run.batch_size=500"])
    assert passes_of_run(config, 50_000) == 30 * 50_000 * 17


@pytest.mark.parametrize("schedule", ["[]", "[[0,2],[0.4,5],[0.7,7]]"])
@pytest.mark.parametrize("budget", [60.0, 180.0, 1234.5])
def test_the_epochs_within_a_time_fit_and_one_more_does_not(schedule, budget):
    config = load_config(None, [f"method.attack_steps_schedule={schedule}", "run.batch_size=256", "run.max_steps=7"])
    rate = 12_000 * 17
    epochs = epochs_within(budget, rate, config, 49_000)

    def seconds(count):
        longer = load_config(None, [f"method.attack_steps_schedule={schedule}", "run.batch_size=256",
                                    f"run.epochs={count}"])  # fmt: skip
        return passes_of_run(longer, 49_000) / rate

    assert epochs >= 3
    assert seconds(epochs) <= budget < seconds(epochs + 1)


def test_the_cycle_keeps_its_shape_whatever_the_epochs():
    config = load_config(None, ["optim.schedule=one_cycle", "run.batch_size=100"])
    peaks = []
    for rate in (2e5, 1e6):
        epochs = epochs_within(100.0, rate, config, 10_000)
        rates = [learning_rate(config.optim, step, 100 * epochs, 100) for step in range(100 * epochs)]
        peaks.append(rates.index(max(rates)) / len(rates))
        assert rates[-1] < 0.01 * max(rates)
    assert peaks == [config.optim.schedule.rise, config.optim.schedule.rise]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.0, 1e5), "budget_s: expected a number > 0, got 0.0"),
        ((60.0, float("nan")), "passes_per_second: expected a number > 0, got nan"),
        ((1.0, 1e5), r"budget_s: expected time for one epoch of 848,640 passes, 8.49 s at 100,000 passes a second"),
        ((60.0, 1e5, 0), "images: expected a count >= 1, got 0"),
    ],
)
def test_bad_numbers_are_named(arguments, words):
    budget, rate, *images = arguments
    with pytest.raises(ValueError, match=words):
        epochs_within(budget, rate, load_config(), *images)


def test_methods_without_a_known_cost_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"method.name: expected a method whose passes are counted, got 'rt_er'"):
        passes_of_run(tiny("method.name=rt_er"), IMAGES)
    with pytest.raises(ConfigError, match=r"method.attack.name: expected 'pgd' to count passes of, got 'apgd-ce'"):
        passes_of_run(tiny("method.attack.name=apgd-ce"), IMAGES)
