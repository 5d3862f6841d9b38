"""Small sets of encoded images, the same pictures in every form that a source reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")
TRAIN, TEST = 10, 2  # images of a class


def encoded(seed: int, kind: str = "PNG") -> bytes:
    """A picture of 12 x 9 pixels."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def pictures(part: str) -> list[tuple[int, bytes]]:
    """(label, encoded image) of a part, by class."""
    count, first = (TRAIN, 0) if part == "train" else (TEST, 1000)
    return [(label, encoded(first + 100 * label + i)) for label in range(len(CLASSES)) for i in range(count)]


def write_folder(root: Path) -> None:
    for part in ("train", "test"):
        for number, (label, data) in enumerate(pictures(part)):
            path = root / part / CLASSES[label] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def write_parquet(root: Path) -> None:
    root.mkdir()
    for part in ("train", "test"):
        found = pictures(part)
        images = pa.array([{"bytes": data, "path": None} for _, data in found])
        table = pa.table({"image": images, "label": pa.array([label for label, _ in found])})
        pq.write_table(table, root / f"{part}.parquet", row_group_size=4)


def write_tar(shard: Path, members: Iterable[tuple[str, bytes]]) -> None:
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def write_webdataset(root: Path) -> None:
    """Shards of seven samples, which two or three classes share."""
    for part in ("train", "test"):
        found = pictures(part)
        for shard, begin in enumerate(range(0, len(found), 7)):
            members = []
            for number, (label, data) in enumerate(found[begin : begin + 7], begin):
                members.append((f"{number:05}.png", data))
                if number % 2:
                    members.append((f"{number:05}.json", json.dumps({"label": label, "of": "x"}).encode()))
                else:
                    members.append((f"{number:05}.cls", f"{label}\n".encode()))
            write_tar(root / part / f"{part}-{shard:04}.tar", members)


WRITERS: dict[str, Callable[[Path], None]] = {
    "image_folder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
}


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """``source(NAME)``: the folder of the data set of that name, with 30 training and 6 test images."""

    def write(name: str) -> Path:
        WRITERS[name](tmp_path / name)
        return tmp_path / name

    return write
