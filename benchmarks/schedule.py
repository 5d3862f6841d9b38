"""What the grouped product's plans cost before any GPU runs them: tiles' taps and how evenly they fill a GPU.

Usage: python -m benchmarks schedule [--out FOLDER]

The plans are the real ones (in Triton's interpreter where there is no GPU). The schedule is a model: a tile takes as
long as it has taps, a multiprocessor's programs share its rate, nothing else takes time. It compares orders and tiles;
it predicts no milliseconds. ``executed`` is the work of all tiles over the work of the pairs in them, ``efficiency``
the tiles' work over what all multiprocessors could do until the last one is done.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
from functools import cache
from typing import Any, NamedTuple

if not os.path.exists("/dev/nvidia0"):  # no GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import torch

from robust_moe.benchmarks.records import expect_records, folder_option, write_record
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import triton_impl
from robust_moe_kernels.ops.expert_conv.tiles import PRODUCT, Choice, Gpu, Tile

__all__ = ["SHARES", "Schedule", "schedule"]

H100 = Gpu(90, 227 * 1024, 132, True)
SHARES = {
    "even": (0.25, 0.25, 0.25, 0.25),
    "uneven": (0.4, 0.3, 0.2, 0.1),
    "one large": (0.7, 0.1, 0.1, 0.1),
    "one idle": (0.5, 0.3, 0.2, 0.0),
    "even, 16": (0.0625,) * 16,
    "uneven, 16": tuple((i + 1) / 136 for i in range(16)),
}
_BLOCK = Geometry((1, 1), (1, 1), (1, 1))  # of a residual block's convolutions


class Schedule(NamedTuple):
    """One product of 4x4 maps by 3x3 filters with padding 1."""

    executed: float  # work of all tiles over the useful work
    efficiency: float  # share of the multiprocessors' time that is spent on tiles


def rows_of(shares: tuple[float, ...], rows: int) -> list[int]:
    """Rows of each expert: the shares, rounded down, and what is left to the first ones."""
    counts = [int(share * rows) for share in shares]
    for i in range(rows - sum(counts)):
        counts[i] += 1
    return counts


def schedule(counts: list[int], choice: Choice, channels: int = 512, size: int = 4, gpu: Gpu = H100) -> Schedule:
    """The schedule of one product with ``counts`` rows an expert, by the plan that the kernels are given."""
    ordered = choice.variant != "pointer"
    taps = _taps(tuple(counts), size, ordered, choice.tile.m)
    useful = sum(counts) * (3 * size - 2) ** 2
    items = [count for count in taps for _ in range(-(-channels // choice.tile.n))]
    loads = _dealt(items, gpu.multiprocessors) if ordered else _taken(items, gpu.multiprocessors)
    return Schedule(sum(taps) * choice.tile.m / useful, sum(items) / (gpu.multiprocessors * max(loads)))


@cache
def _taps(counts: tuple[int, ...], size: int, ordered: bool, block: int) -> tuple[int, ...]:
    """Taps of each tile of a plan, in the order in which they are computed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    offsets = torch.tensor([0, *counts], device=device).cumsum(0)
    weight = torch.empty(1, dtype=torch.float16, device=device).expand(len(counts), 64, 64, 3, 3)
    choice = Choice("persistent" if ordered else "pointer", Tile(block, 64, 64, 4, 2))
    record, *_ = triton_impl.plan_by(choice, weight, offsets, sum(counts), size, size, False, _BLOCK)
    record = record[: int(record[-1, 0])] if ordered else record[:-1][record[:-1, 0] >= 0]
    return tuple((record[:, 1] * record[:, 2]).tolist())


def _dealt(items: list[int], seats: int) -> list[int]:
    """Work of each multiprocessor under the persistent kernels' rounds, forwards and backwards in turn."""
    loads = [0] * seats
    for i, item in enumerate(items):
        turn, seat = divmod(i, seats)
        loads[seat if turn % 2 == 0 else seats - 1 - seat] += item
    return loads


def _taken(items: list[int], seats: int) -> list[int]:
    """Work of each multiprocessor where the next program of a grid starts on the least loaded one."""
    loads = [0] * seats
    for item in items:
        heapq.heapreplace(loads, loads[0] + item)
    return loads


def rows() -> list[dict[str, Any]]:
    """Every combination of batch (of 2 experts an image), shares of the experts, tile and, of the first two shares, the
    order that was before: expert by expert."""
    found = []
    for batch in (128, 256, 512):
        for name, shares in SHARES.items():
            for variant in ("persistent", "pointer") if name in ("even", "uneven") else ("persistent",):
                for tile in {(tile.m, tile.n): tile for tile in PRODUCT["half"]}.values():
                    result = schedule(rows_of(shares, 2 * batch), Choice(variant, tile))
                    found.append({
                        "batch": batch, "experts": len(shares), "rows": name, "order": variant,
                        "tile": [tile.m, tile.n], "executed": round(result.executed, 4),
                        "efficiency": round(result.efficiency, 4),
                    })  # fmt: skip
                    print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=folder_option, help="folder for schedule.json; without it rows are only printed")
    arguments = parser.parse_args()
    expect_records(parser, arguments.out, ["schedule"])
    found = rows()
    if arguments.out:
        text = ",\n".join("  " + json.dumps(row) for row in found)
        head = json.dumps({"benchmark": "schedule", "about": "simulated, 512 channels, 4x4 maps, 132 multiprocessors"})
        write_record(arguments.out, "schedule", f'{head[:-1]}, "rows": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
