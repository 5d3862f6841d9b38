"""Parquet files with encoded images, in the layout of data hubs: ROOT/train.parquet and ROOT/test.parquet.

Columns: ``img`` or ``image``, a struct with the field ``bytes`` (or plain binary), one encoded image a row; ``label``
or ``fine_label``, an integer. Class names are read from the hub's metadata in the file where it has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_moe.content import items, text
from robust_moe.data.dataset import DATASETS, FolderDataSet
from robust_moe.data.decode import EncodedConfig, decode_images
from robust_moe.data.image_set import DataError, ImageSet, check_labels, expect_room, import_extra

__all__ = ["Parquet"]

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
BYTES_OF_ROW = 64  # at least, in memory
ROWS = 256  # read at a time
NAMES = items(text, 1, 2**17)  # of classes


@DATASETS.register("parquet")
class Parquet(FolderDataSet):
    """The images of the two files, in their order; without ``data.image_size`` all must be of one size."""

    @dataclass(frozen=True, kw_only=True)
    class Config(EncodedConfig):
        """Settings of Parquet files."""

    config: Config
    files = "train.parquet and test.parquet"

    def load(self) -> tuple[ImageSet, ImageSet]:
        files = [self.root / f"{part}.parquet" for part in ("train", "test")]
        tables = [_read(file) for file in files]
        columns = [_label_column(table, file) for table, file in zip(tables, files, strict=True)]
        class_names = _class_names(tables[0], columns[0], files[0])
        labels = [_labels(table, column, file) for table, column, file in zip(tables, columns, files, strict=True)]
        for values, file in zip(labels, files, strict=True):
            check_labels(values, len(class_names), file)
        name = f"parquet:{self.root.resolve().name}"
        train, test = (
            _images(table, file, values, class_names, name, self.config)
            for table, file, values in zip(tables, files, labels, strict=True)
        )
        if train.images.shape[1:] != test.images.shape[1:]:
            raise DataError(
                f"{files[1]}: expected images of {list(train.images.shape[1:])} (channels, height, width), as "
                f"{files[0]}, got {list(test.images.shape[1:])}"
            )
        return train, test


def _read(file: Path) -> Any:
    parquet = import_extra("pyarrow.parquet", "pyarrow", "data.name=parquet")
    arrow = import_extra("pyarrow", "pyarrow", "data.name=parquet")
    if not file.is_file():
        raise DataError(f"{file}: expected a file, got none")
    try:
        source = parquet.ParquetFile(file)
        found = source.metadata
        groups = sum(found.row_group(group).total_byte_size for group in range(found.num_row_groups))
        expect_room(max(groups, found.num_rows * BYTES_OF_ROW), f"{file}: {found.num_rows:,} rows")
        batches, held = [], 0
        for batch in source.iter_batches(batch_size=ROWS):  # what the file says of its size may be wrong
            held += batch.nbytes
            expect_room(held, f"{file}: {found.num_rows:,} rows")
            batches.append(batch)
        table = arrow.Table.from_batches(batches, schema=source.schema_arrow)
    except DataError:
        raise
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError and more for a truncated file
        raise DataError(f"{file}: expected a whole Parquet file, got: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{file}: expected at least one row, got none")
    return table


def _column(table: Any, names: tuple[str, ...], file: Path) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise DataError(f"{file}: expected a column {' or '.join(names)}, got {', '.join(table.column_names)}")


def _label_column(table: Any, file: Path) -> str:
    types = import_extra("pyarrow.types", "pyarrow", "data.name=parquet")
    name = _column(table, LABEL_COLUMNS, file)
    kind = table.schema.field(name).type
    if not types.is_integer(kind):
        raise DataError(f"{file}: column {name}: expected integers, got {kind}")
    return name


def _labels(table: Any, column: str, file: Path) -> Tensor:
    values = table.column(column).to_pylist()
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"{file}: row {row}: expected a label, got null")
        if value >= 2**63:
            raise DataError(f"{file}: row {row}: expected a label < 2**63, got {value}")
    return torch.tensor(values, dtype=torch.int64)


def _class_names(table: Any, column: str, file: Path) -> tuple[str, ...]:
    """From the hub's metadata, or else ``"0"``, ``"1"``, ... as many as there are labels, which must leave no gap."""
    try:
        hub = json.loads((table.schema.metadata or {})[b"huggingface"])
        names = hub["info"]["features"][column]["names"]
        NAMES(names, "names")
        return tuple(names)
    except (KeyError, RecursionError, TypeError, ValueError):  # most writers leave none
        pass
    labels = _labels(table, column, file)
    present = torch.unique(labels[labels >= 0])  # ascending
    gaps = torch.nonzero(present != torch.arange(len(present))).flatten()
    if len(gaps):  # a damaged label would otherwise make a model of a million classes
        row = int(torch.nonzero(labels == present[gaps[0]])[0])
        raise DataError(
            f"{file}: row {row}: expected labels 0, 1, 2, ... without a gap (no row has {int(gaps[0])}), got "
            f"{int(labels[row])}"
        )
    return tuple(str(c) for c in range(len(present)))


def _images(
    table: Any, file: Path, labels: Tensor, class_names: tuple[str, ...], name: str, config: EncodedConfig
) -> ImageSet:
    types = import_extra("pyarrow.types", "pyarrow", "data.name=parquet")
    column = _column(table, IMAGE_COLUMNS, file)
    kind = table.schema.field(column).type
    chunks = table.column(column).chunks
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        chunks = [chunk.field("bytes") for chunk in chunks]
    elif not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(f"{file}: column {column}: expected a struct with the field bytes, or binary, got {kind}")

    encoded = [value for chunk in chunks for value in chunk]  # views of the table, not copies

    def read(i: int) -> bytes:
        data = encoded[i].as_py()
        if data is None:
            raise ValueError("null instead of the encoded image")
        return data

    images, kept, notes = decode_images(
        len(encoded), read, lambda i: f"{file}: row {i}", config.image_size, config.on_error
    )
    return ImageSet(images, labels[kept], class_names, name, notes)
