"""Splits, limits and channel statistics."""

from __future__ import annotations

import pytest
import torch

from robust_moe.data import (
    CHANNEL_STATISTICS,
    DataError,
    Digits,
    ImageSet,
    channel_statistics,
    load_splits,
    stratified_split,
)
from robust_moe.data.image_set import stratified_counts


def numbered(labels: list[int], name: str = "numbers") -> ImageSet:
    """Image i is filled with the value i, so that it can be recognised anywhere."""
    values = torch.arange(len(labels), dtype=torch.uint8)
    images = values[:, None, None, None].expand(-1, 1, 2, 2).clone()
    return ImageSet(images, torch.tensor(labels), tuple("abcdef"[: max(labels) + 1]), name)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_stratified_counts_sum_up_and_keep_shares(count: int):
    labels = torch.tensor([0] * 61 + [1] * 30 + [3] * 9)  # class 2 has no image
    counts = stratified_counts(labels, count)
    assert sum(counts) == count
    for got, size in zip(counts, (61, 30, 0, 9), strict=True):
        assert abs(got - size * count / 100) < 1
        assert got <= size


def test_stratified_split_is_a_partition_and_depends_on_the_seed():
    labels = torch.tensor([0, 1, 2] * 40 + [0] * 60)
    rest, held = stratified_split(labels, 45, seed=3)
    assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(180))
    assert torch.bincount(labels[held]).tolist() == [25, 10, 10]
    assert torch.equal(held, stratified_split(labels, 45, seed=3)[1])
    assert not torch.equal(held, stratified_split(labels, 45, seed=4)[1])


def test_validation_comes_from_training_and_test_stays(monkeypatch: pytest.MonkeyPatch):
    train, test = numbered([0, 0, 1, 1] * 10), numbered([0, 1] * 5)
    monkeypatch.setattr(Digits, "load", lambda self: (train, test))
    splits = load_splits(Digits.Config(validation_fraction=0.2), seed=1)
    assert (len(splits.train), len(splits.val)) == (32, 8)
    values = torch.cat([splits.train.images, splits.val.images])[:, 0, 0, 0]
    assert values.sort().values.tolist() == list(range(40))
    assert torch.bincount(splits.val.labels).tolist() == [4, 4]
    assert torch.equal(splits.test.images, test.images)
    limited = load_splits(Digits.Config(validation_fraction=0.2, train_limit=6, test_limit=4), seed=1)
    assert torch.equal(limited.val.images, splits.val.images)  # limits come after the split
    assert torch.bincount(limited.train.labels).tolist() == [3, 3]
    assert limited.test.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert len(load_splits(Digits.Config(validation_fraction=0.0), seed=1).val) == 0


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_validation_share_without_images_on_one_side_is_refused(fraction: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Digits, "load", lambda self: (numbered([0, 1] * 5), numbered([0])))
    with pytest.raises(DataError, match=r"data.validation_fraction: expected a share that leaves"):
        load_splits(Digits.Config(validation_fraction=fraction), seed=0)


def test_head_is_balanced_even_when_the_set_is_sorted_by_class():
    images = numbered([0] * 8 + [1] * 4)
    assert images.head(6).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 8, 9]
    assert images.head(12) is images
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        images.head(0)


def test_image_set_refuses_what_does_not_fit():
    good = numbered([0, 1])
    with pytest.raises(ValueError, match="images: expected uint8"):
        ImageSet(good.images.float(), good.labels, good.class_names, "x")
    with pytest.raises(ValueError, match=r"labels: expected int64 \[2\]"):
        ImageSet(good.images, good.labels[:1], good.class_names, "x")
    with pytest.raises(ValueError, match=r"labels: expected 0..0, got 0..1"):
        ImageSet(good.images, good.labels, ("only",), "x")


def test_channel_statistics_equal_those_of_the_pixels():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 2, 5, 7), dtype=torch.uint8, generator=generator)
    images[:, 1] = 51  # a constant channel
    mean, std = channel_statistics(ImageSet(images, torch.zeros(9, dtype=torch.int64), ("a",), "mine"))
    pixels = images[:, 0].double() / 255
    assert mean == pytest.approx((pixels.mean().item(), 0.2), abs=1e-12)
    assert std == pytest.approx((pixels.std(correction=0).item(), 1 / 255), abs=1e-12)
    assert channel_statistics(numbered([0], name="fashion_mnist")) == CHANNEL_STATISTICS["fashion_mnist"]
    with pytest.raises(ValueError, match="at least one"):
        channel_statistics(numbered([0]).subset(torch.zeros(0, dtype=torch.int64)))
