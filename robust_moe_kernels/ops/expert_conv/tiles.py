"""Which kernel and tile computes a grouped product or filter gradient: candidates, and the table that chooses.

``tiles.json`` lists entries, best matches first: for an architecture, a kind of operand and an operation, the variant
and tile for at least so many pairs (rows * pixels of the target) and columns. An entry says where it comes from:
"estimated: ..." with the reason, or "measured: GPU, date, commit". ``write_table`` makes entries of measurements.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from robust_moe_kernels.checks import expect

__all__ = [
    "CAPABILITIES",
    "FILTER",
    "PRODUCT",
    "TABLE",
    "Choice",
    "Gpu",
    "Tile",
    "candidates",
    "choose",
    "compiles",
    "write_table",
]

TABLE = Path(__file__).with_name("tiles.json")


class Tile(NamedTuple):
    """A launch configuration: rows, columns and depth of a product's block, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def shared(self, element: int) -> int:
        """Bytes of shared memory for elements of that size."""
        return self.stages * (self.m + self.n) * self.k * element

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


class Choice(NamedTuple):
    """A kernel and its tile.

    Variants of a product: "pointer", one program a tile, expert by expert; "persistent", programs that stay, tiles with
    most taps first; "descriptor", the same with filters by tensor descriptor. Variants of a filter gradient: "divide",
    which finds each pixel by division; "carry", which counts.
    """

    variant: str
    tile: Tile

    def programs(self, element: int, limit: int) -> int:
        """Programs that a multiprocessor holds at once, by shared memory; ``limit``: bytes a block can have, to which
        1 KiB comes that every block takes. Registers bind earlier in one case, seen in its compiled code: "persistent"
        with 8 warps takes more than 128 a thread, so that a second program does not fit."""
        if self.variant == "persistent" and self.tile.warps == 8:
            return 1
        return max(1, min(4, (limit + 1024) // (self.tile.shared(element) + 1024)))


class Gpu(NamedTuple):
    """What the choice depends on."""

    capability: int  # of compute: 90 for an H100
    shared: int  # bytes of shared memory a block can have
    multiprocessors: int
    descriptors: bool  # whether Triton has tensor descriptors


# By kind of operand, largest first. "narrow": channels that are no multiple of 16, whose loads are single elements.
PRODUCT = {
    "half": (
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
    ),
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 4)),
    "ieee": (Tile(64, 64, 16, 8, 3),),
    "narrow": (Tile(64, 64, 32, 4, 2),),
}
FILTER = {
    "half": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4)),
    "tf32": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4)),
    "ieee": (Tile(64, 64, 16, 8, 3),),
    "narrow": (Tile(64, 64, 16, 4, 2),),
}
_TILES = {"product": PRODUCT, "filter": FILTER}
CAPABILITIES = (80, 90, 100)  # that are compiled for and known
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory a block can have
SHARED_ELSEWHERE = 99 * 1024  # the least of any GPU since
_MASKED_TAPS = 16  # of an axis: the bits that a plan has for them in a lane's mask
# What is tried where a variant cannot compute a case.
_INSTEAD = {"descriptor": "persistent", "persistent": "pointer", "carry": "divide"}
_ELEMENT = {"half": 2, "tf32": 4, "ieee": 4, "narrow": 4}


class Shape(NamedTuple):
    """What a variant's limits depend on."""

    kind: str  # of PRODUCT
    depth: int  # channels that are summed over; of a filter gradient 0
    columns: int
    taps: int  # the longer side of a filter


def compiles(operation: str, choice: Choice, kind: str, capability: int) -> bool:
    """Whether a candidate compiles for GPUs of a compute capability without spilling a register, as far as that is
    known: tensor descriptors need 90 or more, and what is refused beside them was seen to spill 4 to 16 bytes."""
    large = choice.tile.m * choice.tile.n >= 128 * 256
    if choice.variant in ("persistent", "carry") and large and capability < 90:
        return False
    if operation == "product" and choice.variant != "pointer" and kind == "ieee" and capability >= 100:
        return False
    if operation == "filter" and kind == "tf32" and capability >= 100 and choice == Choice("divide", FILTER[kind][1]):
        return False
    return choice.variant != "descriptor" or capability >= 90


def _can(operation: str, choice: Choice, shape: Shape, gpu: Gpu) -> bool:
    """Whether a choice computes a case on a GPU. A descriptor's lines are multiples of 16 bytes, and its blocks must
    not reach from one tap's filters into the next one's; a lane's mask has 16 bits for an axis."""
    if choice.tile.shared(_ELEMENT[shape.kind]) > gpu.shared:
        return False
    if not compiles(operation, choice, shape.kind, gpu.capability):
        return False
    if choice.variant == "descriptor":
        lined = min(shape.depth, shape.columns) * _ELEMENT[shape.kind] % 16 == 0 and shape.kind != "narrow"
        return gpu.descriptors and lined and shape.depth % choice.tile.k == 0 and shape.taps <= _MASKED_TAPS
    return choice.variant != "persistent" or shape.taps <= _MASKED_TAPS


def candidates(operation: str, shape: Shape, gpu: Gpu) -> tuple[Choice, ...]:
    """Every variant and tile that computes a case of a "product" or "filter" on a GPU, largest tiles first."""
    variants = ("descriptor", "persistent", "pointer") if operation == "product" else ("carry", "divide")
    choices = [Choice(variant, tile) for tile in _TILES[operation][shape.kind] for variant in variants]
    return tuple(choice for choice in choices if _can(operation, choice, shape, gpu))


@cache
def _entries(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["entries"]


def choose(operation: str, shape: Shape, pairs: int, gpu: Gpu, table: Path = TABLE) -> Choice:
    """The table's first entry for the GPU's architecture, kind and operation whose least pairs and columns are met.

    An architecture without entries takes those of "other". Where the entry's variant cannot compute the case, its next
    simpler one does; a tile that needs more shared memory than the GPU has is passed over, and so is one that would
    compute a third more columns than there are, if another entry serves.

    Raises:
        ValueError: no tile fits the GPU's shared memory.
    """
    plain = all(type(number) is int for number in (pairs, *shape[1:]))  # not so while shapes are traced
    return (_chosen if plain else _chosen.__wrapped__)(operation, shape, pairs, gpu, table)


@lru_cache(4096)
def _chosen(operation: str, shape: Shape, pairs: int, gpu: Gpu, table: Path) -> Choice:
    mine = [e for e in _entries(table) if (e["operation"], e["kind"]) == (operation, shape.kind)]
    own = [e for e in mine if e["architecture"] == f"sm_{gpu.capability}"]
    possible = []
    for entry in own or [e for e in mine if e["architecture"] == "other"]:
        if pairs >= entry["pairs"] and shape.columns >= entry["columns"]:
            variant, tile = entry["variant"], Tile(*entry["tile"])
            while variant is not None and not _can(operation, Choice(variant, tile), shape, gpu):
                variant = _INSTEAD.get(variant)
            if variant is not None:
                possible.append(Choice(variant, tile))
    for choice in possible:
        if 3 * -(-shape.columns // choice.tile.n) * choice.tile.n < 4 * shape.columns:
            return choice
    if possible:
        return possible[-1]
    smallest = min(_TILES[operation][shape.kind], key=lambda tile: tile.shared(1))
    raise ValueError(
        f"tile: expected a GPU with {smallest.shared(_ELEMENT[shape.kind])} bytes of shared memory, got {gpu.shared}"
    )


def write_table(rows: Iterable[dict[str, Any]], path: Path = TABLE) -> None:
    """Replace a table's entries by measured ones.

    Args:
        rows: one per measurement: "architecture", "kind", "operation", "pairs", "columns" (the case's own), "variant",
            "tile" [m, n, k, warps, stages], "median_ms", "source" ("GPU, date, commit"). The fastest row of a case
            becomes an entry, which serves from the geometric mean of its pairs with the next smaller case's on, the
            smallest case from 0 on; columns likewise. Entries of other architectures, kinds and operations stay, and
            so do those for fewer columns or pairs than were measured: then the fewest columns measured serve from
            themselves on, and the fewest pairs from sqrt(1/2) of themselves on.
        path: the table, read and written.

    Raises:
        ValueError: no row, or one whose tile is no candidate.
    """
    rows = list(rows)
    expect(bool(rows), "rows", "at least one measurement", 0)
    groups: dict[tuple[str, str, str], dict[tuple[int, int], dict[str, Any]]] = {}
    for row in rows:
        known = [list(tile) for tile in _TILES[row["operation"]][row["kind"]]]
        expect(list(row["tile"]) in known, "rows", f"tiles of {known}", row["tile"])
        cases = groups.setdefault((row["architecture"], row["kind"], row["operation"]), {})
        case = row["columns"], row["pairs"]
        if case not in cases or row["median_ms"] < cases[case]["median_ms"]:
            cases[case] = row
    record = json.loads(path.read_text(encoding="utf-8"))
    fewest = {group: min(columns for columns, _ in cases) for group, cases in groups.items()}
    smallest = {group: round(min(pairs for _, pairs in cases) / sqrt(2)) for group, cases in groups.items()}
    kept, others = [], set()
    for entry in record["entries"]:
        group = entry["architecture"], entry["kind"], entry["operation"]
        if group not in fewest or entry["columns"] < fewest[group] or entry["pairs"] < smallest[group]:
            kept.append(entry)
            others.add(group)
    measured = []
    for (architecture, kind, operation), cases in groups.items():
        columns_from = _thresholds({columns for columns, _ in cases})
        group = architecture, kind, operation
        if group in others:
            columns_from[fewest[group]] = fewest[group]
        for columns in sorted(columns_from, reverse=True):
            pairs_from = _thresholds({pairs for c, pairs in cases if c == columns})
            if group in others:
                pairs_from[min(pairs_from)] = round(min(pairs_from) / sqrt(2))
            for pairs in sorted(pairs_from, reverse=True):
                best = cases[columns, pairs]
                measured.append({
                    "architecture": architecture, "kind": kind, "operation": operation,
                    "pairs": pairs_from[pairs], "columns": columns_from[columns], "variant": best["variant"],
                    "tile": list(best["tile"]), "source": f"measured: {best['source']}",
                })  # fmt: skip
    text = ",\n".join("  " + json.dumps(entry) for entry in (*measured, *kept))
    path.write_text('{"entries": [\n' + text + "\n]}\n", encoding="utf-8")
    _entries.cache_clear()
    _chosen.cache_clear()


def _thresholds(sizes: set[int]) -> dict[int, int]:
    """From where each size's entry serves: half way to the next smaller one, by ratio; the smallest from 0 on."""
    ordered = sorted(sizes)
    return {ordered[0]: 0} | {large: round(sqrt(small * large)) for small, large in pairwise(ordered)}
