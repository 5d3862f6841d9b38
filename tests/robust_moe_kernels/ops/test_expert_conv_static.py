"""What is known of the grouped convolution's speed without a GPU: its compiled loops, and how its plans schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from uninterpreted import in_fresh_process

pytest.importorskip("triton", reason="Triton is not installed here")

from benchmarks.sass import inner_loop
from benchmarks.schedule import SHARES, rows_of, schedule
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import triton_impl
from robust_moe_kernels.ops.expert_conv.tiles import FILTER, PRODUCT, Choice, Tile

LARGE, MIDDLE, SMALL = PRODUCT["half"][1], PRODUCT["half"][2], PRODUCT["half"][3]
COMPILE = """
import json, sys
from benchmarks.sass import inspect, kernels
wanted = json.loads(sys.argv[1])
for case, build in kernels(90):
    if [case["kind"], case["variant"], case["tile"]] in wanted:
        print(json.dumps(case | inspect(build, 90)), flush=True)
"""
COMPILED = [
    *(["half", "descriptor", list(tile)] for tile in (LARGE, MIDDLE, SMALL)),
    *(["half", "persistent", list(tile)] for tile in (MIDDLE, SMALL)),
    ["half", "pointer", list(LARGE)],
    ["half", "carry", list(FILTER["half"][1])],
]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """What kernels compile to for an H100, in a process where they are not interpreted."""
    return [json.loads(line) for line in in_fresh_process("-c", COMPILE, json.dumps(COMPILED)).splitlines()]


def of(rows: list[dict], variant: str, tile: Tile) -> list[dict]:
    found = [row for row in rows if (row["variant"], row["tile"]) == (variant, list(tile))]
    assert len(found) == 2  # both directions, or with and without gathering
    return found


@pytest.mark.parametrize(("tile", "most"), [(LARGE, 145), (MIDDLE, 140), (SMALL, 140)], ids=str)
def test_instructions_of_the_product_loop(compiled, tile, most):
    """Of a warp, an iteration: the tensor cores of 128x256 need 1024 cycles, in which 2 warps a scheduler issue."""
    for row in of(compiled, "descriptor", tile):
        assert row["instructions"] <= most, row
        assert row["products"] == 4, row
        assert row["stack_bytes"] == 0, row
    for row in of(compiled, "pointer", LARGE):  # the counting sees what masks cost
        assert row["instructions"] > 190, row


def test_instructions_of_the_filter_loop(compiled):
    """With divisions 419 and, gathering, 442; and two buffers of the four are gone there."""
    tile = FILTER["half"][1]
    for row in of(compiled, "carry", tile):
        assert row["instructions"] <= 236, row  # 235 before indices out of range were kept from being read
        assert row["stack_bytes"] == 0, row
        assert row["shared_bytes"] == tile.shared(2), row


@pytest.mark.parametrize(("variant", "tile", "programs"), [
    ("descriptor", LARGE, 1), ("descriptor", MIDDLE, 2), ("descriptor", SMALL, 3), ("persistent", MIDDLE, 1),
    ("persistent", SMALL, 3),
])  # fmt: skip
def test_the_programs_that_are_launched_fit_a_multiprocessor(compiled, variant, tile, programs):
    """Its 65,536 registers and 228 KiB hold as many programs as the persistent kernels are launched with."""
    assert Choice(variant, tile).programs(2, 227 * 1024) == programs
    for row in of(compiled, variant, tile):
        registers = -(-row["registers"] // 8) * 8 * 32 * tile.warps  # given out by eights
        assert programs * registers <= 65536, row
        assert programs * (row["shared_bytes"] + 1024) <= 228 * 1024, row


def test_the_loop_is_found():
    """The innermost one around a product; a wait that retries out of line and jumps back into it is not the loop."""
    lines = """
.L_x_1:
        /*0000*/                   MOV R1, R2 ;
.L_x_2:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4] ;
        /*0020*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
.L_x_4:
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4] ;
        /*0080*/                   BRA `(.L_x_3) ;
"""
    assert inner_loop(lines) == (4, 1)
    with pytest.raises(ValueError, match="expected a loop with matrix products"):
        inner_loop(lines.replace("HGMMA", "FFMA"))


# batch (of 2 experts an image), rows, tile; most executed work over useful work, least efficiency of the schedule.
# The tile is the table's for the batch, but for 128, where 64x128 is estimated nearly as good and wastes less.
TARGETS = (
    (512, "even", LARGE, 1.0, 0.93),
    (512, "uneven", LARGE, 1.06, 0.85),
    (128, "even", SMALL, 1.0, 0.93),
    (128, "uneven", SMALL, 1.12, 0.85),
)


@pytest.mark.parametrize(("batch", "rows", "tile", "executed", "efficiency"), TARGETS)
def test_schedules(batch, rows, tile, executed, efficiency):
    """By the plan that the kernels get, on an H100's 132 multiprocessors."""
    result = schedule(rows_of(SHARES[rows], 2 * batch), Choice("descriptor", tile))
    assert 1 <= result.executed <= executed
    assert efficiency <= result.efficiency <= 1


def test_a_schedule_that_is_computed_by_hand():
    """One expert with 8 rows of 4x4 maps: 16 pixels in two tiles of 64 pairs, 8 pixels each."""
    result = schedule([8], Choice("persistent", Tile(64, 256, 64, 4, 2)), channels=256)
    # The interior's 4 pixels and the left side need all 9 taps; so does the rest of the ring, which holds three sides.
    assert result.executed == pytest.approx((9 + 9) * 64 / 800)
    assert result.efficiency == pytest.approx(18 / (132 * 9))


GEOMETRIES = {
    "block": (Geometry((1, 1), (1, 1), (1, 1)), (4, 5), 3, False),
    "7x7": (Geometry((2, 2), (3, 3), (1, 1)), (9, 8), 7, False),
    "strided gradient": (Geometry((2, 2), (1, 1), (1, 1)), (3, 4), 3, True),
    "1x1": (Geometry((1, 1), (0, 0), (1, 1)), (3, 3), 1, False),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_plan_covers_every_pixel_once_longest_tiles_first(name):
    """Whatever the experts' rows: as many records as it says, no gap, each target pixel written once; in a block's
    plan no tile comes after one with fewer taps."""
    geometry, size, taps, backward = GEOMETRIES[name]
    for counts in ((5, 0, 2), (0, 1, 12)):
        offsets = torch.tensor([0, *counts]).cumsum(0)
        weight = torch.empty(1).expand(len(counts), 16, 16, taps, taps)
        choice = Choice("persistent", Tile(16, 64, 16, 4, 2))
        record, numbers, place = triton_impl.plan_by(choice, weight, offsets, sum(counts), *size, backward, geometry)
        tiles = int(record[-1, 0])
        height, width = size if backward else geometry.output_size(*size, (taps, taps))
        written = place[:tiles][place[:tiles] >= 0]
        assert torch.equal(written.sort().values, torch.arange(sum(counts) * height * width))
        rows = numbers[0][:tiles]
        expert = torch.searchsorted(offsets[1:], rows, right=True)
        assert torch.equal(expert, record[:tiles, :1].expand_as(expert))
        lengths = (record[:tiles, 1] * record[:tiles, 2]).tolist()
        if name in ("block", "1x1"):
            assert lengths == sorted(lengths, reverse=True)


def test_results_are_of_these_kernels():
    """The committed numbers name every candidate, so that none is left out of what is published."""
    rows = json.loads((Path(__file__).parents[3] / "benchmarks/results/static/sass.json").read_text())["rows"]
    listed = {(row["kind"], row["variant"], tuple(row["tile"])) for row in rows}
    for kind in ("half", "tf32"):
        wanted = {(kind, "descriptor", tuple(tile)) for tile in PRODUCT[kind]}
        wanted |= {(kind, "carry", tuple(tile)) for tile in FILTER[kind]}
        assert wanted <= listed
