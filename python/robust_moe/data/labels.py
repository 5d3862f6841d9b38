"""Classes out of the labels that images come with: whole numbers, or names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_moe.data.image_set import DataError
from robust_moe.settings import hint, shown

__all__ = ["FoundLabels", "resolve_labels"]


class FoundLabels(NamedTuple):
    """The labels of a part as its files have them."""

    values: Sequence[Any]  # of each image an int or a str
    where: Callable[[int], str]  # how an error names image i
    place: object  # the part's file or folder


def resolve_labels(
    train: FoundLabels, test: FoundLabels, names: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """(class names, training labels, test labels), the labels int64 positions in the names.

    Whole numbers count the classes: ``names``, or else ``"0"``, ``"1"``, ... as many as the training images have, which
    must leave no gap. Texts name them; the classes are those of the training images, sorted.

    Raises:
        DataError: no label, one of another kind than the others, or one of no class; names the image.
    """
    if train.values and isinstance(train.values[0], str):
        classes = tuple(sorted({value for value in train.values if isinstance(value, str)}))
        label_of = {name: label for label, name in enumerate(classes)}
        return classes, _named(train, label_of, train.place), _named(test, label_of, train.place)
    numbers = [_whole(part) for part in (train, test)]
    classes = names if names is not None else _counted(numbers[0], train)
    for part, labels in zip((train, test), numbers, strict=True):
        bad = torch.nonzero((labels < 0) | (labels >= len(classes))).flatten()
        if len(bad):
            i = int(bad[0])
            raise DataError(f"{part.where(i)}: expected a label in 0..{len(classes) - 1}, got {shown(part.values[i])}")
    return classes, numbers[0], numbers[1]


def _named(part: FoundLabels, label_of: dict[str, int], place: object) -> Tensor:
    for i, value in enumerate(part.values):
        if value is None:
            raise DataError(f"{part.where(i)}: expected a label, got null")
        if not isinstance(value, str):
            raise DataError(f"{part.where(i)}: expected the name of a class, as other labels are, got {shown(value)}")
        if value not in label_of:
            near = hint(value, label_of)
            raise DataError(f"{part.where(i)}: expected a class of {place}, got {shown(value)}{near}")
    return torch.tensor([label_of[value] for value in part.values], dtype=torch.int64)


def _whole(part: FoundLabels) -> Tensor:
    for i, value in enumerate(part.values):
        if value is None:
            raise DataError(f"{part.where(i)}: expected a label, got null")
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{part.where(i)}: expected a whole number, as other labels are, got {shown(value)}")
        if not -(2**63) <= value < 2**63:
            raise DataError(f"{part.where(i)}: expected a label < 2**63, got {value}")
    return torch.tensor(part.values, dtype=torch.int64)


def _counted(labels: Tensor, part: FoundLabels) -> tuple[str, ...]:
    present = torch.unique(labels[labels >= 0])  # ascending
    gaps = torch.nonzero(present != torch.arange(len(present))).flatten()
    if len(gaps):  # a damaged label would otherwise make a model of a million classes
        i = int(torch.nonzero(labels == present[gaps[0]])[0])
        raise DataError(
            f"{part.where(i)}: expected labels 0, 1, 2, ... without a gap (no image has {int(gaps[0])}), got "
            f"{int(labels[i])}"
        )
    return tuple(str(c) for c in range(len(present)))
