"""Image files from anyone: which are read, which are passed over, and what is refused before memory is taken."""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from robust_moe.config import load_config
from robust_moe.data import DATASETS, DataError, ImageSet, image_set, load_splits, read_idx
from robust_moe.dry_run import training_facts


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path, "PNG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two images each; image i of train has the colour i."""
    for part in ("train", "test"):
        for number, name in enumerate(("ant/0", "ant/1", "bee/0", "bee/1")):
            save(tmp_path / "data" / part / f"{name}.png", number)
    return tmp_path / "data"


def load(root: Path, **settings: object) -> tuple[ImageSet, ImageSet]:
    return DATASETS["image_folder"](root=str(root), image_size=4, **settings).build().load()


def link_of_a_file(train: Path) -> None:
    save(train.parent.parent / "elsewhere" / "x.png", 9)
    os.symlink(train.parent.parent / "elsewhere" / "x.png", train / "ant" / "00.png")


def link_of_a_folder(train: Path) -> None:
    save(train.parent.parent / "elsewhere" / "below" / "x.png", 9)
    os.symlink(train.parent.parent / "elsewhere", train / "ant" / "more")
    os.symlink(train.parent.parent / "elsewhere", train / "bee" / "more")  # the same twice is no loop


def link_of_a_class(train: Path) -> None:
    save(train.parent.parent / "elsewhere" / "x.png", 9)
    os.symlink(train.parent.parent / "elsewhere", train / "cat")


def folders_between_files(train: Path) -> None:
    """A folder's own images come first, whatever the names; then those of the folders in the order of their paths."""
    for number, name in enumerate(("0", "0-a/1", "0/2", "0/b/3", "zz/4", "2", "A/5")):
        save(train / "ant" / f"{name}.png", 10 + number)


def a_folder_that_ends_as_an_image(train: Path) -> None:
    save(train / "ant" / "x.png" / "0.png", 9)


def other_names(train: Path) -> None:
    for name in ("0.PNG", "0.Jpeg", "0.gif", "0.txt", "0png", "notes", "0.png.bak", "é.png"):
        save(train / "ant" / name, 9)
    save(train / "loose.png")


TREES = {
    tree.__name__: tree
    for tree in (
        link_of_a_file,
        link_of_a_folder,
        link_of_a_class,
        folders_between_files,
        a_folder_that_ends_as_an_image,
        other_names,
    )
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_read_as_torchvision_reads_it(root: Path, name: str):
    TREES[name](root / "train")
    train, theirs = load(root)[0], ImageFolder(str(root / "train"))
    assert list(train.class_names) == theirs.classes
    assert train.labels.tolist() == theirs.targets
    assert len(train) > (4 if name != "other_names" else 6)
    for image, (pixels, _) in zip(train.images, theirs, strict=True):  # in the same order
        assert torch.equal(image, torch.from_numpy(np.array(pixels)).permute(2, 0, 1))


def test_hidden_names_are_passed_over_at_every_depth_and_counted(root: Path):
    train = root / "train"
    for name in (".hidden/0.png", "ant/._0.png", "ant/.ipynb_checkpoints/0.png", "bee/deep/.x/y/0.png", ".DS_Store"):
        save(train / name)
    save(train / "bee" / "deep" / "2.png")
    (train / "ant" / "notes.txt").write_text("")
    (train / "loose.png").write_text("")
    found, _ = load(root)
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert found.notes == (
        f"{train}: passed over 5 hidden names: .DS_Store, .hidden, ant/._0.png, ant/.ipynb_checkpoints, bee/deep/.x",
        f"{train}: passed over 1 files whose names do not end as an image's: ant/notes.txt",
        f"{train}: passed over 1 files that lie in no class: loose.png",
    )


def test_what_was_passed_over_is_said_once_by_the_splits_and_the_dry_run(root: Path):
    save(root / "train" / "ant" / "._0.png")
    settings = ["data=image_folder", f"data.root={root}", "data.image_size=4", "data.validation_fraction=0.5"]
    config = load_config(None, [*settings, "model.blocks=[1]", "model.width=4", "run.batch_size=2", "method=standard"])
    note = f"{root / 'train'}: passed over 1 hidden names: ant/._0.png"
    loading = "training images lie in memory: decoded they take 0.0 GiB, no more than half of this machine's "
    first, last = load_splits(config.data, 0).notes
    assert first == note
    assert last.startswith(loading)
    assert ("data", note) in training_facts(config)


def damage(root: Path) -> dict[str, Path]:
    train = root / "train"
    os.symlink(train / "ant", train / "ant" / "again")
    os.symlink(train / "nowhere", train / "bee" / "broken.png")
    os.mkfifo(train / "bee" / "pipe.png")
    (train / "bee" / "text.png").write_text("no image")
    return {
        "loop": train / "ant" / "again",
        **{name: train / "bee" / f"{name}.png" for name in ("broken", "pipe", "text")},
    }


SAID = {
    "loop": r"again: expected a folder that can be read, got: a link to a folder that it is in, /.*/train/ant",
    "broken": r"broken\.png: expected an image that decodes, got: .*No such file",
    "pipe": r"pipe\.png: expected an image that decodes, got: no ordinary file",
    "text": r"text\.png: expected an image that decodes, got: no format that Pillow knows",
}


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
@pytest.mark.parametrize("kind", SAID)
def test_what_cannot_be_read_is_named(root: Path, kind: str):
    for name, path in damage(root).items():
        if name != kind:
            path.unlink()
    with pytest.raises(DataError, match=SAID[kind]):
        load(root)


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
def test_what_cannot_be_read_is_left_out_counted_and_named(root: Path):
    damage(root)
    train, test = load(root, on_error="skip")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]  # each image has kept its label
    assert test.notes == ()
    folders, images = train.notes
    assert folders.startswith(f"{root / 'train'}: left out 1 folders, which cannot be read (data.on_error=skip): ")
    assert images.startswith("left out 3 of 7 images, which cannot be read (data.on_error=skip): ")
    for path in damage_names(root):
        assert str(path) in folders + images


def damage_names(root: Path) -> list[Path]:
    return [
        root / "train" / "ant" / "again",
        *((root / "train" / "bee" / f"{n}.png") for n in ("broken", "pipe", "text")),
    ]


def test_where_nothing_can_be_read_skipping_is_an_error(root: Path):
    for path in (root / "train").rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(
        DataError, match=r"expected an image that can be read, got none of 4, the first of them: .*ant/0"
    ):
        load(root, on_error="skip")


def test_folders_without_an_end_are_refused(root: Path):
    deep = root / "train" / "ant" / "/".join("d" * 110)
    deep.mkdir(parents=True)
    with pytest.raises(DataError, match="expected a folder that can be read, got: a folder in more than 100 others"):
        load(root)


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it has so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (10_000, 10_000, "10000x10000 pixels, more than 67,108,864"),
        (1, 2**27, "1x134217728 pixels, more than 67,108,864"),
        (2**20, 2**20, "decompression bomb"),  # Pillow's own limit
    ],
)
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(root: Path, width: int, height: int, words: str):
    (root / "train" / "ant" / "1.png").write_bytes(bomb(width, height))
    with pytest.raises(DataError, match=rf"ant/1\.png: expected an image that decodes, got: .*{words}"):
        load(root)


def test_images_beyond_memory_are_refused_before_it_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_set, "physical_memory", lambda: 4 * 3 * 4 * 4 - 1.0)
    with pytest.raises(DataError, match=r"4 images of 4x4 pixels: expected at most .* 191 bytes, got 192"):
        load(root)
    with pytest.raises(DataError, match=r"data\.image_size=9 of 4 images: expected at most .* 191 bytes, got 324"):
        image_set.resize(torch.zeros(4, 1, 3, 3, dtype=torch.uint8), 9)


# --- IDX


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


@pytest.mark.parametrize("shape", [(0, 28, 28), (5, 0, 28), (5, 28, 0)])
def test_an_idx_file_without_a_pixel_is_refused(tmp_path: Path, shape: tuple[int, ...]):
    (tmp_path / "x").write_bytes(idx(shape, b""))
    with pytest.raises(DataError, match=r"x: expected at least one value, got shape"):
        read_idx(tmp_path / "x", 3)


def test_a_gzip_stream_is_unpacked_no_further_than_its_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "x.gz"
    with gzip.open(file, "wb") as stream:
        stream.write(idx((2,), b"ab"))
        for _ in range(64):
            stream.write(bytes(2**20))
    read, real = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or real(self, size))
    with pytest.raises(DataError, match=r"x\.gz: expected 10 bytes for shape \[2\], got more: trailing bytes"):
        read_idx(file, 1)
    assert sum(read) == 8 + 2 + 1


def test_an_idx_file_that_promises_terabytes_takes_no_memory_for_them(tmp_path: Path):
    (tmp_path / "x").write_bytes(idx((2**20, 2**20, 3), b"abc"))
    with pytest.raises(DataError, match=r"x: expected 3298534883344 bytes .*, got 19: truncated"):
        read_idx(tmp_path / "x", 3)


# --- Parquet


def parquet(
    root: Path, labels: pa.Array, metadata: dict[str, str] | None = None, images: list[bytes] | None = None
) -> Path:
    root.mkdir(exist_ok=True)
    save(root / "x.png", 7)
    data = images or [(root / "x.png").read_bytes()] * len(labels)
    table = pa.table({"image": pa.array(data, pa.binary()), "label": labels}).replace_schema_metadata(metadata)
    for part in ("train", "test"):
        pq.write_table(table, root / f"{part}.parquet")
    return root


def load_parquet(root: Path, **settings: object) -> tuple[ImageSet, ImageSet]:
    return DATASETS["parquet"](root=str(root), **settings).build().load()


def test_a_label_beyond_64_bits_is_named(tmp_path: Path):
    root = parquet(tmp_path, pa.array([0, 2**63], pa.uint64()))
    with pytest.raises(DataError, match=rf"train\.parquet: row 1: expected a label < 2\*\*63, got {2**63}"):
        load_parquet(root)


DEEP = "[" * 10**5
METADATA = {
    "no JSON": "{",
    "deep": DEEP,
    "a list": "[1]",
    "names of numbers": json.dumps({"info": {"features": {"label": {"names": [1, 2]}}}}),
    "names of a text": json.dumps({"info": {"features": {"label": {"names": "ab"}}}}),
    "no names": json.dumps({"info": {"features": {"label": {"names": []}}}}),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_that_names_no_classes_are_not_used(tmp_path: Path, kind: str):
    train, _ = load_parquet(parquet(tmp_path, pa.array([0, 1]), {"huggingface": METADATA[kind]}))
    assert train.class_names == ("0", "1")


def test_parquet_leaves_out_what_cannot_be_read(tmp_path: Path):
    save(tmp_path / "x.png", 7)
    good = (tmp_path / "x.png").read_bytes()
    root = parquet(tmp_path, pa.array([0, 1, 1]), images=[good, b"no image", good])
    train, _ = load_parquet(root, on_error="skip")
    assert (train.labels.tolist(), len(train.images)) == ([0, 1], 2)
    assert train.notes[0].startswith("left out 1 of 3 images, which cannot be read (data.on_error=skip): ")
    assert f"{root / 'train.parquet'}: row 1: expected an image that decodes" in train.notes[0]


def test_a_parquet_file_of_more_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = parquet(tmp_path, pa.array([0, 1]))
    monkeypatch.setattr(image_set, "physical_memory", lambda: 100.0)
    with pytest.raises(DataError, match=r"train\.parquet: 2 rows: expected at most this machine's memory of 100 bytes"):
        load_parquet(root)
