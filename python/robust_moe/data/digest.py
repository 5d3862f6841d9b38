"""What tells a run's data from other data: kept in its checkpoints, compared when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.image_set import ImageSet
from robust_moe.data.splits import Splits
from robust_moe.data.streamed import StreamedSet
from robust_moe.settings import shown

__all__ = ["FIXED_DATA", "count_trained_on", "data_differences", "data_digest"]

PIECE = 4_096  # streamed images that are decoded at a time
NOUNS = {"train": "training", "val": "validation", "test": "test"}

FIXED_DATA = ("class names", "image shape", "split", "number of training images", "number of validation images")
"""The keys of :func:`data_differences` on which the model or the order of the batches depends."""


PIXELS, FILES = "pixels", "files"  # what images are told apart by


def data_digest(splits: Splits) -> dict[str, Any]:
    """Plain types and tensors: class names, the shape [C, H, W] of an image, and of the images of each part, in order,
    a hash (int64 [N]) and the label (int32 [N]).

    Hashed (8 bytes of BLAKE2b) is what the model sees, after decoding, resizing and poisoning, so every byte counts,
    and a decoder that rounds otherwise gives other data. Costs 0.4 s for CIFAR's 50,000 training images, and 12 bytes
    each in a file. Where training images are streamed, ``"told_by"`` is ``"files"``: then the name and size of each
    image's file are hashed, of all parts. A file that changed and kept its size is not noticed.
    """
    parts = {part.name: getattr(splits, part.name) for part in fields(splits)}
    by = FILES if isinstance(splits.train, StreamedSet) else PIXELS
    return {
        "class_names": list(splits.train.class_names),
        "shape": list(splits.train.shape),
        "told_by": by,
        **{name: {"images": _hashes(part, by), "labels": part.labels.int()} for name, part in parts.items()},
    }


def _hashes(part: ImageSet | StreamedSet, by: str) -> Tensor:
    if by == FILES:
        return _identities(part)
    pieces = torch.arange(len(part)).split(PIECE) if isinstance(part, StreamedSet) else [None]
    found = [_pixel_hashes(part if piece is None else part.subset(piece)) for piece in pieces]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *found])


def _pixel_hashes(part: ImageSet | StreamedSet) -> Tensor:
    rows = part.decoded().images.contiguous().numpy()
    joined = b"".join(blake2b(row.data, digest_size=8).digest() for row in rows)
    return torch.from_numpy(np.frombuffer(joined, np.int64).copy())


def _identities(part: ImageSet | StreamedSet) -> Tensor:
    """Of images that were not read from files there are none."""
    origin = part.images if isinstance(part, StreamedSet) else part.origin
    return torch.zeros(0, dtype=torch.int64) if origin is None else origin.identities()


def count_trained_on(digest: Mapping[str, Any], splits: Splits, part: str) -> int:
    """How many images of ``part`` of ``splits`` are training images of a :func:`data_digest` that are none of
    ``splits``: they changed sides since. Images that a data set has twice stay on both sides, and do not count."""
    if part == "train":
        return 0
    by = digest.get("told_by", PIXELS)  # older ones do not say
    images = _hashes(getattr(splits, part), by).numpy()
    seen = images[np.isin(images, digest["train"]["images"].numpy())]
    return int(np.isin(seen, _hashes(splits.train, by).numpy(), invert=True).sum()) if len(seen) else 0


def data_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two :func:`data_digest`, a text each, such as ``{"training labels": "labels of 3 of 7000
    training images differ"}``; empty for the same data.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: ``old`` is no such digest.
    """
    for part in (old[name] for name in NOUNS):
        images, labels = part["images"], part["labels"]
        if images.ndim != 1 or images.shape != labels.shape or images.dtype != torch.int64:
            raise ValueError(f"data_digest: expected int64 [N] and N labels, got {images.dtype} {list(images.shape)}")
    found = {}
    names, others = old["class_names"], new["class_names"]
    if names != others:
        what = f"{len(names)} became {len(others)}"
        if len(names) == len(others):
            pairs = [(one, other) for one, other in zip(names, others, strict=True) if one != other]
            one, other = (shown(name) for name in pairs[0])
            what = f"{len(pairs)} of {len(names)} differ, {one} became {other}"
        found["class names"] = f"class names: {what}"
    if old["shape"] != new["shape"]:
        found["image shape"] = f"image shape: {old['shape']} became {new['shape']}"
    by, now_by = (digest.get("told_by", PIXELS) for digest in (old, new))
    if by != now_by:
        told = f"images were told apart by their {by}, and are by their {now_by} (data.loading)"
        found["told by"] = f"{told}: whether they are the same is not known"
    parts = list(NOUNS)
    both = [torch.cat([digest[name]["images"] for name in ("train", "val")]) for digest in (old, new)]
    if not torch.equal(*both) and torch.equal(*(hashes.sort().values for hashes in both)):
        found["split"] = "split: the training and validation images are the same, in another order or otherwise divided"
        parts = ["test"]
    for name in parts:
        noun, (one, other) = NOUNS[name], (old[name], new[name])
        count, now = len(one["labels"]), len(other["labels"])
        if count != now:
            found[f"number of {noun} images"] = f"number of {noun} images: {count} became {now}"
            continue
        for what, of in (("images", ""), ("labels", "labels of ")):
            if what == "images" and by != now_by:
                continue
            different = int((one[what] != other[what]).sum())
            if different:
                found[f"{noun} {what}"] = f"{of}{different} of {count} {noun} images differ"
    return found
