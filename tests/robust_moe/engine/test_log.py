import errno
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from robust_moe import files
from robust_moe.engine import MetricLog, Reporter, Trainer, progress, read_metrics
from robust_moe.engine import events as events_of_runs
from robust_moe.engine.log import curves
from robust_moe.engine.meters import Meter, Speed
from robust_moe.evaluation import accuracy


def test_lines_and_events_hold_the_same_numbers(tmp_path):
    log = MetricLog(tmp_path)
    log.write("train", 5, {"epoch": 1, "loss": 0.25})
    log.write("routing", 5, {"layer": "layer4.1", "selected": [0.5, 0.5], "collapsed": False})
    log.write("train", 10, {"epoch": 1, "loss": 0.125})
    log.close()
    assert log.lines == 3
    assert read_metrics(tmp_path, "train") == [
        {"kind": "train", "step": 5, "epoch": 1, "loss": 0.25},
        {"kind": "train", "step": 10, "epoch": 1, "loss": 0.125},
    ]
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "routing", "train"]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 0.25), (10, 0.125)]
    assert "routing/collapsed" not in events.Tags()["scalars"]  # truth values are no numbers


def test_curves_are_of_numbers_that_change_once_each():
    """Noise in a list of curves: the number of the epoch, times of the wall clock, what another curve shows."""
    assert curves("train", {"epoch": 1, "loss": 0.5, "lr": 0.1}) == {"train/loss": 0.5, "train/lr": 0.1}
    values = {"epoch": 1, "lr": 0.1, "train_loss": 0.5, "val_clean": 0.5, "val_robust": None, "val_seconds": 3.0}
    assert curves("epoch", {**values, "images_per_second": 9.0}) == {
        "epoch/val_clean": 0.5,
        "epoch/images_per_second": 9.0,
    }


def test_every_expert_of_every_layer_has_one_curve(tmp_path):
    log = MetricLog(tmp_path)
    for step, layer, split in ((5, "layer3.1", "test"), (5, "layer4.1", "test"), (5, "layer4.1", "val")):
        shares = [(expert + len(split)) / 100 for expert in range(11)]
        log.write("routing", step, {"epoch": 1, "split": split, "layer": layer, "collapsed": False, "selected": shares})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = [f"experts/{layer}/{expert:02d}" for layer in ("layer3.1", "layer4.1") for expert in range(11)]
    assert sorted(events.Tags()["scalars"]) == tags  # in the order of the experts
    (event,) = events.Scalars("experts/layer4.1/10")
    assert (event.step, event.value) == (5, pytest.approx(0.14))  # of test images


def read_sheet(folder, step):
    """The picture of a step, as an array [h, w] or [h, w, 3]."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (tag,) = events.Tags()["images"]
    assert tag == "attack/clean, attacked, difference"
    (event,) = (event for event in events.Images(tag) if event.step == step)
    sheet = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert sheet.shape[:2] == (event.height, event.width)
    return sheet


@pytest.mark.parametrize(("channels", "size", "shown"), [(1, 8, 64), (3, 32, 64), (3, 224, 112), (4, 96, 96)])
def test_an_attack_is_shown_beside_its_images(tmp_path, channels, size, shown):
    clean = torch.full((2, channels, size, size), 0.4)
    adversarial = clean.clone()
    adversarial[1, :, size // 2 :] += 8 / 255
    log = MetricLog(tmp_path)
    log.attacked(7, clean, adversarial)
    log.close()
    assert read_metrics(tmp_path) == []  # a picture is no metric
    sheet = read_sheet(tmp_path, 7).astype(float)
    sheet = sheet.mean(2) if sheet.ndim == 3 else sheet
    side = shown + 2  # with its white edge
    assert sheet.shape == (2 * side, 3 * side)
    cells = sheet.reshape(2, side, 3, side).transpose(0, 2, 1, 3)[:, :, 1:-1, 1:-1]
    assert (cells[0, 0] == 102).all() and (cells[0, 1] == 102).all()
    assert (cells[0, 2] == 128).all()  # no change is grey
    assert (cells[1, 1, : shown // 2] == 102).all() and (cells[1, 1, shown // 2 :] == 110).all()
    assert np.abs(cells[1, 2, shown // 2 :] - 255 * (0.5 + 10 * 8 / 255)).max() <= 1  # ten times magnified


def test_other_processes_have_no_pictures(tmp_path):
    log = MetricLog(tmp_path / "run", enabled=False)
    log.attacked(1, torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    assert not (tmp_path / "run").exists()


def test_a_training_shows_its_attack_once_a_validation(tiny):
    config = tiny("run.epochs=2", "run.out=" + str(tiny().run.out))
    trainer = Trainer(config, Reporter(enabled=False))
    assert trainer.fit().finished
    first, second = (read_sheet(trainer.folder, step) for step in (4, 8))
    side = 66
    count = len(trainer.validation) if len(trainer.validation) < 4 else 4
    assert first.shape == second.shape == (count * side, 3 * side)
    assert (first[:, :side] == second[:, :side]).all()  # the same clean images each time
    assert (first[:, side:] != second[:, side:]).any()  # another model, another attack
    clean, attacked = trainer.validation.accuracy(trainer.model).examples
    images = trainer.validation.val.images[:count] / 255
    assert torch.equal(clean, images)
    assert 0 < (attacked - clean).abs().max() <= 0.1 + 1e-6  # eval.attack.eps
    assert accuracy(trainer.model, trainer.validation.val).examples is None  # no attack
    events = EventAccumulator(str(trainer.folder / "tensorboard"))
    events.Reload()
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("experts/layer2.1/")]) == 4
    assert not [tag for tag in events.Tags()["scalars"] if tag.endswith(("epoch", "seconds"))]


def test_going_on_drops_what_will_be_done_again(tmp_path):
    log = MetricLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": float(step)})
    log.close()
    log = MetricLog(tmp_path, lines=2, step=2)
    log.write("train", 3, {"loss": 30.0})
    log.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
    assert log.lines == 3
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    MetricLog(tmp_path).close()  # a new run
    assert read_metrics(tmp_path) == []


def test_a_line_cut_short_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1}]
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize("damage", [b'{"kind": "tr', b"\xff\xfe", b"[1]", b"{}", b'{"kind": 3}', b"[" * 100_000])
def test_a_damaged_line_is_named_and_costs_that_line_alone(tmp_path, damage):
    log = MetricLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.write("train", step, {"loss": float(step)})
    log.close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:], b""]))
    named = f"{path}: expected a JSON object a line, passed over damaged lines: 2"
    said: list[str] = []
    assert [line["step"] for line in read_metrics(tmp_path, say=said.append)] == [1, 3, 4]
    assert said == [named]
    log = MetricLog(tmp_path, lines=3, step=3, say=said.append)
    assert said == [named, named]
    log.write("train", 4, {"loss": 40.0})
    log.close()
    assert log.lines == 4  # an earlier checkpoint's count of lines still holds
    assert [line["loss"] for line in read_metrics(tmp_path, say=said.append)] == [1.0, 3.0, 40.0]
    MetricLog(tmp_path, lines=3, say=said.append).close()
    assert [line["step"] for line in read_metrics(tmp_path, say=said.append)] == [1, 3]
    assert said == [named, named]  # once a line is left out of the file, nothing more is said of it


def test_lines_that_are_missing_are_counted(tmp_path):
    log = MetricLog(tmp_path)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    said: list[str] = []
    log = MetricLog(tmp_path, lines=3, step=3, say=said.append)
    log.close()
    assert said == [f"{tmp_path / 'metrics.jsonl'}: expected 3 lines as the checkpoint, got 1"]
    assert log.lines == 1


@pytest.mark.parametrize("for_good", [False, True])
def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, monkeypatch, for_good):
    said, full, real = [], [False], files.append_line

    def append(file, line, path, sync):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(file, line, path, sync)

    monkeypatch.setattr(files, "append_line", append)
    log = MetricLog(tmp_path, say=said.append)
    for step in range(1, 6):
        full[0] = step in (2, 3) or (for_good and step > 3)
        log.write("train", step, {"loss": float(step)})
    assert log.lines == 5  # a checkpoint counts those that wait
    path = tmp_path / "metrics.jsonl"
    assert said == [
        f"{name}: could not be written (No space left on device); its lines wait in memory"
        for name in (path, next((tmp_path / "tensorboard").iterdir()))
    ]
    if for_good:
        with pytest.raises(OSError, match="No space left on device"):
            log.close()
        with pytest.raises(KeyError), MetricLog(tmp_path, lines=1) as log:  # the error that ends the run is shown
            full[0] = True
            log.write("train", 2, {"loss": 2.0})
            raise KeyError
        return
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_events_of_the_same_second_or_after_a_clock_was_put_back_come_last(tmp_path, monkeypatch):
    for now, step, process in ((2_000_000_000.5, 1, 30), (2_000_000_000.7, 2, 200), (1_000_000_000, 3, 1000)):
        monkeypatch.setattr(events_of_runs.time, "time", lambda now=now: float(now))
        monkeypatch.setattr(events_of_runs.os, "getpid", lambda process=process: process)
        log = MetricLog(tmp_path, lines=step - 1, step=step - 1)
        log.write("train", step, {"loss": float(step)})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    log = MetricLog(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write("train", 1, {"loss": float("nan")})
    log.close()
    assert read_metrics(tmp_path) == []


def test_other_processes_write_nothing(tmp_path):
    log = MetricLog(tmp_path / "run", enabled=False)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


def test_meter_means_and_state():
    meter = Meter()
    assert meter.read() == {}
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "bad": torch.tensor(value > 5)})
    assert meter.read() == {"loss": 3.0, "bad": pytest.approx(1 / 3)}
    copy = Meter()
    copy.load_state_dict(meter.state_dict(), torch.device("cpu"))
    copy.add({"loss": torch.tensor(3.0), "bad": torch.tensor(False)})
    assert copy.read() == {"loss": 3.0, "bad": 0.25}
    assert meter.count == 3  # the copy is its own
    assert copy.read(lambda means: means * 2) == {"loss": 6.0, "bad": 0.5}
    meter.reset()
    assert meter.read() == {}


def test_speed_counts_from_its_start():
    clock = iter([0.0, 4.0, 10.0, 12.0, 12.0, 13.0])
    speed = Speed(lambda: next(clock))
    assert speed.read() is None  # no images yet
    speed.start()
    speed.add(6)
    speed.add(4)
    assert speed.read() == 5.0
    speed.start()
    assert speed.read() is None


def test_without_a_terminal_there_are_plain_lines_with_the_time_left(monkeypatch):
    clock = iter(range(0, 1000, 6))  # each look at the clock is six seconds later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with Reporter(console=Console(file=out, width=100)).task("epoch 1/2", total=8, done=2) as advance:
        for _ in range(6):
            advance(1, note="loss 1.0")
    lines = out.getvalue().splitlines()
    assert lines
    assert all(line.startswith("epoch 1/2: ") and "loss 1.0" in line and "ETA " in line for line in lines)
    assert "8/8" not in out.getvalue()  # the line of the finished epoch says more


def test_inside_a_long_batch_the_time_left_is_said_too(monkeypatch):
    clock = iter(range(0, 1000, 20))  # each look at the clock is twenty seconds later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with Reporter(console=Console(file=out, width=100)).task("square", total=40) as advance:
        advance.within(0.0)  # of no work done there is no time left to tell
        advance.within(10.0)
        advance(20)  # a batch that ends sooner than the work foretold
        advance.within(2.0)
    first, second, third, fourth = out.getvalue().splitlines()
    assert first == "square: 0/40"
    assert second.startswith("square: 10/40, ETA ")
    assert third.startswith("square: 20/40, ETA ")
    assert fourth.startswith("square: 22/40, ETA ")


def test_on_a_terminal_a_bar_moves_inside_a_long_batch():
    out = io.StringIO()
    with Reporter(console=Console(file=out, force_terminal=True, width=100)).task("square", total=40) as advance:
        advance.within(13.4)
    assert "13/40" in out.getvalue()


def test_on_a_terminal_there_is_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with Reporter(console=console).task("epoch 1/2", total=4) as advance:
        advance(4, note="loss 1.0")
    assert "4/4" in out.getvalue()
    assert "ETA" in out.getvalue()


def test_a_silent_reporter_still_warns():
    out = io.StringIO()
    reporter = Reporter(enabled=False, console=Console(file=out, width=100))
    reporter.line("hello")
    with reporter.task("epoch", 1) as advance:
        advance()
    reporter.warn("careful")
    assert out.getvalue() == "warning: careful\n"
