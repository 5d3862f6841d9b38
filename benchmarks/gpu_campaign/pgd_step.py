"""Part 4: a whole step of PGD-7 adversarial training as the trainer does it, loader and augmentation included: what
precision and determinism change, how many kernels it is and which take longest; and a plain loop trainer.

A compiled model is not measured: the trainer compiles none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.trainer_steps import WatchedTrainer, step_config
from robust_moe.benchmarks.baselines import MaskedLoop, first_line
from robust_moe.benchmarks.train_step import plain_attack
from robust_moe.config import TrainConfig
from robust_moe.engine.fabric import library_algorithms
from robust_moe.models import build_model

__all__ = ["counted_launches", "kernels_of", "run"]

WARM, TIMED, PROFILED = 4, 12, 2  # steps
LONGEST = 10  # kernels that are listed
EPS = 8 / 255
# label: settings of run.*; the first is what everything is compared with
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16-mixed"},
    "tf32": {"precision": "32-true"},
    "bf16, not deterministic": {"precision": "bf16-mixed", "deterministic": False},
}
SECONDS = 12.0  # wanted for a variant
COUNTED = 60.0  # seconds that a count of launches may take; it takes about ten


def run(record: Record) -> str:
    counted = counted_launches(record)
    rates: dict[tuple[str, int], float] = {}
    batches = (4,) if record.dry else (640, 128)
    for batch in batches:
        for label, settings in VARIANTS.items():
            if not record.out_of_time(SECONDS, f"{label}, B={batch}"):
                _measure(record, label, settings, batch, rates, counted)
        for autocast in (False, True):
            _plain(record, batch, autocast, True, rates)
    for batch, autocast in product(batches, (False, True)):  # last: cuDNN's trials may take them long
        _plain(record, batch, autocast, False, rates)
    return "; ".join(f"B={batch}, {label}: {rate:,.0f} images/s" for (label, batch), rate in rates.items())


def counted_launches(record: Record) -> dict[str, dict[str, int]]:
    """What ``python -m benchmarks launches`` counts without a GPU, by run.precision: launches of a PGD step and of the
    training pass, of the preset's network. Rows say it beside the kernels that ran, so that its rules can be judged."""
    command = [sys.executable, "-m", "benchmarks", "launches"]
    # as on a machine without a GPU; the interpreter of a dry run has launchers of its own, which nobody counts
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    found = {}
    for precision, options in {"bf16-mixed": ["--autocast"], "32-true": []}.items():
        if record.out_of_time(COUNTED + SECONDS, f"launches counted without a GPU, {precision}"):
            continue
        folder = record.folder / f"launches-{precision}"
        try:
            subprocess.run([*command, *options, "--out", str(folder)], env=env, check=True, timeout=COUNTED)
        except subprocess.SubprocessError as error:
            record.say(f"launches counted without a GPU, {precision}: {first_line(error)}")
            continue
        rows = json.loads((folder / "launches.json").read_text(encoding="utf-8"))["rows"]
        by_name = {row["case"]["mode"]: row["launches"] for row in rows}
        found[precision] = {name: by_name[name] for name in ("PGD step", "training pass")}
    return found


def _with_count(config: TrainConfig, counted: dict[str, int] | None) -> dict[str, Any]:
    """What a row says of the count. The sum is of a step's attack and training pass; the loader's augmentation, the
    attack's start and the balance loss, which nobody counts, come to it on a GPU."""
    if counted is None:
        return {}
    steps = config.method.attack.steps
    return {"counted": counted, "counted_a_step": steps * counted["PGD step"] + counted["training pass"]}


def _measure(
    record: Record,
    label: str,
    settings: dict[str, Any],
    batch: int,
    rates: dict[Any, float],
    counted: dict[str, dict[str, int]],
) -> None:
    def measure(batch: int) -> None:
        record.free()
        watch = _Watch(record.device, *((1, 1) if record.dry else (WARM, TIMED)))
        config = step_config(record, batch, watch.steps, **settings)
        WatchedTrainer(config, watch.before_step).fit(resume=False)
        rates[label, batch] = batch * watch.timed / watch.seconds
        about = {"variant": label, "B": batch, "images_per_s": rates[label, batch], "settings": settings}
        about |= _with_count(config, counted.get(settings["precision"]))
        record.row(**about, step_ms=1e3 * watch.seconds / watch.timed, **kernels_of(watch.profile, PROFILED))

    record.with_smaller_batches(batch, measure, label)


class _Watch:
    """Clock and profiler of a run of the trainer."""

    def __init__(self, device: torch.device, warm: int, timed: int) -> None:
        self.device, self.warm, self.timed = device, warm, timed
        self.steps = warm + timed + PROFILED + 1
        kinds = torch.profiler.ProfilerActivity
        self.profile = torch.profiler.profile(activities=[kinds.CUDA if device.type == "cuda" else kinds.CPU])

    def before_step(self, number: int) -> None:
        if number not in (self.warm, self.warm + self.timed, self.warm + self.timed + PROFILED):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if number == self.warm:
            self._began = time.perf_counter()
        elif number == self.warm + self.timed:
            self.seconds = time.perf_counter() - self._began
            self.profile.start()
        else:
            self.profile.stop()


def kernels_of(profile: torch.profiler.profile, steps: int) -> dict[str, Any]:
    """What ran on the device in ``steps`` steps: kernels, copies and fills of one step, the longest kernels by their
    sum, and the time between kernels. Without a GPU, PyTorch's operators stand for them."""
    events = [event for event in profile.profiler.kineto_results.events() if event.duration_ns() > 0]
    on_device = [event for event in events if event.device_type() == torch.autograd.DeviceType.CUDA]
    events = on_device or events
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        sums[event.name()][0] += 1
        sums[event.name()][1] += event.duration_ns() / 1e6
    moved = {name: found for name, found in sums.items() if name.startswith(("Memcpy", "Memset"))}
    kernels = {name: found for name, found in sums.items() if name not in moved}
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
    busy = sum(found[1] for found in sums.values())
    begin = min((event.start_ns() for event in events), default=0)
    end = max((event.start_ns() + event.duration_ns() for event in events), default=0)
    return {
        "kernels_a_step": sum(int(found[0]) for found in kernels.values()) / steps,
        "copies_a_step": {name: found[0] / steps for name, found in moved.items()},
        "busy_ms_a_step": busy / steps,
        "span_ms_a_step": (end - begin) / 1e6 / steps,
        "longest": [
            {"name": name[:200], "calls_a_step": calls / steps, "ms_a_step": ms / steps}
            for name, (calls, ms) in ordered[:LONGEST]
        ],
    }


def _plain(record: Record, batch: int, autocast: bool, deterministic: bool, rates: dict[Any, float]) -> None:
    """A trainer as papers publish it: experts in a loop over masks, attacks that compute weight gradients too. cuDNN
    chooses its convolutions as in our variants, by trying them where nothing need be deterministic; there that is done
    anew for every number of rows that an expert had not had before, as it is for whoever trains so."""
    label = f"plain loop trainer, {'bf16 autocast' if autocast else 'tf32'}"
    label += "" if deterministic else ", not deterministic"
    if record.out_of_time(SECONDS, f"{label}, B={batch}"):
        return

    def measure(batch: int) -> None:
        record.free()
        model, optimizer, images, labels = _plain_model(record, batch)
        timed = 1 if record.dry else 5
        for number in range(1 + timed):
            if number == 1:
                if images.is_cuda:
                    torch.cuda.synchronize()
                began = time.perf_counter()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
                start = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
                loss = F.cross_entropy(model(plain_attack(model, images, labels, start)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rates[label, batch] = batch * timed / seconds
        record.row(variant=label, B=batch, images_per_s=rates[label, batch], step_ms=1e3 * seconds / timed)

    with library_algorithms(deterministic):
        record.with_smaller_batches(batch, measure, label)


def _plain_model(record: Record, batch: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    device, config = record.device, step_config(record, batch, 1)
    size = config.data.image_size or 32
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=10, channels=3, image_size=size)
    for name in config.model.moe.layers:
        model.set_submodule(name, MaskedLoop(model.get_submodule(name)))
    model = model.to(device, memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9, nesterov=True, weight_decay=5e-4)
    labels = torch.randint(10, (batch,), device=device)
    return model, optimizer, torch.rand(batch, 3, size, size, device=device), labels
