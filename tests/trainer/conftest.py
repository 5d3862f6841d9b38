"""A run small enough for a test: 64 real digits of 8x8 pixels, a two-stage network, two epochs of four steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from robust_moe.config import TrainConfig, load_config

TINY = (
    "data.image_size=8",
    "data.train_limit=64",
    "data.test_limit=40",
    "data.validation_fraction=0.02",
    "model.width=4",
    "model.blocks=[1,2]",
    "model.moe.layers=[layer2.1]",
    "method.attack.eps=0.1",
    "method.attack.steps=2",
    "method.attack.alpha=null",
    "eval.attack.eps=0.1",
    "eval.attack.steps=2",
    "eval.attack.alpha=null",
    "run.epochs=2",
    "run.batch_size=16",
    "run.log_every=2",
    "run.accelerator=cpu",
    "run.threads=1",  # the order of sums, and so the last bits, depend on it
)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """``tiny("run.epochs=1", out="name")``: the configuration of a small run in a folder of its own."""

    def make(*overrides: str, out: str = "run") -> TrainConfig:
        return load_config(None, [*TINY, f"run.out={tmp_path / out}", *overrides])

    return make
