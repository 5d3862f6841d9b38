"""WebDataset: images and labels as members of tar shards, ROOT/train/*.tar or ROOT/train-*.tar, and test or val."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from robust_moe.data.dataset import DATASETS
from robust_moe.data.encoded import EncodedPart
from robust_moe.data.encoded_source import EncodedDataSet, found_image_size
from robust_moe.data.image_set import DataError, listed
from robust_moe.data.labels import FoundLabels, resolve_labels
from robust_moe.data.tar_shards import Member, TarImages, expect_all_shards, read_shard

__all__ = ["WebDataset"]

TEST_PARTS = ("test", "val")  # the first that has shards is read


@dataclass(frozen=True, eq=False)
class _Indexed:
    """The samples of a part's shards."""

    images: TarImages
    labels: FoundLabels
    notes: tuple[str, ...]


@DATASETS.register("webdataset")
class WebDataset(EncodedDataSet):
    """The samples of all shards of a part, in the order of the shards' names.

    A sample is an image (KEY.jpg, KEY.png, ...) and its label: KEY.cls, a whole number or the name of a class, or
    KEY.json with ``"label"``; other members are not read. Numbers count the classes; names are sorted, and those of the
    training images are the classes.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EncodedDataSet.Config):
        """Settings of tar shards."""

        image_size: int | None = found_image_size()

    config: Config
    files = "tar shards, in train and test (or val), or named train-*.tar and test-*.tar (or val-*.tar)"
    finds_size = True

    def parts(self) -> tuple[EncodedPart, EncodedPart]:
        root = self.root
        if not root.is_dir():
            raise DataError(f"{root}: expected a folder of tar shards, got none")
        found = {part: _shards(root, part) for part in ("train", *TEST_PARTS)}
        test = next((part for part in TEST_PARTS if found[part]), TEST_PARTS[0])
        train_part, test_part = (self._indexed(found[part], part) for part in ("train", test))
        class_names, *labels = resolve_labels(train_part.labels, test_part.labels)
        name = f"webdataset:{root.resolve().name}"
        first, second = (
            EncodedPart(part.images, values, class_names, name, root, part.notes)
            for part, values in zip((train_part, test_part), labels, strict=True)
        )
        return first, second

    def _indexed(self, shards: list[Path], part: str) -> _Indexed:
        root = self.root
        if not shards:
            names = part if part == "train" else " or ".join(TEST_PARTS)
            raise DataError(f"{root}: expected tar shards {names}/*.tar or {names}-*.tar, got none")
        expect_all_shards(shards)
        members: dict[Path, list[Member]] = {}
        labels: list[int | str] = []
        faults: list[str] = []
        with self.task(f"indexing {part} shards", len(shards)) as advance:
            for shard in shards:
                members[shard] = []
                for sample in read_shard(shard):
                    if isinstance(sample, DataError):
                        if self.config.on_error == "stop":
                            raise sample
                        faults.append(str(sample))
                        continue
                    members[shard].append(sample.image)
                    labels.append(sample.label)
                advance(1)
        images = TarImages(root, members)
        if not labels:
            why = f", the first fault: {faults[0]}" if faults else ""
            raise DataError(f"{shards[0]}: expected samples in {len(shards)} shards, got none{why}")
        what = f"left out {len(faults)} samples, which cannot be read (data.on_error=skip)"
        notes = (f"{what}: {listed(faults, '; ')}",) if faults else ()
        return _Indexed(images, FoundLabels(labels, images.where, f"{part} shards in {root}"), notes)


def _shards(root: Path, part: str) -> list[Path]:
    """In the order of their names; as of images, names that begin with a dot are passed over."""
    inside = sorted((root / part).glob("[!.]*.tar")) if (root / part).is_dir() else []
    return inside or sorted(root.glob(f"{part}-*.tar"))
