"""Random resized crops: torchvision's rectangles, and on images in memory what cutting and scaling one by one gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop

from robust_moe.data import AugmentConfig, apply_augmentation, draw_augmentation
from robust_moe.data.resized_crop import ATTEMPTS, crop_box, draw_resized_crops, resize_boxes
from robust_moe.settings import ConfigError

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
DRAWS = 4_000


def boxes(height: int, width: int, scale=SCALE, ratio=RATIO, seed: int = 0) -> torch.Tensor:
    rows = draw_resized_crops(DRAWS, scale, ratio, torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([crop_box(row, height, width, ratio) for row in rows])


def theirs(height: int, width: int, scale=SCALE, ratio=RATIO) -> torch.Tensor:
    torch.manual_seed(1)
    image = torch.empty(3, height, width)
    return torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(DRAWS)])


# sizes that are square, oblong, so narrow that attempts fail, and that all fail
@pytest.mark.parametrize(("height", "width"), [(224, 224), (375, 500), (40, 300), (5, 500), (500, 5)])
def test_rectangles_are_distributed_as_torchvision_s(height: int, width: int):
    """Two samples of 4,000: their distribution functions differ by more than 0.0436 once in 1,000 times (Kolmogorov and
    Smirnov); these two are always the same."""
    ours, other = boxes(height, width).double(), theirs(height, width).double()
    assert (ours[:, 0] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] >= 0).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    quantities = {
        "area": lambda b: b[:, 2] * b[:, 3],
        "shape": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "centre": lambda b: b[:, 0] + b[:, 2] / 2 - b[:, 1] - b[:, 3] / 2,
    }
    for name, of in quantities.items():
        one, two = of(ours).sort().values, of(other).sort().values
        points = torch.cat([one, two]).unique()
        shares = [torch.searchsorted(values, points, right=True) / DRAWS for values in (one, two)]
        assert (shares[0] - shares[1]).abs().max() < 0.0436, name


def test_where_no_attempt_fits_the_largest_central_rectangle_of_an_allowed_shape_is_taken():
    numbers = [1.0, 1.0] * ATTEMPTS + [0.5, 0.5]  # a square of the whole area
    assert crop_box(numbers, 10, 400, RATIO) == (0, 193, 10, 13)
    assert crop_box(numbers, 400, 10, RATIO) == (193, 0, 13, 10)
    assert crop_box([4.0, 1.0] * ATTEMPTS + [0.5, 0.5], 100, 110, RATIO) == (0, 0, 100, 110)


def test_a_corner_may_lie_at_every_place_that_leaves_the_rectangle_inside():
    def place(down: float, right: float) -> tuple[int, int, int, int]:
        return crop_box([0.25, 1.0] * ATTEMPTS + [down, right], 8, 8, RATIO)

    assert place(0.0, 1 - 1e-12) == (0, 4, 4, 4)
    assert place(1 - 1e-12, 0.0) == (4, 0, 4, 4)


def test_a_batch_equals_its_images_one_by_one():
    images = torch.rand(64, 3, 11, 13, generator=torch.Generator().manual_seed(0))
    chosen = boxes(11, 13)[:64]
    got = resize_boxes(images, chosen)
    for image, (top, left, h, w), one in zip(images, chosen.tolist(), got, strict=True):
        cut = image[None, :, top : top + h, left : left + w]
        expected = F.interpolate(cut, size=(11, 13), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(one, expected, atol=2e-6, rtol=0)  # two lerps in another order
    whole = torch.tensor([[0, 0, 11, 13]]).expand(64, -1)
    assert torch.equal(resize_boxes(images, whole), images)


def test_in_memory_images_are_cropped_where_they_lie():
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    config = AugmentConfig(flip=True, resized_crop_scale=(0.2, 0.5))
    draw = draw_augmentation(config, 6, 8, 8, torch.Generator().manual_seed(3))
    rectangles = torch.tensor([crop_box(row, 8, 8, RATIO) for row in draw.resized.tolist()])
    expected = resize_boxes(images, rectangles)
    expected[draw.flip] = expected[draw.flip].flip(-1)
    assert torch.equal(apply_augmentation(images, draw), expected)
    share = rectangles[:, 2] * rectangles[:, 3] / 64
    assert (share > 0.1).all() and (share < 0.6).all()


def test_the_other_changes_are_drawn_the_same_with_and_without():
    def draw(**more):
        config = AugmentConfig(flip=True, crop_padding=1, color_jitter=0.2, cutout=2, **more)
        return draw_augmentation(config, 9, 8, 8, torch.Generator().manual_seed(3))

    without, cropped = draw(), draw(resized_crop_scale=(0.2, 1.0))
    assert without.resized is None and cropped.resized is not None
    for name in ("flip", "crop", "color", "cutout"):
        assert torch.equal(getattr(without, name), getattr(cropped, name))


def test_ranges_that_are_none_are_refused():
    for name, value in (("scale", (0.5,)), ("scale", (1.0, 0.5)), ("ratio", ()), ("ratio", (2.0, 1.0))):
        with pytest.raises(ConfigError, match=rf"resized_crop_{name}: expected the least and the largest value"):
            AugmentConfig(**{f"resized_crop_{name}": value})
    with pytest.raises(ConfigError, match=r"resized_crop_scale"):
        AugmentConfig(resized_crop_scale=(0.5, 1.5))
    assert math.isclose(AugmentConfig().resized_crop_ratio[0], 3 / 4)
