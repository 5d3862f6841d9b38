"""Parquet files: labels that are texts, rows read in any order, and what a row group that cannot be read costs."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from robust_moe.config import load_config
from robust_moe.data import DATASETS, DataError, ImageSet, StreamedSet, load_splits, make_loader
from robust_moe.data.parquet_images import ParquetImages, _Groups, open_parquet
from robust_moe.data.progress import silent

from .conftest import encoded

IMAGES = [encoded(seed) for seed in range(8)]


def write(root: Path, labels: pa.Array, test: pa.Array | None = None, images: list[bytes | None] = IMAGES) -> Path:
    for part, values in (("train", labels), ("test", labels if test is None else test)):
        table = pa.table({"image": pa.array(images[: len(values)], pa.binary()), "label": values})
        pq.write_table(table, root / f"{part}.parquet", row_group_size=3)
    return root


def load(root: Path, **settings: object) -> tuple[ImageSet, ImageSet]:
    return DATASETS["parquet"](root=str(root), **settings).build().load()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_are_classes_in_sorted_order(tmp_path: Path, kind: pa.DataType):
    train, test = load(write(tmp_path, pa.array(["b", "a", "c", "a"]).cast(kind), pa.array(["c", "a"]).cast(kind)))
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1, 0, 2, 0], [2, 0])


BAD = {
    "unknown": (
        ["cat", "dog"],
        ["dog", "dgo"],
        r"test\.parquet: row 1: expected a class of .*train\.parquet, got 'dgo'",
    ),
    "nearest": (["cat", "dog"], ["dog", "dogs"], r"got 'dogs'.*did you mean 'dog'"),
    "null": (["cat", "dog", None], None, r"train\.parquet: row 2: expected a label, got null"),
    "null in the test part": (["cat", "dog"], ["cat", None], r"test\.parquet: row 1: expected a label, got null"),
    "text among numbers": ([0, 1], ["0", "1"], r"test\.parquet: row 0: expected a whole number, as other labels are"),
}


@pytest.mark.parametrize("kind", BAD)
def test_labels_that_are_none_are_named(tmp_path: Path, kind: str):
    train, test, message = BAD[kind]
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, pa.array(train), None if test is None else pa.array(test)))


@pytest.mark.parametrize("labels", [[0, None, 1, 0, None], ["a", None, "b", "a", None]])
def test_rows_without_a_label_are_left_out_counted_and_named(tmp_path: Path, labels: list[int | str | None]):
    """As samples of tar shards are."""
    root = write(tmp_path, pa.array(labels), pa.array([label for label in labels if label is not None]))
    train, test = load(root, on_error="skip")
    assert (train.labels.tolist(), len(test)) == ([0, 1, 0], 3)
    whole, _ = load(write(tmp_path, pa.array([0, 1, 1, 0, 1])))
    assert torch.equal(train.images, whole.images[[0, 2, 3]])
    (note,) = train.notes
    assert note.startswith("left out 2 of 5 rows, which have no label (data.on_error=skip): ")
    assert note.endswith(f"train.parquet: row 1, {root}/train.parquet: row 4")
    with pytest.raises(DataError, match=r"train\.parquet: row 0: expected a label, got null"):
        load(write(tmp_path, pa.array([None, None], pa.int64()), pa.array([0])), on_error="skip")


def test_rows_are_read_in_any_order_before_and_after_they_are_copied(tmp_path: Path):
    file = write(tmp_path, pa.array([0, 1] * 4)) / "train.parquet"
    rows = ParquetImages(file, open_parquet(file), "image")
    order = torch.tensor([7, 0, 3, 3, 5])
    for images in (rows.select(order), rows.select(order).for_any_order(silent)):
        assert [images.read(i) for i in range(5)] == [IMAGES[i] for i in order]
        assert images.where(1) == f"{file}: row 0"
        assert torch.equal(images.identities(), rows.identities()[order])
        again = images.select(torch.tensor([4, 1]))
        assert [again.read(0), again.read(1)] == [IMAGES[5], IMAGES[0]]


def test_the_copy_goes_to_processes_that_are_started_anew(tmp_path: Path):
    """As workers are where the system does not fork."""
    file = write(tmp_path, pa.array([0, 1])) / "train.parquet"
    copied = ParquetImages(file, open_parquet(file), "image").for_any_order(silent)
    with multiprocessing.get_context("forkserver").Pool(1, _remember, (copied,)) as pool:
        assert pool.apply(_first) == IMAGES[0]


def _remember(images) -> None:
    global remembered
    remembered = images


def _first() -> bytes:
    return remembered.read(0)


def streamed(root: Path, *settings: str) -> StreamedSet:
    how = ("data.loading=stream", "data.workers=0", "data.validation_fraction=0", "data.image_size=6", *settings)
    images = load_splits(load_config(None, ["data.name=parquet", f"data.root={root}", *how]).data, 0).train
    assert isinstance(images, StreamedSet)
    return images


def test_a_null_row_is_named_and_skipped_when_streamed(tmp_path: Path):
    write(tmp_path, pa.array([0, 1] * 4), pa.array([0, 1]), images=[*IMAGES[:4], None, *IMAGES[5:]])
    with pytest.raises(DataError, match=r"train\.parquet: row 4: expected an image that decodes, got: null instead of"):
        list(make_loader(streamed(tmp_path), 4, device="cpu").epoch(0))
    batches = list(make_loader(streamed(tmp_path, "data.on_error=skip"), 4, device="cpu").epoch(0))
    assert torch.cat([batch.index for batch in batches]).tolist() == [0, 1, 2, 3, 5, 5, 6, 7]


def damage_second_group(file: Path) -> None:
    content = bytearray(file.read_bytes())
    at = content.index(IMAGES[4][20:60]) - 400  # of the second group; its header, before the values
    content[at : at + 380] = bytes(380)
    file.write_bytes(content)


def test_a_damaged_row_group_is_named(tmp_path: Path):
    damage_second_group(write(tmp_path, pa.array([0, 1] * 4)) / "train.parquet")
    with pytest.raises(
        DataError, match=r"train\.parquet: (row group 1: expected whole rows|row \d: expected an image)"
    ):
        load(tmp_path)


def test_a_damaged_row_group_is_skipped_when_streamed_and_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not more than its rows is lost, as of images in memory."""
    damage_second_group(write(tmp_path, pa.array([0, 1] * 4), pa.array([0, 1])) / "train.parquet")
    tried: list[int] = []
    read = _Groups._read
    monkeypatch.setattr(_Groups, "_read", lambda self, group: (tried.append(group), read(self, group))[1])
    images = streamed(tmp_path, "data.on_error=skip")
    said: list[str] = []
    batches = list(make_loader(images, 4, device="cpu", say=said.append).epoch(0))
    assert torch.cat([batch.index for batch in batches]).tolist() == [0, 1, 2, 6, 6, 6, 6, 7]
    assert "row group 1: expected whole rows" in said[0]
    assert tried.count(1) == 1
    with pytest.raises(DataError, match=r"train\.parquet: row group 1: expected whole rows, got: "):
        list(make_loader(streamed(tmp_path), 4, device="cpu").epoch(0))


def test_no_room_for_the_copy_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path, pa.array([0, 1] * 4)) / "train.parquet"

    def full(*args: object, **options: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(tempfile, "gettempdir", full)  # where no folder can be written to, it raises too
    with pytest.raises(DataError, match=r"expected room for the encoded images of .*TMPDIR chooses .*No space left"):
        ParquetImages(file, open_parquet(file), "image").for_any_order(silent)


def test_evaluations_of_streamed_sets_copy_nothing(tmp_path: Path, source: Callable[[str], Path], monkeypatch):
    """Only a loader needs the copy; an evaluation would wait for it for nothing."""
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    config = load_config(None, ["data.name=parquet", f"data.root={source('parquet')}", "data.loading=stream"]).data
    splits = load_splits(config, 0)
    assert splits.train.subset(torch.tensor([2, 1])).decoded().images.shape == (2, 3, 9, 12)
