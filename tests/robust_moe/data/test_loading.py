"""Which training images are streamed, what is decoded at all, and what is said while data are read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from robust_moe.config import load_config
from robust_moe.data import (
    DataError,
    ImageSet,
    Splits,
    StreamedSet,
    count_trained_on,
    data_differences,
    data_digest,
    encoded_source,
    image_set,
    load_splits,
)
from robust_moe.data.encoded import ImageFiles, Names
from robust_moe.dry_run import training_facts
from robust_moe.engine import Reporter, progress

SIX = 3 * 6 * 6  # bytes of an image


def load(root: Path, *settings: str) -> Splits:
    return load_splits(load_config(None, [f"data.root={root}", "data.image_size=6", *settings]).data, 0)


@pytest.fixture
def root(source: Callable[[str], Path]) -> Path:
    """30 training and 6 test images of three classes."""
    return source("image_folder")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the image files that are read, in their order."""
    names: list[str] = []
    whole = ImageFiles._read

    def note(self: ImageFiles, position: int) -> bytes:
        names.append(self._where(position))
        return whole(self, position)

    monkeypatch.setattr(ImageFiles, "_read", note)
    return names


# --- memory or stream


@pytest.mark.parametrize(("memory", "streamed"), [(2 * 27 * SIX, False), (2 * 27 * SIX - 1, True)])
def test_auto_streams_what_takes_more_than_half_of_memory(
    root: Path, monkeypatch: pytest.MonkeyPatch, memory: float, streamed: bool
):
    """27 training images; three are held out."""
    monkeypatch.setattr(encoded_source, "physical_memory", lambda: float(memory))
    splits = load(root)
    assert isinstance(splits.train, StreamedSet if streamed else ImageSet)
    how = (
        "are streamed: decoded they take 0.0 GiB, more" if streamed else "lie in memory: decoded they take 0.0 GiB, no"
    )
    (note,) = [note for note in splits.notes if "data.loading=auto" in note]
    assert note.startswith(f"training images {how}")
    assert "data.loading" not in " ".join(load(root, "data.loading=stream").notes)  # that was asked for


def test_limits_are_applied_before_anything_is_decoded(root: Path, read: list[str]):
    how = ("data.train_limit=6", "data.test_limit=3", "data.validation_fraction=0.1")
    for loading, count in (("memory", 6 + 3 + 3), ("stream", 3 + 3)):
        read.clear()
        splits = load(root, f"data.loading={loading}", *how)
        assert [len(part) for part in (splits.train, splits.val, splits.test)] == [6, 3, 3]
        assert len(read) == len(set(read)) == count


def test_streaming_finds_out_about_channels_from_headers_spread_over_the_images(
    root: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Only where the decoded images are all grey: one in colour settles it."""
    monkeypatch.setattr(encoded_source, "LOOKED_AT", 9)
    assert load(root, "data.loading=stream").train.channels == 3
    assert len(read) == 3 + 6
    read.clear()
    assert load(root, "data.loading=stream", "data.image_size=null").train.shape == (3, 9, 9)  # images are 12 x 9
    assert len(read) == 3 + 6 + 9


def test_more_than_memory_names_the_setting_that_helps(root: Path, monkeypatch: pytest.MonkeyPatch):
    for memory, loading, message in (
        (27 * SIX - 1, "memory", r"27 images of 6x6 pixels: .*; data.loading=stream decodes them while it trains$"),
        (3 * SIX - 1, "stream", r"3 images of 6x6 pixels: .*; a smaller data.validation_fraction holds out fewer$"),
        (
            27 * SIX,
            "memory",
            r"image_folder: 36 images of 6x6 pixels: .*; data.loading=stream .*, .*, data.test_limit takes fewer$",
        ),
        (
            6 * SIX,
            "stream",
            r"9 images of 6x6 pixels: .*; a smaller data.validation_fraction .*, data.test_limit takes",
        ),
        (6 * SIX - 1, "stream", r"6 images of 6x6 pixels: .*; data.test_limit takes fewer$"),
    ):
        for module in (image_set, encoded_source):
            monkeypatch.setattr(module, "physical_memory", lambda memory=memory: float(memory))
        with pytest.raises(DataError, match=message):
            load(root, f"data.loading={loading}")


def test_the_dry_run_of_streamed_images_has_the_facts_of_memory(root: Path):
    small = ("model.blocks=[1]", "model.width=4", "run.batch_size=9", "method=standard", "data.image_size=6")
    facts = [
        training_facts(load_config(None, [f"data.root={root}", f"data.loading={how}", *small]))
        for how in ("memory", "stream")
    ]
    assert facts[0] == facts[1]


# --- what tells the data of a run from others


def test_streamed_images_are_told_apart_by_names_and_sizes_of_files(root: Path, tmp_path: Path):
    first = data_digest(load(root, "data.loading=stream"))
    assert first["told_by"] == "files"
    assert first["shape"] == [3, 6, 6]
    moved = tmp_path / "moved"
    root.rename(moved)
    assert data_differences(first, data_digest(load(moved, "data.loading=stream"))) == {}
    bad = sorted((moved / "train").rglob("*.png"))
    used = load(moved, "data.loading=stream").train
    inside = next(path for path in bad if str(path) == used.images.where(3))
    inside.write_bytes(inside.read_bytes() + b"\0")
    assert data_differences(first, data_digest(load(moved, "data.loading=stream"))) == {
        "training images": "1 of 27 training images differ"
    }
    inside.rename(inside.with_name("zzz.png"))
    assert "split" not in data_differences(first, data_digest(load(moved, "data.loading=stream")))


def test_images_told_apart_by_pixels_cannot_be_compared_with_files(root: Path):
    memory, stream = (data_digest(load(root, f"data.loading={how}")) for how in ("memory", "stream"))
    assert data_differences(memory, stream) == {
        "told by": "images were told apart by their pixels, and are by their files (data.loading): whether they are "
        "the same is not known"
    }
    del memory["told_by"]  # as older checkpoints
    assert list(data_differences(memory, stream)) == ["told by"]
    labels = stream["train"]["labels"].clone()
    labels[0] += 1
    changed = {**stream, "train": {**stream["train"], "labels": labels}}
    assert list(data_differences(memory, changed)) == ["told by", "training labels"]


@pytest.mark.parametrize("trained", ["memory", "stream"])
@pytest.mark.parametrize("evaluated", ["memory", "stream"])
def test_images_that_changed_sides_are_counted_however_they_are_loaded(root: Path, trained: str, evaluated: str):
    digest = data_digest(load(root, f"data.loading={trained}"))
    same = load(root, f"data.loading={evaluated}")
    assert count_trained_on(digest, same, "val") == 0
    other = load_splits(
        load_config(None, [f"data.root={root}", "data.image_size=6", f"data.loading={evaluated}"]).data, 1
    )
    before = {same.train.images.where(i) for i in range(27)} if evaluated == "stream" else None
    found = count_trained_on(digest, other, "val")
    assert 0 < found <= 3
    if before is not None:
        assert other.val.origin is not None
        assert found == sum(other.val.origin.where(i) in before for i in range(3))


# --- progress


def test_what_is_read_is_counted(root: Path):
    seen: list[tuple[str, int, int]] = []

    @contextmanager
    def task(what: str, count: int) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        seen.append((what, count, sum(done)))

    def read(*settings: str) -> None:
        seen.clear()
        load_splits(load_config(None, [f"data.root={root}", *settings]).data, 0, task)

    read("data.loading=memory")
    assert seen == [
        ("looking for images in train", 3, 3),
        ("looking for images in test", 3, 3),
        ("looking at images", 30, 30),
        ("reading training images", 27, 27),
        ("reading validation images", 3, 3),
        ("reading test images", 6, 6),
    ]
    read("data.loading=stream", "data.image_size=6")
    assert [what for what, *_ in seen] == [
        "looking for images in train",
        "looking for images in test",
        "reading validation images",
        "reading test images",
    ]


def test_progress_is_plain_lines_where_there_is_no_terminal(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    out = io.StringIO()
    reporter = Reporter(console=Console(file=out, width=80))
    load_splits(load_config(None, [f"data.root={root}"]).data, 0, reporter.task)
    assert "looking for images in train: 1/3, ETA " in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_block_of_names_gives_each_back():
    names = ["a", "", "ünï", "b/c d.png", "\udcff"]  # the last: a byte that is no UTF-8
    block = Names(names)
    assert [block[i] for i in range(len(block))] == names
    assert torch.tensor([len(Names([]))]).item() == 0
