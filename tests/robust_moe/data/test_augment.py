"""Augmentation: the batch at once equals image by image; each change does what it says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from robust_moe.data import (
    AugmentConfig,
    AugmentDraw,
    DataError,
    Digits,
    apply_augmentation,
    draw_augmentation,
    load_splits,
)
from robust_moe.settings import ConfigError

EVERYTHING = AugmentConfig(flip=True, crop_padding=3, color_jitter=0.4, cutout=5)


def batch(channels: int = 3, count: int = 24, height: int = 9, width: int = 12) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(5))


def draw(config: AugmentConfig, images: torch.Tensor, seed: int = 0) -> AugmentDraw:
    return draw_augmentation(config, len(images), *images.shape[2:], torch.Generator().manual_seed(seed))


def one_by_one(image: torch.Tensor, d: AugmentDraw, i: int) -> torch.Tensor:
    """The same change of image i, by slices and torchvision's functions."""
    _, height, width = image.shape
    if d.crop is not None:
        top, left = d.crop[i].tolist()
        image = F.pad(image, [d.padding] * 4)[:, top : top + height, left : left + width]
    if d.flip is not None and d.flip[i]:
        image = image.flip(-1)
    if d.color is not None:
        brightness, contrast, saturation = d.color[i].tolist()
        image = TF.adjust_contrast(TF.adjust_brightness(image, brightness), contrast)
        if image.shape[0] == 3:
            image = TF.adjust_saturation(image, saturation)
    if d.cutout is not None:
        row, column = (d.cutout[i] - d.side // 2).tolist()
        image = image.clone()
        fill = torch.tensor(d.fill)[:, None, None] if d.fill else 0
        image[:, max(row, 0) : row + d.side, max(column, 0) : column + d.side] = fill
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(flip=True),
        AugmentConfig(crop_padding=4),
        AugmentConfig(color_jitter=0.5),
        AugmentConfig(cutout=4),  # an even side, too
        AugmentConfig(cutout=40),  # larger than the image: all zero
        EVERYTHING,
    ],
    ids=["flip", "crop", "jitter", "cutout", "large cutout", "everything"],
)
def test_a_batch_equals_its_images_one_by_one(config: AugmentConfig, channels: int):
    images = batch(channels)
    original = images.clone()
    d = draw(config, images)
    got = apply_augmentation(images, d)
    expected = torch.stack([one_by_one(image, d, i) for i, image in enumerate(images)])
    # pixels are moved, not computed, unless colours change; torchvision's grey weights have one digit less for red
    tolerance = 2e-4 if config.color_jitter else 0.0
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    assert torch.equal(images, original)  # the input stays
    assert got.min() >= 0
    assert got.max() <= 1


def test_a_square_is_filled_with_a_value_per_channel():
    images = batch()
    config = AugmentConfig(cutout=4, cutout_fill=(0.25, 0.5, 0.75))
    d = draw(config, images)
    got = apply_augmentation(images, d)
    assert torch.equal(got, torch.stack([one_by_one(image, d, i) for i, image in enumerate(images)]))
    changed = (got != images).any(1)
    assert changed.any()
    assert (got.movedim(1, -1)[changed] == torch.tensor(config.cutout_fill)).all()
    with pytest.raises(ValueError, match=r"augment.cutout_fill: expected a value for each of 1 channels, or \[\], got"):
        apply_augmentation(batch(channels=1), d)
    with pytest.raises(DataError, match=r"data.augment.cutout_fill: expected a value for each of 1 channels of digits"):
        load_splits(Digits.Config(augment=config), 0)  # before anything is trained
    with pytest.raises(ConfigError, match=r"cutout_fill: expected values in \[0, 1\], got \[123.0\]"):
        AugmentConfig(cutout_fill=(123.0,))


def test_nothing_is_on_by_default():
    images = batch()
    assert torch.equal(apply_augmentation(images, draw(AugmentConfig(), images)), images)


def test_flipping_twice_gives_the_image_back():
    images = batch()
    d = draw(AugmentConfig(flip=True), images)
    once = apply_augmentation(images, d)
    assert torch.equal(apply_augmentation(once, d), images)
    assert torch.equal(once[~d.flip], images[~d.flip])
    assert torch.equal(once[d.flip], images[d.flip].flip(-1))


def test_draws_cover_their_range_evenly():
    config = AugmentConfig(flip=True, crop_padding=2, color_jitter=0.3, cutout=3)
    count = 20_000
    d = draw_augmentation(config, count, 7, 5, torch.Generator().manual_seed(1))
    deviations = 5  # a fair draw is beyond 5 standard deviations once in 1.7 million

    def even(values: torch.Tensor, levels: int) -> None:
        share = torch.bincount(values, minlength=levels) / count
        assert len(share) == levels
        assert ((share - 1 / levels).abs() < deviations * (1 / levels / count) ** 0.5).all()

    even(d.flip.long(), 2)
    for axis, side in enumerate((7, 5)):
        even(d.crop[:, axis], 5)
        even(d.cutout[:, axis], side)
    assert d.color.min() >= 0.7
    assert d.color.max() <= 1.3
    for column in d.color.unbind(1):
        even(((column - 0.7) / 0.6 * 10).long().clamp(0, 9), 10)
    assert torch.corrcoef(d.color.T).fill_diagonal_(0).abs().max() < deviations / count**0.5


def test_one_change_is_drawn_the_same_whatever_else_is_on():
    images = batch()
    everything = draw(EVERYTHING, images)
    assert torch.equal(draw(AugmentConfig(flip=True), images).flip, everything.flip)
    assert torch.equal(draw(AugmentConfig(cutout=5), images).cutout, everything.cutout)


def test_grey_images_have_no_saturation():
    images = batch(channels=1)
    d = draw(AugmentConfig(color_jitter=0.5), images)
    other = d._replace(color=d.color * torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(apply_augmentation(images, d), apply_augmentation(images, other))


def test_padding_as_wide_as_the_image_is_refused():
    with pytest.raises(ValueError, match=r"augment.crop_padding: expected < 9 pixels"):
        draw(AugmentConfig(crop_padding=9), batch())
