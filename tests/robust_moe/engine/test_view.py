"""What a training shows of itself, from given numbers: on a terminal of 80 columns and in plain lines."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from robust_moe.engine import Reporter, Trainer, read_metrics
from robust_moe.engine.view import View, epoch_line, expert_line, memory_in_use, seconds_left, view_lines

FULL = View(
    interval={"task_loss": 12.3456, "loss": 10.9, "balance_loss": -1.3862, "accuracy": 0.51234, "grad_norm": 3.0},
    validation=2,
    clean=0.6123,
    robust=0.35,
    best=0.36,
    speed=1234.5678,
    left=3723.4,
    memory=3 * 2**30 // 2,
    experts={"layer2.1": [0.5, 0.5, 0.5, 0.5], "blocks.11.mlp": [1.0, 0.0, 0.25, 0.75]},
)


def test_the_view_shows_the_numbers():
    assert view_lines(FULL) == [
        "loss 10.900 (task 12.346, balance -1.386)  accuracy 0.512",
        "1,235 images/s  run ETA 1:02:03  memory 1.5 GiB",
        "validation 2: clean 61.2%  robust 35.0%  best 36.0%",
        "layer2.1  ▅▅▅▅  50 50 50 50 %",
        "blocks.11.mlp  █▁▃▇  100 0 25 75 %",
    ]
    assert view_lines(FULL, ascii_only=True)[-1] == "blocks.11.mlp  #_:*  100 0 25 75 %"


def test_what_is_not_known_yet_is_left_out():
    assert view_lines(View()) == []
    assert view_lines(View(best=0.25, speed=3.0)) == ["3 images/s"]  # a resumed run, before its first validation
    assert view_lines(View(validation=3, clean=0.5)) == ["validation 3: clean 50.0%"]
    assert View(memory=2**20).pace() == "memory 1 MiB"


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("experts", [1, 8, 32, 100])
def test_no_line_is_wider_than_the_terminal(width, experts):
    shares = [(number + 1) / experts for number in range(experts)]
    layers = {f"encoder.layers.{number}.feed_forward.experts": shares for number in range(12)}
    view = View(FULL.interval, 100, 1.0, 1.0, 1.0, 1e7, 1e6, 2**40, 3, layers)
    lines = view_lines(view, width)
    assert all(len(line) <= width for line in lines)
    assert lines[-1] == "and 4 more layers"
    if experts == 32 and width == 80:  # not all have room for their numbers
        assert lines[3].endswith("█  3.1% to 100.0%") and len(re.findall("[▁-█]", lines[3])) == 32


@pytest.mark.parametrize(
    ("shares", "bars"),
    [
        ([0.25] * 4, "===="),  # alike: half as high as there is room
        ([1.0, 0.0], "#_"),
        ([1.0, 0.0, 0.0, 0.0], "#___"),  # collapsed: no higher than there is room
        ([2.0, 1.0, 0.0], "#=_"),  # several experts an image
        ([0.0, 0.0], "__"),  # nothing was routed: none is used
        ([1.0], "="),
    ],
)
def test_bars_are_as_high_as_the_use_of_experts(shares, bars):
    _, shown, *percents = expert_line("l", shares, ascii_only=True).split()
    assert shown == bars
    assert percents[:-1] == [f"{100 * share:.0f}" for share in shares]


def test_the_line_of_an_epoch():
    values = {"epoch": 2, "train_task_loss": 1.5, "val_clean": 0.5, "val_robust": 0.25, "lr": 0.1}
    assert epoch_line(values, 15, View(speed=10.0)) == (
        "epoch 2/15  loss 1.500  val clean 50.0%  val robust 25.0%  10 images/s"
    )
    assert epoch_line({"epoch": 2, "train_task_loss": 1.5}, 15, View()) == "epoch 2/15  loss 1.500"


def test_time_and_memory():
    assert seconds_left(10.0, 4, 6) == 15.0
    assert seconds_left(10.0, 0, 6) is None
    before = memory_in_use(torch.device("cpu"))
    kept = torch.ones(16 << 20)  # 64 MiB
    assert before > 2**20 and memory_in_use(torch.device("cpu")) >= before and kept.sum() > 0


# of sixteen colours or of 256: a style that any console has written before keeps the codes of that one
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]")


def terminal(**environment: str) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=80, height=40, _environ={"TERM": "xterm-256color", **environment}
    )
    return Reporter(console=console), out


def test_below_the_bar_of_a_terminal_are_the_lines():
    reporter, out = terminal()
    reporter.below = lambda width, ascii_only: [f"{width} columns, {ascii_only}"]
    with reporter.task("epoch 1/2", total=4) as advance:
        advance(2, note="in the lines below")
    assert "2/4" in out.getvalue() and "80 columns, False" in out.getvalue()
    assert "in the lines below" not in out.getvalue()
    shown = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("[\r\n]", out.getvalue())]
    assert max(map(len, shown)) <= 80


def test_colours_and_movement_are_left_out_where_they_are_not_wanted():
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        reporter, out = terminal(**environment)
        with reporter.task("epoch", total=2) as advance:
            advance(1)
        assert bool(COLOUR.search(out.getvalue())) == coloured
    reporter, out = terminal(TERM="dumb")
    assert not reporter.bars
    with reporter.task("epoch", total=2) as advance:
        advance(1)
    assert "\x1b" not in out.getvalue()


def test_a_training_tells_what_its_metrics_have(tiny):
    config = tiny("model.moe.num_experts=3")
    reporter, out = terminal()
    trainer = Trainer(config, reporter)
    assert trainer.fit().finished
    epochs, routing = read_metrics(config.run.out, "epoch"), read_metrics(config.run.out, "routing")
    lines = view_lines(trainer.view)
    best = max(line["val_robust"] for line in epochs)
    clean, robust = epochs[-1]["val_clean"], epochs[-1]["val_robust"]
    assert lines[2] == f"validation 2: clean {clean:.1%}  robust {robust:.1%}  best {best:.1%}"
    uses = [expert_line("layer2.1", line["selected"]) for line in routing if line["split"] == "test"]
    assert lines[3] == uses[1]
    assert "images/s" in lines[1] and "run ETA 0:00" in lines[1] and "memory" in lines[1]
    assert lines[0] in out.getvalue() and uses[0] in out.getvalue()  # below the bars of the second epoch
    assert reporter.below is None  # nor what comes after the training


def test_in_plain_lines_the_same_stands(tiny):
    out = io.StringIO()
    config = tiny("eval.every=2")
    assert Trainer(config, Reporter(console=Console(file=out, width=200))).fit().finished
    assert "\x1b" not in out.getvalue() and out.getvalue().isascii()
    first, second = (line for line in out.getvalue().splitlines() if re.match(r"epoch \d/2  ", line))
    assert "val clean" not in first and "images/s" in first and "run ETA 0:00" in second
    (use,) = (line for line in out.getvalue().splitlines() if "experts, test images" in line)  # once a validation
    (shares,) = (line for line in read_metrics(config.run.out, "routing") if line["split"] == "test")
    assert use == f"  experts, test images: {expert_line('layer2.1', shares['selected'], 100, ascii_only=True)}"
