import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from rich.console import Console
from small_runs import assert_same_run, metrics

from robust_moe.config import ConfigError, load_config, save_config
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint, read_metrics, save_checkpoint
from robust_moe.engine.guards import state_is_finite
from robust_moe.engine.meters import describe_loss
from robust_moe.settings import plain


def fit(config, **options):
    trainer = Trainer(config, Reporter(enabled=False, console=Console(quiet=True)))
    return trainer, trainer.fit(**options)


def test_a_run_leaves_what_it_promises_and_learns(tiny):
    config = tiny("run.epochs=6", "optim.lr=0.1", "data.train_limit=200")
    _, result = fit(config)
    assert result.finished
    assert result.steps == 6 * 12
    epochs = read_metrics(result.folder, "epoch")
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4, 5, 6]
    assert epochs[-1]["train_task_loss"] < 0.75 * epochs[0]["train_task_loss"]
    assert epochs[-1]["val_clean"] > 0.3  # chance is 0.1
    assert load_config(result.folder / "config.yaml") == config
    assert list((result.folder / "tensorboard").glob("events.out.tfevents.*"))
    best = max(epochs, key=lambda line: (line["val_robust"], line["val_clean"], -line["epoch"]))
    assert result.best == {
        "robust": best["val_robust"],
        "clean": best["val_clean"],
        "epoch": best["epoch"],
        "step": best["step"],
    }
    assert load_checkpoint(result.folder / "best.pt")["position"]["epoch"] == best["epoch"]
    assert load_checkpoint(result.folder / "last.pt")["position"] == {"epoch": 6, "batch": 0, "step": 72}


def test_train_lines_are_means_over_their_interval(tiny):
    _, result = fit(tiny("run.log_every=1"))
    one = read_metrics(result.folder, "train")
    _, two = fit(tiny("run.log_every=4", out="other"))
    four = read_metrics(two.folder, "train")
    assert [line["step"] for line in four] == [4, 8]
    for line, start in zip(four, (0, 4), strict=True):
        mean = sum(item["task_loss"] for item in one[start : start + 4]) / 4
        assert line["task_loss"] == pytest.approx(mean, rel=1e-12)
    assert one[3]["lr"] == pytest.approx(0.1 * (1 - 3 / 8))  # polynomial of power 1


def test_routing_lines_hold_shares_of_validation_and_test_images(tiny):
    _, result = fit(tiny())
    lines = read_metrics(result.folder, "routing")
    assert [(line["epoch"], line["split"]) for line in lines] == [(1, "val"), (1, "test"), (2, "val"), (2, "test")]
    for line in lines:
        assert line["layer"] == "layer2.1"
        assert sum(line["selected"]) == pytest.approx(2)  # top_k
        assert sum(line["first"]) == pytest.approx(1)
        assert line["collapsed"] == (max(line["first"]) > 0.8)


# a child that is killed, without any chance to clean up, after its fifth step: in the second epoch
KILLED = """
    import os, sys
    from robust_moe.config import load_config
    from robust_moe.engine import Reporter, Trainer

    trainer = Trainer(load_config(sys.argv[1]), Reporter(enabled=False))
    step = trainer._step

    def killed(batch):
        step(batch)
        if trainer.state.step == 7:
            os._exit(9)

    trainer._step = killed
    trainer.fit()
"""


# noise in the gate and colour jitter use random numbers: they have to come back too
@pytest.mark.parametrize(("every", "resumed_from", "noise"), [("null", 4, "logits"), ("3", 6, "released")])
def test_killed_in_mid_epoch_a_run_goes_on_to_the_same_bits(tiny, tmp_path, every, resumed_from, noise):
    settings = (
        "model.moe.noise_std=0.1",
        f"model.moe.noise={noise}",
        "data.augment.flip=true",
        "data.augment.crop_padding=1",
        f"run.checkpoint_steps={every}",
    )
    whole = tiny(*settings, out="whole")
    fit(whole)
    config = tiny(*settings, out="killed")
    save_config(config, tmp_path / "killed.yaml")
    script = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "killed.yaml")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert load_checkpoint(tmp_path / "killed" / "last.pt")["position"]["step"] == resumed_from
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a line cut short
    _, result = fit(config)
    assert result.finished
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("when", ["step", "validation", "routing of test images"])
def test_signal_saves_stops_and_the_run_goes_on_to_the_same_bits(tiny, tmp_path, when):
    fit(tiny(out="whole"))
    config = tiny(out="stopped")
    trainer = Trainer(config, Reporter(enabled=False, console=Console(quiet=True)))
    step = trainer._step

    def signalled(batch):
        step(batch)
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    if when == "step":
        trainer._step = signalled
    else:
        original = trainer._validate

        def validate():
            if when == "validation":
                os.kill(os.getpid(), signal.SIGINT)
                return original()
            accuracy = trainer.validation.accuracy

            def measured(*arguments):
                result = accuracy(*arguments)
                os.kill(os.getpid(), signal.SIGTERM)
                return result

            trainer.validation.accuracy = measured
            return original()

        trainer._validate = validate
    handler = signal.getsignal(signal.SIGTERM)
    result = trainer.fit()
    assert not result.finished
    assert signal.getsignal(signal.SIGTERM) is handler
    expected = {"epoch": 0, "batch": 2, "step": 2} if when == "step" else {"epoch": 0, "batch": 4, "step": 4}
    assert load_checkpoint(result.folder / "last.pt")["position"] == expected
    _, result = fit(config)
    assert result.finished
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_signal_interrupts_at_once(tiny):
    trainer = Trainer(tiny(), Reporter(enabled=False, console=Console(quiet=True)))

    def twice(batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer._step = twice
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def test_a_finished_run_is_left_as_it_is(tiny):
    _, result = fit(tiny())
    before = (result.folder / "last.pt").read_bytes(), metrics(result.folder)
    _, again = fit(tiny())
    assert again.finished
    assert again.steps == result.steps
    assert again.best == result.best
    assert ((result.folder / "last.pt").read_bytes(), metrics(result.folder)) == before


def test_fresh_starts_anew_and_keeps_foreign_files(tiny, tmp_path):
    config = tiny()
    _, result = fit(config)
    (result.folder / "notes.txt").write_text("mine")
    (result.folder / ".last.pt.123.tmp").write_text("left by a kill")
    first = metrics(result.folder)
    _, again = fit(config, resume=False)
    assert metrics(again.folder) == first  # the same seed
    assert (result.folder / "notes.txt").read_text() == "mine"
    assert not (result.folder / ".last.pt.123.tmp").exists()
    assert len(list((result.folder / "tensorboard").iterdir())) == 1


def test_killed_before_the_first_last_checkpoint_goes_on_from_the_best(tiny):
    _, result = fit(tiny())
    (result.folder / "last.pt").unlink()
    step = load_checkpoint(result.folder / "best.pt")["position"]["step"]
    _, again = fit(tiny())
    assert step in (4, 8)
    assert again.finished
    assert again.best == result.best


def test_changed_configuration_is_refused_with_the_difference(tiny):
    _, result = fit(tiny())
    before = (result.folder / "last.pt").read_bytes()
    with pytest.raises(CheckpointError, match="configuration that the run was started with") as error:
        fit(tiny("optim.lr=0.5", "run.epochs=3", "run.log_every=1"))
    assert "optim.lr: checkpoint has 0.1, got 0.5" in str(error.value)
    assert "run.epochs: checkpoint has 2, got 3" in str(error.value)
    assert "log_every" not in str(error.value)  # changes no number
    assert (result.folder / "last.pt").read_bytes() == before


def test_damaged_last_checkpoint_is_named_and_kept(tiny):
    _, result = fit(tiny("run.epochs=1"))
    path = result.folder / "last.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"last.pt: expected a whole checkpoint"):
        fit(tiny("run.epochs=1"))
    assert path.stat().st_size == 5000
    assert load_checkpoint(result.folder / "best.pt")["position"]["step"] == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", [1]),
        ("position", 3),
        ("position", "text"),
        ("position", {"epoch": 1}),
        ("optimizer", "text"),
        ("meters", {"interval": None, "running": None}),
        ("rng", [{"python": None}]),
    ],
)
def test_states_with_parts_of_another_kind_are_one_checkpoint_error(tiny, key, value):
    trainer, result = fit(tiny("run.epochs=1"))
    state = load_checkpoint(result.folder / "last.pt")
    device = trainer.fabric.device
    assert trainer.state.load_state_dict(state, "last.pt", 0, device)[0] > 0  # whole
    with pytest.raises(CheckpointError, match=r"^last.pt: expected .* got "):
        trainer.state.load_state_dict({**state, key: value}, "last.pt", 0, device)
    save_checkpoint({**state, key: value}, result.folder / "last.pt")
    with pytest.raises(CheckpointError, match=r"last.pt: .*expected .* got "):
        fit(tiny("run.epochs=1"))


def test_a_run_folder_that_cannot_be_made_is_one_sentence(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        with pytest.raises(ConfigError, match=rf"^run.out: expected a folder to write to, got .*{out} \(.+\)$"):
            fit(tiny(out=out))
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk_stops_the_run_with_the_last_good_checkpoint(tiny, monkeypatch):
    config = tiny()
    real = os.replace
    saved = []

    def full(source, target):
        if str(target).endswith("last.pt"):
            if saved:
                raise OSError(28, "No space left on device")
            saved.append(target)
        return real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=r"last.pt.*No space left on device.*last good one is kept"):
        fit(config)
    monkeypatch.undo()
    assert load_checkpoint(saved[0])["position"]["epoch"] == 1
    _, result = fit(config)
    assert result.finished
    assert result.steps == 8


@pytest.mark.parametrize("layers", ["[]", "[layer2.1]"])
def test_nonfinite_loss_stops_with_the_state_beside_the_last_good_one(tiny, layers):
    config = tiny(f"model.moe.layers={layers}", "run.checkpoint_steps=2")
    trainer = Trainer(config, Reporter(enabled=False, console=Console(quiet=True)))
    step = trainer._step

    def poisoned(batch):
        if trainer.state.step == 5:
            with torch.no_grad():
                trainer.model.conv1.weight[0] = torch.nan
        step(batch)

    trainer._step = poisoned
    with pytest.raises((FloatingPointError, ValueError), match=r"NaN or infinity.*crash.pt.*last.pt"):
        trainer.fit()
    crash = load_checkpoint(trainer.folder / "crash.pt")
    assert not torch.isfinite(crash["model"]["conv1.weight"]).all()
    last = load_checkpoint(trainer.folder / "last.pt")
    assert last["position"]["step"] == 4
    assert all(torch.isfinite(value).all() for value in last["model"].values())
    _, result = fit(config)  # goes on from the last good one
    assert result.finished


def test_without_a_checkpoint_a_crash_names_none(tiny):
    trainer = Trainer(tiny("run.log_every=1"), Reporter(enabled=False, console=Console(quiet=True)))
    step = trainer._step

    def poisoned(batch):
        with torch.no_grad():
            trainer.model.conv1.weight[0] = torch.nan
        step(batch)

    trainer._step = poisoned
    with pytest.raises((FloatingPointError, ValueError), match=r"crash.pt, there is no earlier one$") as error:
        trainer.fit()
    assert "last.pt" not in str(error.value)
    assert (trainer.folder / "crash.pt").is_file()


def test_a_full_disk_does_not_hide_what_was_lost(tiny, monkeypatch):
    trainer, real = Trainer(tiny("run.log_every=1"), Reporter(enabled=False, console=Console(quiet=True))), os.replace
    step = trainer._step

    def poisoned(batch):
        with torch.no_grad():
            trainer.model.conv1.weight[0] = torch.nan
        step(batch)

    def full(source, target):
        if str(target).endswith(".pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    trainer._step = poisoned
    monkeypatch.setattr(os, "replace", full)
    said = r"NaN or infinity.*; the state could not be written \(.*No space left.*crash.pt'\), there is no good state"
    with pytest.raises((FloatingPointError, ValueError), match=said):
        trainer.fit()
    assert not list(trainer.folder.glob("*.pt"))


def test_weights_broken_by_the_last_update_are_never_saved(tiny):
    trainer = Trainer(tiny("run.checkpoint_steps=2", "run.log_every=100"), Reporter(enabled=False))
    step = trainer._step

    def poisoned(batch):
        step(batch)
        if trainer.state.step == 4:
            with torch.no_grad():
                trainer.model.fc.bias[0] = torch.inf  # the loss has not seen it

    trainer._step = poisoned
    with pytest.raises(FloatingPointError, match="weights: expected finite numbers"):
        trainer.fit()
    assert load_checkpoint(trainer.folder / "last.pt")["position"]["step"] == 2


def test_state_is_finite_sees_every_parameter_and_buffer():
    model = torch.nn.BatchNorm2d(3)
    assert state_is_finite(model)
    for tensor in (model.weight, model.running_var):
        with torch.no_grad():
            kept = tensor[1].clone()
            for value in (torch.nan, torch.inf, -torch.inf):
                tensor[1] = value
                assert not state_is_finite(model)
            tensor[1] = kept
    assert state_is_finite(model)


def test_guards_warn_once_a_layer(tiny):
    console = Console(record=True, width=200, file=io.StringIO())
    trainer = Trainer(tiny("run.log_every=1"), Reporter(enabled=False, console=console))
    set_up = trainer._set_up

    def one_sided(*options):
        set_up(*options)
        with torch.no_grad():
            trainer.model.get_submodule("layer2.1").gate.fc.bias[2] += 100.0  # saturated: no gradient, one expert

    trainer._set_up = one_sided
    trainer.fit()
    text = console.export_text()
    assert text.count("routing has collapsed: expert 2 is the first choice of 100% of the images") == 1


def test_gate_without_gradient_is_reported(tiny):
    console = Console(record=True, width=200, file=io.StringIO())
    # top-1, renormalised, no straight-through: the only weight is the constant 1
    config = tiny("model.moe.top_k=1", "model.moe.straight_through=false", "model.moe.balance=none", "run.log_every=1")
    with pytest.warns(UserWarning, match="gets no gradient"):
        Trainer(config, Reporter(enabled=False, console=console)).fit()
    assert console.export_text().count("layer2.1: its gate gets no gradient") == 1


def test_max_steps_ends_the_run_in_mid_epoch_with_a_validation(tiny):
    _, result = fit(tiny("run.max_steps=6"))
    assert result.steps == 6
    assert [line["step"] for line in read_metrics(result.folder, "epoch")] == [4, 6]
    _, again = fit(tiny("run.max_steps=6"))
    assert again.steps == 6


def test_without_validation_images_only_the_last_is_kept(tiny):
    _, result = fit(tiny("data.validation_fraction=0", "run.epochs=1"))
    assert result.best == {}
    assert not (result.folder / "best.pt").exists()
    assert (result.folder / "last.pt").exists()


def test_seed_changes_the_numbers_and_nothing_else_does(tiny):
    _, one = fit(tiny(out="one"))
    torch.rand(5)  # whatever ran before in this process
    _, two = fit(tiny(out="two"))
    _, other = fit(tiny("run.seed=1", out="other"))
    assert metrics(one.folder) == metrics(two.folder)
    assert metrics(one.folder) != metrics(other.folder)


def test_the_seed_of_the_measuring_attack_is_a_setting_of_its_own(tiny):
    seeds = {}
    for settings in ((), ("eval.seed=0",), ("eval.seed=1",), ("run.seed=1",)):
        trainer, _ = fit(tiny("run.max_steps=1", *settings), resume=False)
        seeds[settings] = trainer.validation.attack.seed
    default, same, other, run = seeds.values()
    assert default == same != other == run


def test_bfloat16_autocast_trains(tiny):
    _, result = fit(tiny("run.precision=bf16-mixed", "run.epochs=1"))
    assert result.finished
    model = load_checkpoint(result.folder / "last.pt")["model"]
    assert {value.dtype for value in model.values()} == {torch.float32, torch.int64}


def test_gradient_clipping_bounds_the_update(tiny):
    # one step of plain SGD with rate lr and clipped gradient norm c moves the weights by lr*c at most
    common = ("optim.momentum=0", "optim.nesterov=false", "optim.weight_decay=0", "run.max_steps=1")
    trainer, _ = fit(tiny(*common, "optim.grad_clip=0.01"))
    moved = trainer.model
    torch.manual_seed(0)
    start, _ = fit(tiny(*common, "optim.lr=1e-30", out="start"))
    before = start.model
    pairs = zip(moved.parameters(), before.parameters(), strict=True)
    distance = sum((new - old).double().square().sum() for new, old in pairs).sqrt().item()
    assert distance == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.schedule=cosin", "optim.schedule.name: .* did you mean 'cosine'"),
        ("optim.name=adamm", "optim.name: .* did you mean 'adam'"),
        ("eval.attack.name=pdg", "^eval.attack.name: .* did you mean 'pgd'"),
        ("method.name=pgdat", "method.name: .* did you mean 'pgd_at'"),
        ("model.name=resnet_smal", "model.name: .* did you mean 'resnet_small'"),
        ("model.moe.layers=[layr2.1]", "did you mean 'layer2.1'"),
        ("model.moe.gate=gap_fcc", "gate.*gap_fc"),
        ("run.devices=3", r"run.batch_size: expected a multiple of the 3 processes \(run.devices=3\), got 16"),
    ],
)
def test_names_that_do_not_exist_write_nothing(tiny, tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        fit(tiny(override))
    assert not (tmp_path / "run").exists()


def test_checkpoint_is_plain_enough_to_be_json_but_for_its_tensors(tiny):
    _, result = fit(tiny("run.epochs=1"))
    state = load_checkpoint(result.folder / "last.pt")
    text = json.dumps(state, default=lambda value: f"tensor {list(value.shape)}" if torch.is_tensor(value) else 1 / 0)
    assert plain(tiny("run.epochs=1")) == json.loads(text)["config"]


@pytest.mark.parametrize("layers", ["[]", "[layer2.1]"])
def test_the_loss_on_screen_is_that_of_the_metrics(tiny, layers):
    out = io.StringIO()
    config = tiny(f"model.moe.layers={layers}", "run.epochs=2")
    assert Trainer(config, Reporter(console=Console(file=out, width=200))).fit().finished
    lines = [line for line in out.getvalue().splitlines() if line.startswith("epoch ") and "  loss " in line]
    epochs = read_metrics(config.run.out, "epoch")
    for line, values in zip(lines, epochs, strict=True):
        parts = f"loss {values['train_loss']:.3f}"
        if "train_balance_loss" in values:
            assert values["train_balance_loss"] < 0  # an entropy's
            parts += f" (task {values['train_task_loss']:.3f}, balance {values['train_balance_loss']:.3f})"
        assert f"  {parts}  val clean" in line
    assert out.getvalue().count("a balance below 0 is right") == ("train_balance_loss" in epochs[0])


def test_other_terms_of_a_loss_leave_the_task_to_be_told():
    assert describe_loss({"loss": 2.5, "task_loss": 2.5}) == "loss 2.500"
    assert describe_loss({"loss": 2.5, "task_loss": 1.0}) == "loss 2.500 (task 1.000)"
    assert describe_loss({"task_loss": 1.0}) == "loss 1.000"  # of a method that logs no more
