"""BatchLoader: order, resuming, ranks and augmentation are functions of (seed, epoch, batch number) alone."""

from __future__ import annotations

import pytest
import torch

from robust_moe.data import AugmentConfig, Batch, BatchLoader, ImageSet
from robust_moe.data.loader import _fits

AUGMENT = AugmentConfig(flip=True, crop_padding=2, color_jitter=0.3, cutout=2)


def image_set(count: int = 23) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 5, tuple("abcde"), "random")


def loader(images: ImageSet | None = None, batch_size: int = 4, **kwargs) -> BatchLoader:
    return BatchLoader(image_set() if images is None else images, batch_size, device="cpu", **kwargs)


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_comes_exactly_once_with_its_label(shuffle: bool):
    images = image_set()
    batches = list(loader(images, shuffle=shuffle).epoch(2))
    index = torch.cat([b.index for b in batches])
    assert torch.equal(index.sort().values, torch.arange(23))
    assert torch.equal(index, torch.arange(23)) != shuffle
    for b in batches:
        assert b.images.dtype == torch.float32
        assert torch.equal(b.images, images.images[b.index].float() / 255)
        assert torch.equal(b.labels, images.labels[b.index])


def test_drop_last_leaves_out_only_the_incomplete_batch():
    whole, cut = loader(shuffle=True), loader(shuffle=True, drop_last=True)
    assert (len(whole), len(cut)) == (6, 5)
    batches = list(whole.epoch(0))
    assert [len(b.labels) for b in batches] == [4, 4, 4, 4, 4, 3]
    assert_equal(list(cut.epoch(0)), batches[:5])


@pytest.mark.parametrize("start", [0, 1, 4, 6])  # from the start, in the middle, at the end
def test_a_resumed_epoch_is_bit_equal(start: int):
    whole = list(loader(shuffle=True, augment=AUGMENT, seed=7).epoch(3))
    resumed = list(loader(shuffle=True, augment=AUGMENT, seed=7).epoch(3, start_batch=start))
    assert_equal(resumed, whole[start:])


def test_epochs_and_seeds_differ_in_order_and_in_what_is_drawn():
    def first(seed: int, epoch: int, shuffle: bool) -> Batch:
        return next(loader(shuffle=shuffle, augment=AUGMENT, seed=seed).epoch(epoch))

    assert_equal([first(1, 0, True)], [first(1, 0, True)])
    for seed, epoch in ((2, 0), (1, 1)):
        assert not torch.equal(first(1, 0, True).index, first(seed, epoch, True).index)
        assert not torch.equal(first(1, 0, False).images, first(seed, epoch, False).images)  # the same images, in order


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = list(loader(shuffle=True, augment=AUGMENT).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert_equal(list(loader(shuffle=True, augment=AUGMENT).epoch(0)), one)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 9)])
def test_ranks_together_make_the_batches_of_one_process(world_size: int, batch_size: int):
    """With augmentation too: what happens to an image does not depend on how many ranks share the work."""
    single = list(loader(batch_size=batch_size, shuffle=True, augment=AUGMENT).epoch(1))
    ranks = [
        loader(batch_size=batch_size, shuffle=True, augment=AUGMENT, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(single)}
    for number, parts in enumerate(zip(*(rank.epoch(1) for rank in ranks), strict=True)):
        whole = single[number]
        for r, part in enumerate(parts):
            assert_equal([part], [Batch(*(v[r::world_size] for v in whole))])


def test_images_move_to_a_gpu_only_if_they_leave_half_of_its_memory(monkeypatch: pytest.MonkeyPatch):
    images = image_set().images  # 2484 bytes
    for free, fits in ((4967, False), (4968, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert _fits(images, torch.device("cuda")) is fits
    assert _fits(images, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_gives_the_batches_of_the_cpu(resident: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("robust_moe.data.loader._fits", lambda images, device: resident)
    moved = AugmentConfig(flip=True, crop_padding=2, cutout=2)  # moves pixels, so that equal means bit-equal
    expected = list(loader(shuffle=True, augment=moved).epoch(0))
    got = list(BatchLoader(image_set(), 4, device="cuda", shuffle=True, augment=moved).epoch(0))
    assert all(part.device.type == "cuda" for b in got for part in b)
    assert_equal([Batch(*(part.cpu() for part in b)) for b in got], expected)


BAD = {
    "rank": ({"rank": 2, "world_size": 2}, "rank: expected 0 <= rank < world_size=2, got 2"),
    "no batch": ({"batch_size": 0}, "batch_size: expected a positive multiple"),
    "uneven ranks": ({"batch_size": 4, "world_size": 3}, "batch_size: expected a positive multiple of world_size=3"),
    "a rank without images": ({"batch_size": 22, "world_size": 2}, "expected an image for each of 2 ranks"),
    "an epoch without batches": ({"batch_size": 24, "drop_last": True}, "batch_size: expected <= 23 images"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_named(kind: str):
    arguments, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        loader(**arguments)


def test_bad_positions_are_refused_at_once():
    with pytest.raises(ValueError, match=r"start_batch: expected 0..6, got 7"):
        loader().epoch(0, start_batch=7)
    with pytest.raises(ValueError, match="epoch: expected >= 0, got -1"):
        loader().epoch(-1)


def test_an_empty_set_has_no_batches():
    empty = image_set().subset(torch.zeros(0, dtype=torch.int64))
    assert list(loader(empty).epoch(0)) == []


def test_an_alternating_flip_shows_both_sides_of_every_image_in_two_epochs():
    images = image_set()

    def mirrored(seed: int, epoch: int, **kwargs) -> list[bool]:
        """By image: whether it came mirrored; every image here differs from its mirror image."""
        augment = AugmentConfig(flip=True, flip_order="alternating")
        found = {}
        for batch in loader(images, shuffle=True, augment=augment, seed=seed, **kwargs).epoch(epoch):
            for image, index in zip(batch.images, batch.index.tolist(), strict=True):
                whole = images.images[index].float() / 255
                found[index] = torch.equal(image, whole.flip(-1))
                assert found[index] or torch.equal(image, whole)
        return [found[index] for index in range(len(images))]

    first = mirrored(0, 0)
    assert 0 < sum(first) < len(images)
    assert mirrored(0, 1) == [not flipped for flipped in first]
    assert mirrored(0, 2) == first == mirrored(0, 0, batch_size=7)  # of the image, not of the batch
    assert mirrored(1, 0) != first


def test_alternating_flips_leave_the_other_changes_alone():
    config = AugmentConfig(flip=True, crop_padding=2, flip_order="alternating")
    plain = AugmentConfig(flip=False, crop_padding=2)
    alternating, crops = (list(loader(augment=augment, seed=4).epoch(1)) for augment in (config, plain))
    for one, two in zip(alternating, crops, strict=True):
        same = [torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(one.images, two.images, strict=True)]
        assert all(same) and not torch.equal(one.images, two.images)
