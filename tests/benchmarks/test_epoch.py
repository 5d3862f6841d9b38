"""The benchmark of whole epochs: what its clock counts, and one tiny epoch of each trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from robust_moe.benchmarks import epoch
from robust_moe.benchmarks.epoch import PARTS, Clock, Sizes
from robust_moe.benchmarks.own_process import own_worker
from robust_moe.config import load_config
from robust_moe.engine import load_checkpoint

CPU = torch.device("cpu")
SIZES = Sizes(images=16, validated=4, batch=8, width=2, experts=4)


def test_the_time_of_a_part_inside_of_another_is_not_the_others():
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock = Clock(CPU, lambda: next(ticks))
    with clock.part("step"), clock.part("attack"):  # from 1 to 10, and in it from 3 to 6
        pass
    assert clock.seconds() == 15.0
    assert clock.spent == {**dict.fromkeys(PARTS, 0.0), "step": (3 - 1) + (10 - 6), "attack": 6 - 3}


def test_waiting_for_the_next_batch_is_counted_and_working_on_it_is_not():
    ticks = iter([0.0, *map(float, range(10, 100, 10))])
    clock = Clock(CPU, lambda: next(ticks))
    assert list(clock.each("data", iter("ab"))) == ["a", "b"]
    assert clock.spent["data"] == 3 * 10  # a, b, and that there is no third


def test_an_image_is_cropped_out_of_its_frame_and_perhaps_mirrored():
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    frame = torch.nn.functional.pad(torch.from_numpy(image).permute(2, 0, 1), (4,) * 4).float() / 255
    data, seen = epoch._PerImage([image], [7]), set()
    for _ in range(60):
        got, label = data[0]
        assert label == 7
        places = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if torch.equal(got.flip(-1) if mirrored else got, frame[:, top : top + 32, left : left + 32])
        ]
        assert len(places) == 1
        seen.update(places)
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert len({top for top, _, _ in seen}) > 5 and len({left for _, left, _ in seen}) > 5


def test_one_tiny_epoch_of_each_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(epoch, "WORKERS", 0)
    epoch._write(tmp_path, SIZES)
    settings = ("run.threads=1", "method.attack.steps=2", "eval.attack.steps=2")
    config = load_config(None, [*epoch._settings(SIZES, CPU, tmp_path), *settings])
    epoch._check(load_config(None, epoch._settings(SIZES, CPU, tmp_path)), SIZES, CPU)
    found = []

    def answer(step):
        found.append([step(0), step(1)])

    mixed = load_config(None, [*epoch._settings(SIZES, CPU, tmp_path, "bf16-mixed"), *settings])
    epoch._ours(answer, config)
    epoch._ours(answer, mixed)
    epoch._plain(answer, config, SIZES, CPU, tmp_path)
    epoch._plain(answer, config, SIZES, CPU, tmp_path, True)
    for first, second in found:
        for result in (first, second):
            shares = [result[name] for name in PARTS]
            assert all(share > 0 for share in shares) and sum(shares) <= 1 + 1e-6
            assert result["peak"] > 2**20
            assert 0 < result["loss"] < 10
        assert first["loss"] != second["loss"]  # it trains
        made = epoch._medians([first, second])
        assert made["images_per_second"] == pytest.approx(
            (first["images_per_second"] + second["images_per_second"]) / 2
        )
        assert sum(made["shares"].values()) == pytest.approx(1, abs=0.2) and set(made["shares"]) == {*PARTS, "other"}
    for precision in ("32-true", "bf16-mixed"):
        state = load_checkpoint(tmp_path / precision / "last.pt")
        assert state["position"] == {"epoch": 2, "batch": 0, "step": 2 * SIZES.images // SIZES.batch}
        assert state["config"]["run"]["precision"] == precision
    for name in ("fp32", "bf16"):
        assert set(torch.load(tmp_path / f"plain-{name}.pt")) == {"model", "optimizer"}
    with pytest.raises(AssertionError, match="loss: expected finite numbers"):
        epoch._medians([{**found[0][0], "loss": float("nan")}])


def answering(answer, factor):
    answer(lambda number: {"times": number * factor})


def test_a_worker_answers_from_the_inside_of_its_work():
    with own_worker(answering, 3) as ask:
        assert [ask(number) for number in (1, 2)] == [{"times": 3}, {"times": 6}]
