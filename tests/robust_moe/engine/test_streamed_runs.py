"""Whole runs on streamed images: the numbers of images in memory, after a kill too, and no other data underneath."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from small_runs import TINY, metrics

from robust_moe.config import TrainConfig, config_from_dict, load_config
from robust_moe.data import StreamedSet
from robust_moe.engine import CheckpointError, Reporter, Trainer, load_checkpoint
from robust_moe.report import assess
from robust_moe.settings import plain


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """90 training and 12 test images of three classes."""
    for part, count in (("train", 30), ("test", 4)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([label, i, count]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i:02}.png")
    return tmp_path / "data"


def configured(root: Path, out: str, *settings: str) -> TrainConfig:
    """64 of the images in two epochs of four steps, five held out."""
    small = plain(load_config(None, [*TINY, f"run.out={root.parent / out}"]))
    data = ("data.name=image_folder", f"data.root={root}", "data.validation_fraction=0.06", "data.augment.flip=true")
    return config_from_dict(small, [*data, *settings])


def fit(config: TrainConfig, **options: object):
    console = Console(record=True, width=300, file=io.StringIO())
    trainer = Trainer(config, Reporter(console=console))
    trainer.fit(**options)
    return trainer, console.export_text()


def stopped_after(config: TrainConfig, steps: int) -> None:
    """A run that ends in the middle of an epoch as a killed one does, with a checkpoint of its last step."""
    trainer = Trainer(config, Reporter(enabled=False))
    step = trainer._step

    def killed(batch: object) -> None:
        if trainer.state.step == steps:
            raise RuntimeError("killed")
        step(batch)

    trainer._step = killed
    with pytest.raises(RuntimeError, match="killed"):
        trainer.fit()


def test_a_streamed_run_has_the_numbers_of_one_in_memory_and_goes_on_to_the_same_bits(root: Path):
    memory, _ = fit(configured(root, "memory", "data.loading=memory"))
    stream, said = fit(configured(root, "stream", "data.loading=stream", "data.workers=0"))
    assert isinstance(stream.splits.train, StreamedSet)
    assert metrics(memory.folder) == metrics(stream.folder)
    killed = configured(root, "killed", "data.loading=stream", "data.workers=1", "run.checkpoint_steps=1")
    stopped_after(killed, 6)
    assert load_checkpoint(root.parent / "killed" / "last.pt")["position"]["batch"] == 2
    same = config_from_dict(plain(killed), ["run.checkpoint_steps=null", "data.workers=0"])  # where, not what
    _, said = fit(same)
    assert "6 of 8 steps done" in said and "changed" not in said
    states = [root.parent / name / "last.pt" for name in ("killed", "stream")]
    assert metrics(root.parent / "killed") == metrics(root.parent / "stream")
    one, two = (load_checkpoint(path) for path in states)
    assert all((one["model"][name] == two["model"][name]).all() for name in two["model"])


def test_a_run_does_not_go_on_in_mid_epoch_with_other_images(root: Path):
    config = configured(root, "run", "data.loading=stream", "data.workers=0", "run.checkpoint_steps=1")
    stopped_after(config, 6)
    used = next(path for path in sorted((root / "train").rglob("*.png")))
    content = used.read_bytes()
    used.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match=r"expected the data that the run was started with; 1 of 64 training"):
        fit(config)
    used.unlink()
    with pytest.raises(CheckpointError, match=r"expected the data that the run was started with; "):
        fit(config)
    used.write_bytes(content)
    memory = config_from_dict(plain(config), ["data.loading=memory"])
    with pytest.raises(CheckpointError, match=r"data.loading: checkpoint has 'stream', got 'memory'"):
        fit(memory)
    _, said = fit(memory, override=True)
    assert "changed: images were told apart by their files, and are by their pixels" in said


def test_images_that_were_skipped_are_said_once_an_epoch_and_training_images_can_be_measured(root: Path):
    config = configured(root, "run", "data.loading=stream", "data.workers=0", "data.on_error=skip")
    trainer, _ = fit(config)
    damaged = Path(trainer.splits.train.images.where(5))
    damaged.write_bytes(b"no image" * (damaged.stat().st_size // 8) + bytes(damaged.stat().st_size % 8))
    trainer, said = fit(config, resume=False)
    for epoch in (1, 2):
        assert said.count(f"warning: epoch {epoch}: 1 images could not be read") == 1
    assert said.count(f"{damaged}: expected an image that decodes") == 2
    results, _ = assess(trainer.folder, split="train", count=4, reporter=Reporter(enabled=False))
    assert results["count"] == 4
