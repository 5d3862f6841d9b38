"""The trainer's own steps, watched: on images that need no files, with a call before every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_campaign.record import Record
from robust_moe.config import TrainConfig, load_config
from robust_moe.data import DATASETS, Batch, DataSet, ImageSet
from robust_moe.engine import Reporter, Trainer
from robust_moe.outputs import remove_folder, run_outputs

__all__ = ["GENERATED", "OUR_RUN", "WatchedTrainer", "step_config"]

GENERATED = "generated"  # data.name of images of two colours a class and noise
OUR_RUN = "blockmoe-cifar10-r18"  # the preset whose steps are measured
CLASSES = 10


@DATASETS.register(GENERATED)
class Generated(DataSet):
    """``train_limit`` and ``test_limit`` images that a network can learn to tell apart."""

    def load(self) -> tuple[ImageSet, ImageSet]:
        generator = torch.Generator().manual_seed(0)
        size, names = self.config.image_size or 32, tuple(f"class {number}" for number in range(CLASSES))
        colours = torch.randint(256, (CLASSES, 3, 2), generator=generator)
        sets = []
        for count in (self.config.train_limit or 1000, self.config.test_limit or 100):
            labels = torch.arange(count) % CLASSES
            halves = colours[labels].repeat_interleave(-(-size // 2), dim=2)[:, :, None, :size]
            halves = halves.expand(-1, -1, size, -1)
            noise = torch.randint(-40, 41, halves.shape, generator=generator)
            sets.append(ImageSet((halves + noise).clamp(0, 255).to(torch.uint8), labels, names, GENERATED))
        return sets[0], sets[1]


class WatchedTrainer(Trainer):
    """Calls ``before_step(number)`` before each step; steps are counted from 0."""

    def __init__(
        self, config: TrainConfig, before_step: Callable[[int], None], reporter: Reporter | None = None
    ) -> None:
        super().__init__(config, reporter or Reporter(enabled=False))
        self.before_step = before_step

    def _step(self, batch: Batch) -> None:
        self.before_step(self.state.step)
        super()._step(batch)


def step_config(record: Record, batch: int, steps: int, **run: Any) -> TrainConfig:
    """The preset's step on generated images, ``steps`` of them, without validation; ``run``: further run settings."""
    folder = record.folder / "steps"
    remove_folder(folder, run_outputs(folder))
    overrides = [
        f"data.name={GENERATED}",
        "data.expects=null",
        "data.validation_fraction=0",
        f"data.train_limit={batch * min(steps, 20)}",
        f"run.out={folder}",
        f"run.batch_size={batch}",
        f"run.max_steps={steps}",
        "run.epochs=1000",
        "run.log_every=1000000",
        "run.checkpoint_every=1000000",
        *(f"run.{name}={str(value).lower()}" for name, value in run.items()),
    ]
    if record.dry:
        overrides += ["model.width=4", "data.image_size=16", "method.attack.steps=2"]
    return load_config(OUR_RUN, overrides)
