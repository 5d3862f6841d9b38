"""Parquet files with encoded images, in the layout of data hubs: ROOT/train.parquet and ROOT/test.parquet.

Columns: ``img`` or ``image``, a struct with the field ``bytes`` (or plain binary), one encoded image a row; ``label``
or ``fine_label``, an integer or a text. Names of integers are read from the hub's metadata in the file where it has
them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robust_moe.content import items, text
from robust_moe.data.dataset import DATASETS
from robust_moe.data.encoded import EncodedImages, EncodedPart
from robust_moe.data.encoded_source import EncodedDataSet
from robust_moe.data.image_set import DataError, expect_room, import_extra, listed
from robust_moe.data.labels import FoundLabels, resolve_labels
from robust_moe.data.parquet_images import ParquetImages, open_parquet

__all__ = ["Parquet"]

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label")
BYTES_OF_ROW = 64  # at least, in memory
NAMES = items(text, 1, 2**17)  # of classes


@dataclass(frozen=True, eq=False)
class _Labelled:
    """The rows of a file, or those of them that have a label."""

    images: EncodedImages
    labels: FoundLabels
    notes: tuple[str, ...]


@DATASETS.register("parquet")
class Parquet(EncodedDataSet):
    """The images of the two files, in their order; without ``data.image_size`` all must be of one size."""

    @dataclass(frozen=True, kw_only=True)
    class Config(EncodedDataSet.Config):
        """Settings of Parquet files."""

    config: Config
    files = "train.parquet and test.parquet"

    def parts(self) -> tuple[EncodedPart, EncodedPart]:
        files = [self.root / f"{part}.parquet" for part in ("train", "test")]
        sources = [open_parquet(file) for file in files]
        columns = [_label_column(source, file) for source, file in zip(sources, files, strict=True)]
        parts = [
            self._labelled(
                file, _labels(source, column, file), ParquetImages(file, source, _image_column(source, file))
            )
            for source, column, file in zip(sources, columns, files, strict=True)
        ]
        names = _hub_names(sources[0], columns[0])
        class_names, *labels = resolve_labels(parts[0].labels, parts[1].labels, names)
        name = f"parquet:{self.root.resolve().name}"
        train, test = (
            EncodedPart(part.images, values, class_names, name, file, part.notes)
            for file, part, values in zip(files, parts, labels, strict=True)
        )
        return train, test

    def _labelled(self, file: Path, values: list[Any], images: EncodedImages) -> _Labelled:
        """The rows of a file that are used."""
        missing = [row for row, value in enumerate(values) if value is None]
        notes: tuple[str, ...] = ()
        if self.config.on_error == "skip" and 0 < len(missing) < len(values):
            what = f"left out {len(missing)} of {len(values)} rows, which have no label (data.on_error=skip)"
            notes = (f"{what}: {listed([images.where(row) for row in missing])}",)
            images = images.select(torch.tensor([row for row, value in enumerate(values) if value is not None]))
            values = [value for value in values if value is not None]
        return _Labelled(images, FoundLabels(values, images.where, file), notes)


def _column(source: Any, names: tuple[str, ...], file: Path) -> str:
    for name in names:
        if name in source.schema_arrow.names:
            return name
    raise DataError(f"{file}: expected a column {' or '.join(names)}, got {', '.join(source.schema_arrow.names)}")


def _label_column(source: Any, file: Path) -> str:
    types = import_extra("pyarrow.types", "pyarrow", "data.name=parquet")
    name = _column(source, LABEL_COLUMNS, file)
    kind = source.schema_arrow.field(name).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_integer(values) or types.is_string(values) or types.is_large_string(values)):
        raise DataError(f"{file}: column {name}: expected integers or strings, got {kind}")
    return name


def _labels(source: Any, column: str, file: Path) -> list[Any]:
    rows = source.metadata.num_rows
    expect_room(rows * BYTES_OF_ROW, f"{file}: {rows:,} rows")
    try:
        values: list[Any] = source.read(columns=[column]).column(column).to_pylist()
    except Exception as error:
        raise DataError(f"{file}: expected a whole Parquet file, got: {error}") from error
    return values


def _hub_names(source: Any, column: str) -> tuple[str, ...] | None:
    """The classes' names in the hub's metadata; most writers leave none."""
    try:
        hub = json.loads((source.schema_arrow.metadata or {})[b"huggingface"])
        names = hub["info"]["features"][column]["names"]
        NAMES(names, "names")
        return tuple(names)
    except (KeyError, RecursionError, TypeError, ValueError):
        return None


def _image_column(source: Any, file: Path) -> str:
    """The column of encoded images, or the field in it that has them."""
    types = import_extra("pyarrow.types", "pyarrow", "data.name=parquet")
    name = _column(source, IMAGE_COLUMNS, file)
    kind = source.schema_arrow.field(name).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{name}.bytes"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return name
    raise DataError(f"{file}: column {name}: expected a struct with the field bytes, or binary, got {kind}")
