"""Part 7: the real thing: train as long as the budget allows, then AutoAttack and the routed attacks.

The number of epochs follows from the speed of the first steps, so that the schedule ends where the training does.
Attacks run on the first images of every class; each result is scored again in float32, the moment its attack is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoded import DECODED_ONCE
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.trainer_steps import GENERATED, WatchedTrainer
from robust_moe.attacks import PGD, ExpertPGD, RouterPGD
from robust_moe.attacks.autoattack import members
from robust_moe.config import TrainConfig, load_config
from robust_moe.engine import Reporter, epochs_within, passes_of_run, read_metrics
from robust_moe.engine.experiment import load_experiment
from robust_moe.evaluation import predict
from robust_moe.outputs import remove_folder, run_outputs
from robust_moe_kernels.modules import moe_layers

__all__ = ["epochs_that_fit", "run"]

EPS = 8 / 255
# By preset, its share of the time that is left when it begins.
PRESETS = {"speedrun-cifar10-blockmoe": 0.6, "speedrun-cifar10-r18": 0.95}
EVALUATION = 0.3  # of a preset's time
CAREFUL = 0.9  # of the training time is planned for: short attacks have their overheads too
WARM, TIMED = 10, 20  # steps of the first look at the speed
IMAGES = 1000  # attacked
SLACK = 5.0  # seconds of a preset that nothing is planned for: saving and loading


def run(record: Record) -> str:
    return "; ".join(_preset(record, name, record.left() * share) for name, share in PRESETS.items())


def _preset(record: Record, preset: str, seconds: float) -> str:
    end = time.monotonic() + seconds
    rate, images, set_up = _look(record, preset)
    config = _config(record, preset)
    train = (1 - EVALUATION) * (end - time.monotonic()) - set_up - SLACK
    epochs = epochs_that_fit(train, rate, config, images)
    about = {"epochs": epochs, "epochs_of_the_preset": config.run.epochs, "seconds_to_set_up": set_up}
    record.row(preset=preset, **about, passes_per_s=rate)
    began = time.monotonic()
    trainer = WatchedTrainer(_config(record, preset, f"run.epochs={epochs}"), lambda number: None, Reporter())
    result = trainer.fit(resume=False)
    took = time.monotonic() - began
    for line in read_metrics(result.folder, "epoch"):
        record.row(preset=preset, **line)
    record.row(preset=preset, trained_seconds=took, steps=result.steps, best=result.best)
    clean, robust, finished = _evaluate(record, preset, result.folder, end)
    remove_folder(result.folder, run_outputs(result.folder))
    by = "AutoAttack" if finished else "attacks so far"
    return f"{preset}: {epochs} epochs in {took:.0f} s, clean {clean:.1%}, {by} {robust:.1%}"


def epochs_that_fit(seconds: float, rate: float, config: TrainConfig, images: int) -> int:
    """Epochs of the preset for a time, one at least and no more than its own. ``rate``: passes a second."""
    try:
        fitting = epochs_within(CAREFUL * seconds, rate, config, images)
    except ValueError:  # not even one
        fitting = 1
    return min(fitting, config.run.epochs)


def _config(record: Record, preset: str, *overrides: str) -> TrainConfig:
    """The preset on the given images, as Parquet files; on generated ones without."""
    settings = ["data.expects=null", f"run.out={record.folder / 'run'}"]
    if record.data is not None:
        settings += [f"data.name={DECODED_ONCE}", f"data.root={record.data}"]
    else:
        settings += [f"data.name={GENERATED}", "data.train_limit=5000", "data.test_limit=1000"]
    if record.dry:
        settings += ["model.width=4", "data.image_size=8", "method.attack.steps=2", "run.batch_size=16"]
        settings += ["data.train_limit=48", "data.test_limit=8", "eval.attack.steps=2", "run.epochs=1"]
        settings += ["data.validation_fraction=0.1", "method.attack_steps_schedule=[]"]
    return load_config(preset, [*settings, *overrides])


def _look(record: Record, preset: str) -> tuple[float, int, float]:
    """(passes of an image a second, training images, seconds before the first step at full speed) of a short run, with
    attacks as long as they get."""
    warm, timed = (1, 2) if record.dry else (WARM, TIMED)
    times = [time.perf_counter()]

    def before_step(number: int) -> None:
        if number in (warm, warm + timed):
            if record.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    limits = (f"run.max_steps={warm + timed + 1}", "data.validation_fraction=0", "method.attack_steps_schedule=[]")
    trainer = WatchedTrainer(_config(record, preset, *limits, "run.epochs=1000"), before_step)
    trainer.fit(resume=False)
    config, seconds = trainer.config, (times[2] - times[1]) / timed
    images = round(len(trainer.splits.train) * (1 - _config(record, preset).data.validation_fraction))
    one_step = replace(config, run=replace(config.run, max_steps=1))
    record.row(preset=preset, step_ms=1e3 * seconds, images_per_s=config.run.batch_size / seconds)
    return passes_of_run(one_step, images) / seconds, images, times[1] - times[0]


def _evaluate(record: Record, preset: str, folder: Any, end: float) -> tuple[float, float, bool]:
    """(clean, robust share, whether AutoAttack was finished); a row for every attack."""
    _, model, splits, _ = load_experiment(folder)
    model.to(record.device)
    test = splits.test.subset(splits.test.head_index(4 if record.dry else IMAGES))
    images = (test.images.to(record.device).float() / 255).contiguous()
    labels = test.labels.to(record.device)
    index = torch.arange(len(labels), device=record.device)
    settings = {"steps": 1} if record.dry else {}
    robust = clean = _right(model, images, labels)
    record.row(preset=preset, attack="none", robust=_share(clean), images=len(labels))
    finished = True
    for name, attack in {"pgd-20": PGD(EPS, steps=20), **members(EPS, seed=0, **settings)}.items():
        robust, whole = _attacked(model, attack, images, labels, index, robust, end)
        finished &= whole
        record.row(preset=preset, attack=name, robust=_share(robust), images=len(labels), finished=whole)
        if not whole:
            record.say(f"{preset}, {name}: stopped for want of time; the share is of what was attacked so far")
            break
    if moe_layers(model):
        for name, attack in {"experts": ExpertPGD(EPS, steps=20), "router": RouterPGD(EPS, steps=20)}.items():
            kept, whole = _attacked(model, attack, images, labels, index, clean, end)
            record.row(preset=preset, attack=name, alone=_share(kept), images=len(labels), finished=whole)
    return _share(clean), _share(robust), finished


class _OutOfTime(Exception):
    """The part has no time for more."""


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return predict(model, images)[0].to(labels.device) == labels


def _attacked(
    model: nn.Module,
    attack: Callable[..., Tensor],
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    robust: Tensor,
    end: float,
    batch: int = 500,
) -> tuple[Tensor, bool]:
    """(which images are still right, whether all that were so far have been attacked before the time was up). An attack
    in progress ends with its next forward."""

    def stop_when_late(module: nn.Module, inputs: Any) -> None:
        if time.monotonic() > end:
            raise _OutOfTime

    robust = robust.clone()
    watch = model.register_forward_pre_hook(stop_when_late)
    try:
        for rows in robust.nonzero()[:, 0].split(batch):
            found = attack(model, images[rows], labels[rows], index[rows])
            robust[rows] = _right(model, found, labels[rows])
    except _OutOfTime:
        return robust, False
    finally:
        watch.remove()
    return robust, True
