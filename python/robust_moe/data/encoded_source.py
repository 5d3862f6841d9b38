"""The base of data sets of encoded images: what is decoded into memory, and what is streamed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

from robust_moe.data.dataset import MOST_SIDE, FolderDataSet, Read
from robust_moe.data.decode import open_image
from robust_moe.data.decode_all import Decoded, Headers, Side, decode_all, read_headers, spread
from robust_moe.data.encoded import EncodedImages, EncodedPart
from robust_moe.data.image_set import DataError, ImageSet, Labelled, expect_room, physical_memory
from robust_moe.data.streamed import StreamedSet
from robust_moe.settings import setting

__all__ = ["EncodedDataSet", "found_image_size"]

LOOKED_AT = 10_000  # headers, spread evenly over the training images, that size and channels are found out from
MOST_FOUND_SIDE = 224  # pixels: what networks for photographs take; more only where it is asked for
MEMORY_SHARE = 0.5  # of this machine's memory: what training images may take with data.loading=auto
T = TypeVar("T", bound=ImageSet | StreamedSet)
CURES = {
    "training": "data.loading=stream decodes them while it trains",
    "validation": "a smaller data.validation_fraction holds out fewer",
    "test": "data.test_limit takes fewer",
}


def found_image_size() -> Any:
    """The setting ``image_size`` of a data set that finds out the size of its images."""
    return setting(
        None,
        f"side that images are scaled to cover and cut to the centre of; null: the median of the training images' "
        f"shorter sides, at most {MOST_FOUND_SIDE}",
        unit="pixels",
        at_least=1,
        at_most=MOST_SIDE,
    )


class EncodedDataSet(FolderDataSet):
    """A data set of JPEG, PNG or other encoded images.

    Training images are decoded into memory or, with ``data.loading=stream``, when a batch asks for them. Validation
    and test images are measured again and again, and always lie in memory. What ``data.train_limit`` and
    ``data.test_limit`` leave out is not decoded.

    The size of images and whether all are grey are found out from headers: of at most 10,000 training images, spread
    evenly over them, where a size is to be found out or the images are streamed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(FolderDataSet.Config):
        """Settings of sources of encoded images."""

        on_error: Literal["stop", "skip"] = setting(
            "stop",
            "an image that cannot be read, or a row or sample without a label: stop; skip: leave it out, and count and "
            "name it (of streamed images, the next one that can be read takes its place in the batch)",
        )
        loading: Literal["memory", "stream", "auto"] = setting(
            "auto",
            "training images: memory (all decoded at the start), stream (decoded when a batch asks for them), or auto, "
            "which streams those that would take more than half of this machine's memory",
        )
        workers: int | None = setting(
            None,
            "processes of each training process that decode streamed images; 0: none but itself; null: 1 on the CPU, "
            "which the training needs, and on a GPU one for each processor, at most 8",
            unit="processes",
            at_least=0,
            at_most=256,
        )

    config: Config
    always_colour: ClassVar[bool] = False  # three channels also where all images that are read are grey

    @abstractmethod
    def parts(self) -> tuple[EncodedPart, EncodedPart]:
        """All training and all test images, of the same classes.

        Raises:
            DataError: a missing, truncated or inconsistent file; names it, what was expected and what came.
        """

    def load(self) -> tuple[ImageSet, ImageSet]:
        parts = self.parts()
        side, notes = self._side(parts[0])
        found = [self._decoded(part, side, name) for part, name in zip(parts, ("training", "test"), strict=True)]
        channels = 1 if not self.always_colour and all(decoded.grey for decoded in found) else 3
        train, test = (_image_set(part, decoded, channels) for part, decoded in zip(parts, found, strict=True))
        return _with_notes(train, notes), test

    def read(self, whole: Labelled, chosen: Sequence[Labelled]) -> Read:
        names = ("training", "validation", "test")
        train, *measured = cast(Sequence[EncodedPart], chosen)
        side, notes = self._side(cast(EncodedPart, whole))
        streamed, why = self._streamed(len(train), side)
        self._expect_room(measured if streamed else [train, *measured], side)
        found = [] if streamed else [self._decoded(train, side, names[0])]
        found += [self._decoded(part, side, name) for part, name in zip(measured, names[1:], strict=True)]
        grey = not self.always_colour and all(decoded.grey for decoded in found)
        if streamed and grey:
            grey = self._headers(train.images).grey
        channels = 1 if grey else 3
        kept = torch.arange(len(train)) if streamed else found[0].kept
        images = self._stream(train, side, grey) if streamed else _image_set(train, found[0], channels)
        val, test = (_image_set(*each, channels) for each in zip(measured, found[-2:], strict=True))
        return Read(_with_notes(images, (*notes, *why)), val, test, kept)

    def _expect_room(self, parts: Sequence[EncodedPart], side: Side) -> None:
        """Raise :class:`DataError` where parts that fit into memory one by one do not together, before any is read."""
        sizes = [len(part) * 3 * side.height * side.width for part in parts]
        if max(sizes) <= physical_memory():
            what = f"{self.root}: {sum(map(len, parts)):,} images of {side.width}x{side.height} pixels"
            expect_room(sum(sizes), what, cure=", ".join(CURES[name] for name in list(CURES)[-len(parts) :]))

    def _streamed(self, count: int, side: Side) -> tuple[bool, tuple[str, ...]]:
        """Whether so many training images are streamed, and why, where that was not asked for."""
        loading = self.config.loading
        if loading != "auto":
            return loading == "stream", ()
        size, memory = count * 3 * side.height * side.width, physical_memory()
        streamed = size > MEMORY_SHARE * memory
        took = f"decoded they take {size / 2**30:,.1f} GiB, {'more' if streamed else 'no more'} than half of this"
        how = "are streamed" if streamed else "lie in memory"
        return streamed, (f"training images {how}: {took} machine's {memory / 2**30:,.1f} GiB (data.loading=auto)",)

    def _stream(self, part: EncodedPart, side: Side, grey: bool) -> StreamedSet:
        config = self.config
        return StreamedSet(
            part.images,
            part.labels,
            part.class_names,
            part.name,
            side,
            grey,
            on_error=config.on_error,
            workers=config.workers,
            notes=part.notes,
        )

    def _side(self, part: EncodedPart) -> tuple[Side, tuple[str, ...]]:
        """The size of the images, found out from those of ``part``, and what is to be said of it."""
        size = self.config.image_size
        if size is not None:
            return Side(size, size, scaled=True), ()
        if not self.finds_size:
            width, height = self._first_size(part.images)
            return Side(height, width, scaled=False), ()
        sizes = self._headers(part.images).sizes
        if not len(sizes):  # decoding says what is wrong with them
            return Side(1, 1, scaled=True), ()
        size = min(int(sizes.min(1).values.median()), MOST_FOUND_SIDE)
        if bool((sizes == size).all()):
            return Side(size, size, scaled=True), ()
        (low, high) = (" x ".join(map(str, sizes[place].tolist())) for place in _extremes(sizes))
        got = f"of {low} pixels" if low == high else f"from {low} to {high} pixels"
        how = f"scaled and cut to {size} x {size}; data.image_size sets the side"
        return Side(size, size, scaled=True), (f"{part.place}: images {got}, {how}",)

    def _first_size(self, images: EncodedImages) -> tuple[int, int]:
        """Width and height of the first image whose header can be read."""
        for i in range(len(images)):
            try:
                width, height = open_image(images, i).size
            except DataError:
                if self.config.on_error == "stop":
                    raise
                continue
            return width, height
        return 1, 1  # decoding says what is wrong with them

    def _headers(self, images: EncodedImages) -> Headers:
        return read_headers(images.select(spread(len(images), LOOKED_AT)), self.task)

    def _decoded(self, part: EncodedPart, side: Side, name: str) -> Decoded:
        return decode_all(
            part.images, side, self.config.on_error, what=f"{name} images", cure=CURES[name], task=self.task
        )


def _with_notes(images: T, more: tuple[str, ...]) -> T:
    return replace(images, notes=(*images.notes, *more))


def _image_set(part: EncodedPart, decoded: Decoded, channels: int) -> ImageSet:
    images, notes = decoded.tensor(channels), (*part.notes, *decoded.notes)
    if decoded.grey and channels == 3 and len(images):
        converted = f"all {len(images):,} images of one part are grey, and got three equal channels as the others"
        notes = (*notes, f"{part.name}: {converted}")
    kept: Tensor = decoded.kept
    return ImageSet(images, part.labels[kept], part.class_names, part.name, notes, part.images.select(kept))


def _extremes(sizes: Tensor) -> tuple[int, int]:
    """Positions of the smallest and of the largest of the sizes, int64 [N, 2]."""
    areas = sizes.prod(1)
    return int(areas.argmin()), int(areas.argmax())
