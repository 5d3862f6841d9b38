"""Sources of encoded images (folders, Parquet): pixels and labels, and one clear error for each kind of bad data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from robust_moe.data import DATASETS, DataError, ImageSet


def picture(seed: int, size: int = 6, mode: str = "RGB") -> Image.Image:
    shape = (size, size) if mode == "L" else (size, size, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def chw(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).reshape(*image.size[::-1], -1).permute(2, 0, 1)


def load(name: str, root: Path | None = None, **kwargs) -> tuple[ImageSet, ImageSet]:
    where = {} if root is None else {"root": str(root)}
    return DATASETS[name](**where, **kwargs).build().load()


# --- folders of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 1)):
        for c, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                picture(10 * c + i).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    return tmp_path


def test_image_folder_keeps_pixels_and_classes(folder: Path):
    train, test = load("image_folder", folder, image_size=6)
    assert train.class_names == ("ant", "bee")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(train.images[4], chw(picture(11)))
    assert test.labels.tolist() == [0, 1]


def test_image_folder_cuts_the_centre_of_an_oblong_image(folder: Path):
    wide = Image.new("RGB", (12, 6), (255, 0, 0))
    wide.paste((0, 255, 0), (3, 0, 9, 6))  # the central square
    wide.save(folder / "train" / "bee" / "1.png")
    train, _ = load("image_folder", folder, image_size=6)
    assert torch.equal(train.images[4], chw(Image.new("RGB", (6, 6), (0, 255, 0))))


def test_image_folder_errors_name_the_path(folder: Path):
    bad = folder / "train" / "bee" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match="expected an image that decodes") as caught:
        load("image_folder", folder, image_size=6)
    assert str(bad) in str(caught.value)
    (folder / "val" / "bees").mkdir()
    picture(0).save(bad)
    with pytest.raises(DataError, match=r"bees: expected a class of .*did you mean 'bee'"):
        load("image_folder", folder, image_size=6)
    (folder / "train" / "cat").mkdir()
    (folder / "val" / "bees").rmdir()
    with pytest.raises(DataError, match="cat: expected images"):
        load("image_folder", folder, image_size=6)
    with pytest.raises(DataError, match="nowhere: expected a folder"):
        load("image_folder", folder / "nowhere", image_size=6)


def test_sixteen_bits_a_channel_are_refused(folder: Path):
    deep = folder / "train" / "ant" / "0.png"
    Image.fromarray(np.full((6, 6), 40000, dtype=np.uint16)).save(deep)
    with pytest.raises(DataError, match="expected an image of 8 bits a channel, got mode 'I;16'"):
        load("image_folder", folder, image_size=6)


# --- Parquet


def write_parquet(file: Path, images: list, labels: list, *, image_column: str = "img", metadata=None) -> None:
    cells = [None if data is None else {"bytes": data, "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image_column: pa.array(cells, kind), "label": pa.array(labels)})
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=4)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", [encode(picture(i)) for i in range(10)], [i % 3 for i in range(10)])
    write_parquet(tmp_path / "test.parquet", [encode(picture(90 + i)) for i in range(3)], [2, 1, 0])
    return tmp_path


def test_parquet_decodes_every_row(parquet: Path):
    train, test = load("parquet", parquet)
    assert torch.equal(train.images, torch.stack([chw(picture(i)) for i in range(10)]))
    assert train.labels.tolist() == [i % 3 for i in range(10)]
    assert test.labels.tolist() == [2, 1, 0]
    assert train.class_names == ("0", "1", "2")


def test_parquet_reads_grey_jpegs_plain_binary_and_class_names(parquet: Path):
    pictures = [picture(i, 8, "L") for i in range(4)]
    data = [encode(image, "JPEG") for image in pictures]
    hub = {"info": {"features": {"label": {"names": ["cat", "dog", "emu"], "_type": "ClassLabel"}}}}
    for part in ("train", "test"):
        table = pa.table({"image": pa.array(data, pa.binary()), "label": pa.array([0, 1, 0, 1])})
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(hub)}), parquet / f"{part}.parquet")
    train, _ = load("parquet", parquet)
    assert train.class_names == ("cat", "dog", "emu")  # a class without images keeps its place
    assert train.images.shape == (4, 1, 8, 8)
    assert torch.equal(train.images[3], chw(Image.open(io.BytesIO(data[3]))))


def test_parquet_with_one_colour_image_among_grey_ones_is_colour(parquet: Path):
    images = [encode(picture(0, 6, "L")), encode(picture(1))]
    write_parquet(parquet / "train.parquet", images, [0, 1])
    write_parquet(parquet / "test.parquet", images, [0, 1])
    train, _ = load("parquet", parquet)
    assert torch.equal(train.images[0], chw(picture(0, 6, "L")).expand(3, 6, 6))
    assert torch.equal(train.images[1], chw(picture(1)))


def test_threads_decode_large_images_in_order(parquet: Path):
    data = [encode(picture(i, 100)) for i in range(300)]  # above the size from which several threads work
    write_parquet(parquet / "train.parquet", data, [i % 2 for i in range(300)])
    write_parquet(parquet / "test.parquet", data[:1], [0])
    train, _ = load("parquet", parquet)
    assert all(torch.equal(train.images[i], chw(picture(i, 100))) for i in range(300))


GOOD = [encode(picture(i)) for i in range(5)]
JPEG = encode(picture(0, 32), "JPEG")
BAD_ROWS = {  # images, labels, expected in the message
    "not an image": ([*GOOD[:3], b"garbage", GOOD[4]], [0, 1, 0, 1, 0], "row 3: expected an image that decodes"),
    "truncated JPEG": ([JPEG, JPEG, JPEG[: len(JPEG) // 2]], [0, 1, 0], "row 2: expected an image that decodes"),
    "null image": ([*GOOD[:4], None], [0, 1, 0, 1, 0], "row 4: .*null"),
    "other size": ([*GOOD[:4], JPEG], [0, 1, 0, 1, 0], "row 4: expected 6x6 pixels, as the first image, got 32x32"),
    "negative label": (GOOD, [0, 1, -1, 1, 0], r"row 2: expected a label in 0..1, got -1"),
    "label beyond a gap": (GOOD, [0, 1, 7, 1, 0], r"row 2: expected labels 0, 1, 2, .*no image has 2\), got 7"),
    "no label 0": (GOOD, [1, 2, 1, 2, 1], r"row 0: expected labels 0, 1, 2, .*no image has 0\), got 1"),
    "null label": (GOOD, [0, 1, 0, None, 0], "row 3: expected a label, got null"),
    "label of another kind": (GOOD, [0.5] * 5, "column label: expected integers or strings, got double"),
    "no rows": ([], pa.array([], pa.int64()), "expected at least one row"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_parquet_names_the_file_and_row(parquet: Path, kind: str):
    images, labels, message = BAD_ROWS[kind]
    write_parquet(parquet / "train.parquet", images, labels)
    write_parquet(parquet / "test.parquet", GOOD[:2], [0, 1])
    with pytest.raises(DataError, match=message) as caught:
        load("parquet", parquet)
    assert str(parquet / "train.parquet") in str(caught.value)


def test_parquet_refuses_a_test_label_that_training_does_not_know(parquet: Path):
    write_parquet(parquet / "test.parquet", GOOD[:2], [0, 3])
    with pytest.raises(DataError, match=r"test.parquet: row 1: expected a label in 0..2, got 3"):
        load("parquet", parquet)


def test_parquet_refuses_missing_truncated_and_foreign_files(parquet: Path):
    file = parquet / "test.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"test.parquet: expected a whole Parquet file"):
        load("parquet", parquet)
    write_parquet(file, GOOD[:1], [0], image_column="photo")
    with pytest.raises(DataError, match="expected a column img or image, got photo, label"):
        load("parquet", parquet)
    file.unlink()
    with pytest.raises(DataError, match=r"test.parquet: expected a file, got none"):
        load("parquet", parquet)
