"""What tells a run's data from other data: kept in its checkpoints, compared when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_moe.data.image_set import ImageSet, Splits
from robust_moe.settings import shown

__all__ = ["FIXED_DATA", "count_trained_on", "data_differences", "data_digest"]

NOUNS = {"train": "training", "val": "validation", "test": "test"}

FIXED_DATA = ("class names", "image shape", "split", "number of training images", "number of validation images")
"""The keys of :func:`data_differences` on which the model or the order of the batches depends."""


def data_digest(splits: Splits) -> dict[str, Any]:
    """Plain types and tensors: class names, the shape [C, H, W] of an image, and of the images of each part, in order,
    a hash (int64 [N]: 8 bytes of BLAKE2b of the pixels) and the label (int32 [N]).

    Hashed is what the model sees, after decoding, resizing and poisoning, so every byte counts, and a decoder that
    rounds otherwise gives other data. Costs 0.4 s for CIFAR's 50,000 training images, and 12 bytes each in a file.
    """
    parts = {part.name: getattr(splits, part.name) for part in fields(splits)}
    return {
        "class_names": list(splits.train.class_names),
        "shape": list(splits.train.images.shape[1:]),
        **{name: {"images": _hashes(part), "labels": part.labels.int()} for name, part in parts.items()},
    }


def _hashes(part: ImageSet) -> Tensor:
    rows = part.images.contiguous().numpy()
    joined = b"".join(blake2b(row.data, digest_size=8).digest() for row in rows)
    return torch.from_numpy(np.frombuffer(joined, np.int64).copy())


def count_trained_on(digest: Mapping[str, Any], splits: Splits, part: str) -> int:
    """How many images of ``part`` of ``splits`` are training images of a :func:`data_digest` that are none of
    ``splits``: they changed sides since. Images that a data set has twice stay on both sides, and do not count."""
    if part == "train":
        return 0
    images = _hashes(getattr(splits, part)).numpy()
    seen = images[np.isin(images, digest["train"]["images"].numpy())]
    return int(np.isin(seen, _hashes(splits.train).numpy(), invert=True).sum()) if len(seen) else 0


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
            different = int((one[what] != other[what]).sum())
            if different:
                found[f"{noun} {what}"] = f"{of}{different} of {count} {noun} images differ"
    return found
