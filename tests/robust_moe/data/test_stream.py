"""Streamed images: their batches are those of the same images in memory, whoever decodes them, wherever it begins."""

from __future__ import annotations

import gc
import io
import os
import select
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from robust_moe.config import load_config
from robust_moe.data import (
    AugmentConfig,
    Batch,
    DataError,
    ImageSet,
    Splits,
    StreamedSet,
    channel_statistics,
    load_splits,
    make_loader,
)
from robust_moe.data import stream_loader as stream_module
from robust_moe.data.decode_all import spread

SOURCES = ("image_folder", "parquet", "webdataset")
AUGMENT = AugmentConfig(flip=True, crop_padding=2, color_jitter=0.3, cutout=2)


def load(name: str, root: Path, *settings: str, image_size: int | None = 6) -> Splits:
    size = [] if image_size is None else [f"data.image_size={image_size}"]
    return load_splits(load_config(None, [f"data.name={name}", f"data.root={root}", *size, *settings]).data, 0)


def batches(images: ImageSet | StreamedSet, epoch: int = 1, start: int = 0, **options) -> list[Batch]:
    options = {"device": "cpu", "shuffle": True, "augment": AUGMENT, "seed": 7, **options}
    return list(make_loader(images, 8, **options).epoch(epoch, start))


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert (
            one.images.is_contiguous() and other.images.is_contiguous()
        )  # another layout would change the last bits of a training


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_are_those_of_memory(source: Callable[[str], Path], name: str, workers: int):
    root = source(name)
    streamed, memory = (
        load(name, root, f"data.loading={how}", f"data.workers={workers}") for how in ("stream", "memory")
    )
    assert isinstance(streamed.train, StreamedSet)
    assert isinstance(memory.train, ImageSet)
    for part in ("val", "test"):  # held out, and tested: the same images, in memory
        one, other = getattr(streamed, part), getattr(memory, part)
        assert isinstance(one, ImageSet)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert streamed.train.shape == memory.train.shape == (3, 6, 6)
    assert torch.equal(streamed.train.labels, memory.train.labels)
    for epoch in (0, 1):
        assert_equal(batches(streamed.train, epoch), batches(memory.train, epoch))
    flips = AugmentConfig(flip=True, flip_order="alternating")  # alone they are the workers'
    assert_equal(batches(streamed.train, augment=flips), batches(memory.train, augment=flips))
    assert_equal(
        batches(streamed.train, shuffle=False, augment=None), batches(memory.train, shuffle=False, augment=None)
    )
    assert torch.equal(streamed.train.decoded().images, memory.train.images)
    assert channel_statistics(streamed.train) == channel_statistics(memory.train)


def test_sources_have_the_same_pictures(source: Callable[[str], Path]):
    """So that equality above means something: whichever way they are stored, they are read in one order."""
    first, *others = (load(name, source(name), "data.loading=stream") for name in SOURCES)
    for other in others:
        assert torch.equal(first.train.decoded().images, other.train.decoded().images)
        assert torch.equal(first.train.labels, other.train.labels)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 1, 2, 4])  # 27 images: four batches
def test_a_resumed_epoch_is_bit_equal(source: Callable[[str], Path], start: int, workers: int):
    images = load("image_folder", source("image_folder"), "data.loading=stream", f"data.workers={workers}").train
    whole = batches(images)
    resumed = batches(images, start=start)
    assert len(whole) == 4
    if start == 4:
        assert resumed == []
    else:
        assert_equal(resumed, whole[start:])


def test_ranks_together_make_the_batches_of_one_process(source: Callable[[str], Path]):
    """With resized crops too: what happens to an image does not depend on how many ranks share the work."""
    images = load("webdataset", source("webdataset"), "data.loading=stream", "data.workers=1").train
    augment = AugmentConfig(flip=True, resized_crop_scale=(0.2, 1.0))
    whole = batches(images, augment=augment)
    ranks = [batches(images, augment=augment, rank=rank, world_size=2) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert_equal([part], [Batch(*(value[rank::2].contiguous() for value in batch))])


def test_a_resized_crop_is_cut_from_the_image_at_its_own_resolution(tmp_path: Path):
    """Stripes of one pixel are grey at a quarter of the size, and black and white in a crop of few pixels."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(stripes).save(tmp_path / part / name / f"{i}.png")
    splits = load("image_folder", tmp_path, "data.loading=stream", "data.workers=0", image_size=16)
    whole = batches(splits.train, augment=None)[0].images
    cut = batches(splits.train, augment=AugmentConfig(resized_crop_scale=(0.01, 0.02)))[0].images
    assert whole.std() < 0.05
    assert cut.std() > 0.2


def test_the_global_generator_is_neither_read_nor_moved(source: Callable[[str], Path]):
    images = load("image_folder", source("image_folder"), "data.loading=stream", "data.workers=1").train
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batches(images)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gives_the_batches_of_the_cpu(source: Callable[[str], Path], workers: int):
    """Copied on a stream of their own, one ahead: each is whole when the step begins."""
    images = load("image_folder", source("image_folder"), "data.loading=stream", f"data.workers={workers}").train
    moved = AugmentConfig(flip=True, crop_padding=2, cutout=2)  # moves pixels, so that equal means bit-equal
    expected = batches(images, augment=moved)
    got = batches(images, augment=moved, device="cuda")
    assert all(part.device.type == "cuda" for batch in got for part in batch)
    assert_equal([Batch(*(part.cpu() for part in batch)) for batch in got], expected)


def test_an_epoch_that_is_left_early_leaves_no_worker(source: Callable[[str], Path]):
    images = load("image_folder", source("image_folder"), "data.loading=stream", "data.workers=2").train
    left = make_loader(images, 8, device="cpu").epoch(0)
    next(left)
    left.close()
    gc.collect()
    assert torch.multiprocessing.active_children() == []


# --- images that cannot be read


def damaged(root: Path, *numbers: int) -> list[Path]:
    paths = sorted((root / "train").rglob("*.png"))
    for number in numbers:
        paths[number].write_bytes(b"no image")
    return [paths[number] for number in numbers]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_stops_the_epoch_with_its_name_alone(source: Callable[[str], Path], workers: int):
    root = source("image_folder")
    how = ("data.loading=stream", f"data.workers={workers}", "data.validation_fraction=0")
    images = load("image_folder", root, *how).train
    (bad,) = damaged(root, 13)  # after the start: nothing looks at it before
    with pytest.raises(DataError) as caught:
        batches(images)
    assert str(caught.value) == f"{bad}: expected an image that decodes, got: no format that Pillow knows"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_skipped_counted_and_said_once_an_epoch(source: Callable[[str], Path], workers: int):
    root = source("image_folder")
    how = ("data.loading=stream", "data.on_error=skip", f"data.workers={workers}", "data.validation_fraction=0")
    images = load("image_folder", root, *how).train
    before = batches(images, augment=None)
    bad = damaged(root, 0, 12, 13, 29)
    instead = {0: 1, 12: 14, 13: 14, 29: 1}  # the next in the set; after the last comes the first, which is damaged
    said: list[str] = []
    after = batches(images, augment=None, say=said.append)
    places = 0
    for old, new in zip(before, after, strict=True):
        expected = torch.tensor([instead.get(i, i) for i in old.index.tolist()])
        assert torch.equal(new.index, expected)
        assert torch.equal(new.labels, images.labels[expected])
        assert len(new.labels) == len(old.labels)
        places += int((old.index != expected).sum())
    assert places == 4
    (line,) = said
    start = "epoch 2: 4 images could not be read, and the next ones took their places (data.on_error=skip): "
    assert line.startswith(start)
    assert all(line.count(f"{path}: expected an image that decodes") == 1 for path in bad)
    # the same where the epoch goes on in its middle, and for two ranks
    assert_equal(batches(images, augment=None, start=2), after[2:])
    ranks = [batches(images, augment=None, rank=rank, world_size=2) for rank in range(2)]
    for whole, *parts in zip(after, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.index, whole.index[rank::2])


def test_where_nothing_can_be_read_skipping_is_an_error(source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream_module, "IN_A_ROW", 5)
    root = source("image_folder")
    how = ("data.loading=stream", "data.on_error=skip", "data.workers=0", "data.validation_fraction=0")
    images = load("image_folder", root, *how).train
    damaged(root, *range(10, 15))
    with pytest.raises(DataError, match=r"expected an image that can be read among 5 in a row, got none, the last"):
        batches(images)


def test_an_image_of_another_size_is_no_damage_that_is_skipped(source: Callable[[str], Path]):
    """As in memory: of a set of many sizes, those of the first image's would be left."""
    root = source("parquet")
    table = pq.read_table(root / "train.parquet").to_pylist()
    Image.new("RGB", (5, 5)).save(other := io.BytesIO(), "PNG")
    table[7]["image"]["bytes"] = other.getvalue()
    pq.write_table(pa.Table.from_pylist(table), root / "train.parquet")
    how = ("data.on_error=skip", "data.workers=0", "data.validation_fraction=0")
    message = r"row 7: expected 12x9 pixels, as the first image, got 5x5; data.image_size brings all to one size"
    with pytest.raises(DataError, match=message):
        load("parquet", root, "data.loading=memory", *how, image_size=None)
    streamed = load("parquet", root, "data.loading=stream", *how, image_size=None).train
    with pytest.raises(DataError, match=message):
        batches(streamed)


def test_a_coloured_image_among_grey_ones_is_named(tmp_path: Path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                Image.new("L", (6, 6), i).save(tmp_path / part / name / f"{i}.png")
    splits = load("image_folder", tmp_path, "data.loading=stream", "data.workers=0", "data.validation_fraction=0")
    assert splits.train.channels == splits.test.channels == 1
    memory = load("image_folder", tmp_path, "data.loading=memory", "data.validation_fraction=0")
    assert_equal(batches(splits.train), batches(memory.train))
    late = tmp_path / "train" / "b" / "2.png"
    Image.new("RGB", (6, 6), (1, 2, 3)).save(late)
    with pytest.raises(
        DataError, match=rf"{late}: expected a grey image, as those are that were looked at, got colour"
    ):
        batches(splits.train)
    damaged(tmp_path, 0)  # before it, and skipped
    with pytest.raises(DataError, match=rf"{late}: expected a grey image"):
        replace(splits.train, on_error="skip").decoded()


def test_a_worker_that_is_killed_ends_the_epoch_in_one_sentence(source: Callable[[str], Path]):
    images = load("image_folder", source("image_folder"), "data.loading=stream", "data.workers=1").train
    handler = signal.getsignal(signal.SIGCHLD)
    running = make_loader(images, 1, device="cpu").epoch(0)
    next(running)
    assert signal.getsignal(signal.SIGCHLD) == handler  # nothing raises in the middle of a step
    (worker,) = torch.multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"data.workers: expected worker processes that decode images, one has ended: "):
        list(running)


def test_workers_leave_signals_to_their_parent(source: Callable[[str], Path]):
    """A terminal sends SIGINT, and a job's end SIGTERM, to every process of the training."""
    images = load("image_folder", source("image_folder"), "data.loading=stream", "data.workers=1").train
    running = make_loader(images, 1, device="cpu").epoch(0)
    found = [next(running)]
    (worker,) = torch.multiprocessing.active_children()
    for number in ("INT", "TERM"):  # sent by another process than the parent, whose SIGTERM ends a worker
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    found += running
    assert len(found) == len(images)


PROGRAM = """
import sys
sys.path[:0] = {path!r}
import torch
from robust_moe.config import load_config
from robust_moe.data import load_splits, make_loader
config = load_config(None, ["data.root={root}", "data.loading=stream", "data.workers=2"])
held = make_loader(load_splits(config.data, 0).train, 1, device="cpu").epoch(0)  # as a traceback holds it
next(held)
print(*(worker.pid for worker in torch.multiprocessing.active_children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes that are no children of its own")
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_a_process_that_ends_in_the_middle_of_an_epoch_takes_its_workers_along(source: Callable[[str], Path], how: str):
    program = PROGRAM.format(path=sys.path, root=source("image_folder"))
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        workers = [os.pidfd_open(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        if how == "is killed":
            process.kill()
        process.stdin.close()
        assert process.wait(timeout=120) == (0 if how == "ends" else -signal.SIGKILL)
    for worker in workers:
        ended, _, _ = select.select([worker], [], [], 120)
        assert ended
        os.close(worker)


# --- what the whole set is asked


def test_positions_are_spread_over_the_whole_set():
    assert spread(10, 20).tolist() == list(range(10))
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(1_281_167, 2_000)[-1] == 1_281_167 * 1999 // 2000


def test_poisoned_images_are_those_of_memory(source: Callable[[str], Path]):
    root = source("image_folder")
    poison = ("data.poison.share=0.3", "data.poison.target=1", "data.poison.size=2")
    streamed, memory = (
        load("image_folder", root, f"data.loading={how}", "data.workers=0", *poison).train
        for how in ("stream", "memory")
    )
    assert_equal(batches(streamed), batches(memory))
    assert torch.equal(streamed.decoded().images, memory.images)
    clean = load("image_folder", root, "data.loading=memory").train
    assert not torch.equal(memory.images, clean.images)
    half = torch.arange(0, len(memory), 2)
    assert torch.equal(streamed.subset(half).decoded().images, memory.images[half])
    with pytest.raises(DataError, match=r"data.poison.share: expected 0 for streamed images with data.augment.resized"):
        load("image_folder", root, "data.loading=stream", *poison, "data.augment.resized_crop_scale=[0.2,1]")
    with pytest.raises(DataError, match=r"data.poison: expected size \+ margin <= 6 pixels"):
        load("image_folder", root, "data.loading=stream", "data.poison.share=0.3", "data.poison.size=7")


def test_memory_does_not_grow_with_the_images(tmp_path: Path):
    """What Python and NumPy allocate while an epoch passes: that of some batches, whether 200 or 800 images pass."""
    data = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(data, "JPEG")
    for part, count in (("train", 400), ("test", 1)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / part / name / f"{i}.jpg").write_bytes(data.getvalue())
    images = load("image_folder", tmp_path, "data.loading=stream", "data.workers=0", image_size=64).train
    peaks = []
    for count in (100, 200, 700):  # the first imports and fills what is kept
        loader = make_loader(images.subset(torch.arange(count)), 10, device="cpu")
        tracemalloc.start()
        for _ in loader.epoch(0):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    batch = 10 * 3 * 64 * 64
    assert batch < peaks[1] < 4 * batch
    assert peaks[2] < peaks[1] + batch  # decoded, the 500 more would take 50 batches
