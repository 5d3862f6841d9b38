"""Tar shards: which samples they have, and one clear error for each kind of shard or sample that is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from robust_moe.data import DATASETS, DataError, ImageSet
from robust_moe.data.tar_shards import Sample, read_shard

from .conftest import encoded, write_tar

PNG = encoded(0)


def load(root: Path, **settings: object) -> tuple[ImageSet, ImageSet]:
    return DATASETS["webdataset"](root=str(root), **settings).build().load()


def sample(key: str, label: object = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", PNG), (f"{key}.cls", str(label).encode())]


def write(root: Path, train: list[tuple[str, bytes]], test: list[tuple[str, bytes]] | None = None) -> Path:
    write_tar(root / "train-000.tar", train)
    write_tar(root / "val-000.tar", sample("t", 0) if test is None else test)
    return root


def test_samples_come_in_the_order_of_shards_and_members(tmp_path: Path):
    for number in (1, 0):
        write_tar(tmp_path / "train" / f"b-{number}.tar", sample(f"k{number}", number) + sample("a", number))
    write_tar(tmp_path / "val" / "x.tar", sample("v", 1))
    write_tar(tmp_path / "test" / "x.tar", sample("t", 0))
    train, test = load(tmp_path)
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert (train.name, train.class_names) == (f"webdataset:{tmp_path.name}", ("0", "1"))
    assert test.labels.tolist() == [0]  # test before val
    assert train.images.shape == (4, 3, 9, 9)  # 12 x 9 pixels, cut to a square


def test_what_belongs_to_a_sample(tmp_path: Path):
    """Members with the same name up to the first dot of the file's name, one after the other; folders count."""
    members = [
        ("a/x.y/1.seg.png", b"no image of a sample"),
        ("a/x.y/1.JPG", encoded(1, "JPEG")),
        ("a/x.y/1.txt", b"other"),
        ("a/x.y/1.cls", b" 1\n"),
        ("b/x.y/1.json", json.dumps({"label": 0, "caption": "1"}).encode()),
        ("b/x.y/1.png", PNG),
        ("b/.hidden.png", b""),
        ("2.png", PNG),
        ("2.cls", b"1"),
        ("2.json", json.dumps({"label": 0}).encode()),  # .cls is the plainer of the two
    ]
    write_tar(tmp_path / "x.tar", members)
    found = list(read_shard(tmp_path / "x.tar"))
    assert all(isinstance(one, Sample) for one in found)
    assert [(one.image.name, one.label) for one in found] == [("a/x.y/1.JPG", 1), ("b/x.y/1.png", 0), ("2.png", 1)]


def test_labels_that_are_names_are_sorted(tmp_path: Path):
    text = [("c.png", PNG), ("c.json", json.dumps({"label": "ape"}).encode())]
    train, test = load(write(tmp_path, sample("a", "bee") + sample("b", "ant") + text, sample("t", "bee")))
    assert train.class_names == ("ant", "ape", "bee")
    assert train.labels.tolist() == [2, 0, 1]
    assert test.labels.tolist() == [2]


BAD = {  # training members, test members, message
    "no label": ([("a.png", PNG), *sample("b")], None, r"train-000\.tar: a\.png: expected a label beside the image"),
    "no image": ([("a.cls", b"0"), *sample("b")], None, r"train-000\.tar: a\.cls: expected one image .*got 0 \(cls\)"),
    "two images": ([("a.png", PNG), ("a.jpg", PNG), ("a.cls", b"0")], None, r"expected one image .*, got 2 \(png, jpg"),
    "two samples of one key": (sample("a") + sample("a", 1), None, r"a\.png: expected each member of a sample once"),
    "empty label": ([("a.png", PNG), ("a.cls", b" ")], None, r"a\.cls: expected a class, got ' '"),
    "no JSON": ([("a.png", PNG), ("a.json", b"{")], None, r"a\.json: expected a JSON object with a class .*, got"),
    "JSON without a label": ([("a.png", PNG), ("a.json", b"{}")], None, r'under "label", got \'\{\}\''),
    "JSON with true": ([("a.png", PNG), ("a.json", b'{"label": true}')], None, r"expected a JSON object with a class"),
    "deep JSON": ([("a.png", PNG), ("a.json", b"[" * 10**5)], None, r"expected a JSON object with a class"),
    "a gap": (sample("a", 0) + sample("b", 2), None, r"train-000\.tar: b\.png: expected labels 0, 1, 2, .*, got 2"),
    "negative": (sample("a", 0) + sample("b", -1), None, r"b\.png: expected a label in 0\.\.0, got -1"),
    "huge": (sample("a", 0) + sample("b", 2**63), None, r"b\.png: expected a label < 2\*\*63"),
    "two kinds": (sample("a", 0) + sample("b", "x"), None, r"b\.png: expected a whole number, as other labels are"),
    "two kinds of parts": (sample("a", "x"), sample("t", 0), r"t\.png: expected the name of a class, as other labels"),
    "unknown class": (sample("a", "bee"), sample("t", "bees"), r"t\.png: expected a class of .*'bees'.*mean 'bee'"),
    "unknown number": (sample("a", 0), sample("t", 1), r"val-000\.tar: t\.png: expected a label in 0\.\.0, got 1"),
    "no image inside": (
        [("a.png", b"x"), ("a.cls", b"0")],
        None,
        r"train-000\.tar: a\.png: expected an image that dec",
    ),
    "nothing": ([], None, r"train-000\.tar: expected samples in 1 shards, got none"),
}


@pytest.mark.parametrize("kind", BAD)
def test_samples_that_are_none_are_named(tmp_path: Path, kind: str):
    train, test, message = BAD[kind]
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, train, test), image_size=6)


def test_samples_that_are_none_are_left_out_counted_and_named(tmp_path: Path):
    members = [("a.png", PNG), *sample("b"), ("c.cls", b"0"), ("d.png", b"x"), ("d.cls", b"0")]
    train, _ = load(write(tmp_path, members), on_error="skip", image_size=6)
    assert train.labels.tolist() == [0]
    left_out, images = train.notes
    assert left_out.startswith("left out 2 samples, which cannot be read (data.on_error=skip): ")
    assert "a.png: expected a label" in left_out and "c.cls: expected one image" in left_out
    assert "left out 1 of 2 images" in images and "d.png" in images


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 1536])
def test_a_truncated_shard_is_named_also_with_skip(tmp_path: Path, cut: int):
    """From the end: in the blocks of zeros that a tar ends with, in a member, between two members."""
    root = write(tmp_path, sample("a") + sample("b"))
    shard = root / "train-000.tar"
    data = shard.read_bytes().rstrip(b"\0")
    whole = data + bytes(-len(data) % 512)
    shard.write_bytes(whole[: len(whole) - cut + 100])
    for how in ("stop", "skip"):
        with pytest.raises(
            DataError, match=r"train-000\.tar: expected a whole tar file, (not compressed, got|got one)"
        ):
            load(root, on_error=how)


def test_a_shard_that_is_cut_after_it_was_indexed_names_the_image(tmp_path: Path):
    root = write(tmp_path, sample("a") + sample("b"))
    train, _ = DATASETS["webdataset"](root=str(root)).build().parts()
    (root / "train-000.tar").write_bytes((root / "train-000.tar").read_bytes()[:600])
    with pytest.raises(ValueError, match=r"bytes: the shard was cut since it was opened"):
        train.images.read(0)


def test_a_shard_that_is_no_tar_or_compressed_is_named(tmp_path: Path):
    root = write(tmp_path, sample("a"))
    shard = root / "train-000.tar"
    for content in (gzip.compress(shard.read_bytes()), b"no tar" * 200, b""):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=r"train-000\.tar: expected a whole tar file, not compressed, got: "):
            load(root)


@pytest.mark.parametrize("size", [-512, -(10**6), 2**62, 2**80])
def test_a_member_of_an_impossible_size_is_named(tmp_path: Path, size: int):
    """A header that goes back in the file would be read for ever; one beyond every file is no tarfile error."""
    root = write(tmp_path, sample("a") + sample("b"))
    shard = root / "train-000.tar"
    content = bytearray(shard.read_bytes())
    header = content.index(b"b.png")
    content[header + 124 : header + 136] = (256**12 + size if size < 0 else 2**95 + size).to_bytes(12, "big")
    content[header + 148 : header + 156] = b" " * 8  # what the sum is taken with
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-000\.tar: expected a whole tar file, not compressed, got: .+"):
        load(root)


MISSING = {  # names of shards, the one that is missing
    "between": (("train-0000.tar", "train-0003.tar", "train-0001.tar"), "train-0002.tar"),
    "of a count": (("train-00000-of-00003.tar", "train-00001-of-00003.tar"), "train-00002-of-00003.tar"),
    "the first of a count": (("train-1-of-2.tar",), "train-0-of-2.tar"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_shard_is_named(tmp_path: Path, kind: str):
    names, missing = MISSING[kind]
    for name in names:
        write_tar(tmp_path / name, sample("a"))
    write_tar(tmp_path / "test-0.tar", sample("t"))
    with pytest.raises(DataError, match=rf"{tmp_path / missing}: expected this shard, got none$"):
        load(tmp_path)


def test_shards_without_numbers_and_two_series_are_taken_as_they_are(tmp_path: Path):
    for name in ("x", "a-3", "a-4", "b-7"):
        write_tar(tmp_path / "train" / f"{name}.tar", sample("k"))
    (tmp_path / "train" / "._a-3.tar").write_bytes(b"what macOS puts beside a file")
    write_tar(tmp_path / "test" / "t.tar", sample("t"))
    assert len(load(tmp_path)[0]) == 4


def test_folders_without_shards_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: expected a folder of tar shards, got none$"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected tar shards train/\*\.tar or train-\*\.tar, got none$"):
        load(tmp_path)
    write_tar(tmp_path / "train-0.tar", sample("a"))
    with pytest.raises(DataError, match=r"expected tar shards test or val/\*\.tar or test or val-\*\.tar, got none$"):
        load(tmp_path)


def test_an_image_is_read_where_the_index_says(tmp_path: Path):
    pictures = [encoded(seed) for seed in range(3)]
    members = [pair for i, data in enumerate(pictures) for pair in ((f"{i}.png", data), (f"{i}.cls", b"0"))]
    train, _ = DATASETS["webdataset"](root=str(write(tmp_path, members))).build().parts()
    assert [train.images.read(i) for i in range(3)] == pictures
    backwards = train.images.select(torch.tensor([2, 0]))
    assert [backwards.read(i) for i in range(2)] == [pictures[2], pictures[0]]
    assert backwards.where(0) == f"{tmp_path / 'train-000.tar'}: 2.png"
    assert torch.equal(backwards.identities(), train.images.identities()[[2, 0]])
