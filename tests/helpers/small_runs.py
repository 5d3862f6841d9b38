"""What tests of whole training runs share: the settings of a small one, and whether two are the same in every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robust_moe.engine import load_checkpoint, read_metrics

# what the runs of a study of transformers have in common on 48 digits
TINY_STUDY = (
    "data.name=digits",
    "data.image_size=8",
    "data.train_limit=48",
    "data.test_limit=20",
    "data.augment.crop_padding=0",
    "model.width=6",
    "method.attack.eps=0.1",
    "method.attack.steps=1",
    "eval.attack.steps=2",
    "run.epochs=2",
    "run.batch_size=16",
)

# 64 real digits of 8x8 pixels, a two-stage network, two epochs of four steps
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
    "run.precision=32-true",  # auto depends on the processor
    "run.threads=1",  # the order of sums, and so the last bits, depend on it
)
# On top of that: a vision transformer of two blocks, four patches an image, the second MLP routed token by token
TOKENS = (
    "model.name=vit_micro",
    "model.width=8",
    "model.heads=2",
    "model.depth=2",
    "model.moe.layers=[blocks.1.mlp]",
    "model.moe.gate=linear",
)
NEVER_EQUAL = ("seconds", "val_seconds", "images_per_second")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in NEVER_EQUAL} for line in read_metrics(folder)]


def assert_same(one: Any, two: Any, path: str = "") -> None:
    """Equal in every bit, tensors included."""
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for number, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_same(left, right, f"{path}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), path
    else:
        assert one == two, path


def assert_same_run(one: Path, two: Path) -> None:
    """The same metrics, and the same last and best checkpoint but for their folder."""
    assert metrics(one) == metrics(two)
    for name in ("last.pt", "best.pt"):
        left, right = load_checkpoint(one / name), load_checkpoint(two / name)
        for state in (left, right):
            state["config"]["run"].pop("out")
        assert_same(left, right)
