"""Samples in tar shards, as WebDataset has them: an index of where each member begins, and members read by it.

A sample is the members, one after the other, whose names are the same up to the first dot of the file's name: KEY.jpg
and KEY.cls. The package ``webdataset`` reads shards from their beginning to their end and shuffles among the samples
of a buffer. Exact shuffling, and going on in the middle of an epoch, want any sample at any time, which the format
allows: tar does not compress. Members are found once, by the standard library's tarfile (measured on two busy cores:
3,400 samples of two members a second).
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from robust_moe.data.encoded import EncodedImages, Names
from robust_moe.data.image_set import DataError
from robust_moe.data.image_tree import SUFFIXES
from robust_moe.settings import shown

__all__ = ["Member", "Sample", "TarImages", "expect_all_shards", "read_shard"]

BLOCK = 512  # bytes: what tar counts in
MOST_LABEL_BYTES = 2**20  # of a .cls or .json member
NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d+)(?P<of>-of-(?P<count>\d+))?\.tar")


class Member(NamedTuple):
    """An image in a shard."""

    name: str
    begin: int  # bytes
    size: int


class Sample(NamedTuple):
    """An image in a shard and its label."""

    image: Member
    label: int | str


class TarImages(EncodedImages):
    """Image members of shards.

    Args:
        root: folder that the shards' names are told from; where it lies is no part of the images' identity.
        members: of each shard, in order.
    """

    def __init__(self, root: Path, members: dict[Path, list[Member]]) -> None:
        self._root = root
        self._shards = [str(shard.relative_to(root)) for shard in members]
        counts = [len(found) for found in members.values()]
        self._shard = np.repeat(np.arange(len(counts)), counts)
        flat = [member for found in members.values() for member in found]
        self._names = Names(member.name for member in flat)
        self._begins = np.array([member.begin for member in flat], dtype=np.int64)
        self._sizes = np.array([member.size for member in flat], dtype=np.int64)
        super().__init__(len(flat))

    def _read(self, position: int) -> bytes:
        size = int(self._sizes[position])
        with open(self._root / self._shards[self._shard[position]], "rb", buffering=0) as file:
            file.seek(int(self._begins[position]))
            data = file.read(size)
        if len(data) < size:
            raise ValueError(f"{len(data):,} of {size:,} bytes: the shard was cut since it was opened")
        return data

    def _where(self, position: int) -> str:
        return f"{self._root / self._shards[self._shard[position]]}: {self._names[position]}"

    def _identity(self, position: int) -> str:
        return f"{self._shards[self._shard[position]]}:{self._names[position]}\0{self._sizes[position]}"


def expect_all_shards(shards: list[Path]) -> None:
    """Raise :class:`DataError` where the shards of a part are numbered and a number is missing: one between two others,
    or of those that ``-of-COUNT`` in their names promises."""
    numbered: dict[tuple[Path, str, str], dict[int, str]] = {}
    for shard in shards:
        if (found := NUMBERED.fullmatch(shard.name)) is not None:
            series = (shard.parent, found["stem"], found["of"] or "")
            numbered.setdefault(series, {})[int(found["number"])] = found["number"]
    for (folder, stem, of), numbers in numbered.items():
        expected = range(int(of.removeprefix("-of-"))) if of else range(min(numbers), max(numbers) + 1)
        for number in expected:
            if number not in numbers:
                digits = len(next(iter(numbers.values())))
                raise DataError(f"{folder / f'{stem}{number:0{digits}}{of}.tar'}: expected this shard, got none")


def read_shard(shard: Path) -> Iterator[Sample | DataError]:
    """The samples of a shard, in order; an error for one that is not an image with a label.

    Raises:
        DataError: a shard that is missing, no tar file, compressed or cut off.
    """
    try:
        with tarfile.open(shard, "r:") as file:  # uncompressed alone: a member of another cannot be read by itself
            key, members = None, list[tarfile.TarInfo]()
            for member in file:
                if member.size < 0:  # its header is damaged, and tarfile would go back, for ever
                    raise tarfile.ReadError(f"a member of {member.size} bytes, {member.name}")
                name = member.name.rpartition("/")[2]
                if not member.isreg() or name.startswith("."):
                    continue
                stem = member.name.removesuffix(name) + name.partition(".")[0]
                if stem != key and members:
                    yield _sample(shard, file, members)
                    members = []
                key = stem
                members.append(member)
            _expect_end(shard, file)  # before it is said what the last sample lacks
            if members:
                yield _sample(shard, file, members)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # ValueError: a size that no file can have
        raise DataError(f"{shard}: expected a whole tar file, not compressed, got: {error}") from error


def _expect_end(shard: Path, file: tarfile.TarFile) -> None:
    """Raise DataError for a file that ends after a member, without the blocks of zeros that every writer ends with."""
    with open(shard, "rb") as raw:
        raw.seek(file.offset)  # of what tarfile took for the end
        if raw.read(BLOCK) != bytes(BLOCK):
            raise DataError(f"{shard}: expected a whole tar file, got one without an end: truncated")


def _sample(shard: Path, file: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Sample | DataError:
    """Of the members of one key; names in an error are the first member's."""
    kinds: dict[str, tarfile.TarInfo] = {}
    for member in members:
        kind = member.name.rpartition("/")[2].partition(".")[2].lower()
        if kind in kinds:  # two samples of one key: which label belongs to which image is not known
            return DataError(f"{shard}: {member.name}: expected each member of a sample once, got it again")
        kinds[kind] = member
    images = [member for kind, member in kinds.items() if f".{kind}" in SUFFIXES]
    where = f"{shard}: {members[0].name}"
    if len(images) != 1:
        got = ", ".join(kinds)
        return DataError(f"{where}: expected one image among the members of a sample, got {len(images)} ({got})")
    image = Member(images[0].name, images[0].offset_data, images[0].size)
    for kind in ("cls", "json"):
        if kind in kinds:
            label = _label(file, kinds[kind])
            if label is not None:
                return Sample(image, label)
            what = "a class" if kind == "cls" else 'a JSON object with a class under "label"'
            return DataError(f"{shard}: {kinds[kind].name}: expected {what}, got {_text(file, kinds[kind])}")
    return DataError(f"{where}: expected a label beside the image, .cls or .json, got {', '.join(kinds)}")


def _content(file: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Without extractfile, whose layers take most of the time of an index."""
    assert file.fileobj is not None  # of an archive that is open
    file.fileobj.seek(member.offset_data)
    return file.fileobj.read(min(member.size, MOST_LABEL_BYTES))


def _text(file: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    return shown(_content(file, member).decode(errors="replace"))


def _label(file: tarfile.TarFile, member: tarfile.TarInfo) -> int | str | None:
    """The label in a member: a whole number, or the name of a class; None: neither."""
    try:
        label = _content(file, member).decode().strip()
        if member.name.lower().endswith(".json"):
            label = json.loads(label)["label"]
            return label if isinstance(label, int | str) and not isinstance(label, bool) and label != "" else None
        return int(label) if re.fullmatch(r"-?\d+", label) else label or None
    except (KeyError, RecursionError, TypeError, ValueError):
        return None
