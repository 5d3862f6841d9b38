"""Every kernel and tile that can compute the grouped convolution, and the table that chooses among them."""

from __future__ import annotations

import json
from functools import cache
from itertools import product

import pytest
import torch
from conv_cases import Case, Inputs, assert_within_bounds, inputs_of

from robust_moe_kernels.layout import channels_last
from robust_moe_kernels.ops.expert_conv.tiles import (
    FILTER,
    PRODUCT,
    TABLE,
    Choice,
    Gpu,
    Shape,
    Tile,
    candidates,
    choose,
    write_table,
)

triton_impl = pytest.importorskip("robust_moe_kernels.ops.expert_conv.triton_impl")

HAS_GPU = torch.cuda.is_available()
ONE, TWO, NONE = (1, 1), (2, 2), (0, 0)
UNEVEN = (6, 0, 3)  # an expert without rows, and tiles that straddle pixels
CASES = {
    "odd": Case("odd", UNEVEN, (12, 15), (3, 3), (3, 3), ONE, ONE, ONE, 6, "channels that divide nothing: masks"),
    "even": Case("even", UNEVEN, (64, 64), (3, 3), (3, 3), ONE, ONE, ONE, 6, "channels of whole blocks: no masks"),
    "stride": Case("stride", UNEVEN, (64, 32), (5, 4), (3, 3), TWO, ONE, ONE, 6, "four classes of input pixels"),
    "wide": Case("wide", (9, 0, 30, 1), (512, 512), (4, 4), (3, 3), ONE, ONE, ONE, 16, "the channels of ResNet-18"),
}
DTYPES = {"half": torch.float16, "tf32": torch.float32, "ieee": torch.float32, "narrow": torch.float32}
PRODUCTS = [
    (kind, Choice(variant, tile))
    for kind, listed in PRODUCT.items()
    for tile in listed
    for variant in ("descriptor", "persistent", "pointer")
    if (kind, variant) != ("narrow", "descriptor")
]
FILTERS = [
    (kind, Choice(variant, tile))
    for kind, listed in FILTER.items()
    for tile in listed
    for variant in ("carry", "divide")
]


def label(value: object) -> str | None:
    return f"{value.variant}-{'x'.join(map(str, value.tile))}" if isinstance(value, Choice) else None


@cache
def inputs_for(name: str, dtype: torch.dtype) -> Inputs:
    return inputs_of(CASES[name], torch.Generator().manual_seed(20260722), dtype)


def cases_of(kind: str, choice: Choice) -> list[tuple[str, torch.dtype]]:
    """(case, dtype) that a candidate is tried on; the channels of a real network in bfloat16 need a GPU."""
    smallest = choice.tile in (PRODUCT[kind][-1], FILTER[kind][-1])
    names = ["odd", "even"] if smallest and choice.variant != "descriptor" else ["even"]
    found = [(name, DTYPES[kind]) for name in names]
    if HAS_GPU and kind == "half":
        found += [("even", torch.bfloat16), ("wide", torch.bfloat16)]
    return found


def unit_of(kind: str) -> float | None:
    return 2.0**-10 if HAS_GPU and kind in ("tf32", "narrow") else None


@pytest.fixture
def kind_precision(request) -> None:
    """float32 multiplied as the kind of the test's tiles says."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee" if request.node.callspec.params["kind"] == "ieee" else "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("kind_precision")
@pytest.mark.parametrize(("kind", "choice"), PRODUCTS, ids=label)
def test_every_product(kind, choice):
    """Forward, gathering, and input gradient, by each kernel and tile."""
    for name, dtype in cases_of(kind, choice):
        case = CASES[name]
        if choice.variant == "descriptor" and case.channels[0] % choice.tile.k:
            continue
        inputs = inputs_for(name, dtype)
        x, weight, offsets, sample, d_out = inputs.to("cuda" if HAS_GPU else "cpu")
        geometry = case.geometry
        out = triton_impl.forward_by(choice, x, weight, offsets, sample, [], geometry)
        results = [out, None, None]
        if choice.variant != "descriptor" or case.channels[1] % choice.tile.k == 0:
            results[1] = triton_impl.dgrad_by(choice, d_out, weight, offsets, [], *case.size, geometry)
        assert_within_bounds(tuple(results), inputs, case, unit_of(kind))


@pytest.mark.usefixtures("kind_precision")
@pytest.mark.parametrize(("kind", "choice"), FILTERS, ids=label)
def test_every_filter_gradient(kind, choice):
    for name, dtype in cases_of(kind, choice):
        case, inputs = CASES[name], inputs_for(name, dtype)
        x, weight, offsets, sample, d_out = inputs.to("cuda" if HAS_GPU else "cpu")
        geometry = case.geometry
        if name != "odd":
            x, sample = channels_last(x.index_select(0, sample)), None
        d_weight = triton_impl.wgrad_by(choice, x, d_out, offsets, sample, weight, geometry)
        assert_within_bounds((None, None, d_weight), inputs, case, unit_of(kind))


@pytest.mark.parametrize("variant", ["descriptor", "persistent", "pointer", "carry", "divide"])
def test_strides(variant):
    """Classes of input pixels with different taps, a plan each; filter taps that reach few pixels."""
    case, inputs = CASES["stride"], inputs_for("stride", torch.float16)
    x, weight, offsets, sample, d_out = inputs.to("cuda" if HAS_GPU else "cpu")
    geometry = case.geometry
    if variant in ("carry", "divide"):
        d_weight = triton_impl.wgrad_by(
            Choice(variant, FILTER["half"][-1]), x, d_out, offsets, sample, weight, geometry
        )
        assert_within_bounds((None, None, d_weight), inputs, case)
    else:
        choice = Choice(variant, Tile(64, 64, 32, 4, 2))
        out = triton_impl.forward_by(choice, x, weight, offsets, sample, [], geometry)
        d_x = triton_impl.dgrad_by(choice, d_out, weight, offsets, [], *case.size, geometry)
        assert_within_bounds((out, d_x, None), inputs, case)


@pytest.mark.skipif(not HAS_GPU, reason="graphs are captured on a GPU")
@pytest.mark.parametrize("variant", ["descriptor", "persistent", "pointer"])
def test_a_graph_replays_what_runs_eagerly(variant):
    """With other rows an expert than those of the capture: nothing of the routes is in the graph."""
    case = CASES["even"]
    x, weight, offsets, sample, d_out = inputs_for("even", torch.float16).to("cuda")
    geometry = case.geometry
    choice = Choice(variant, PRODUCT["half"][-1])

    def run() -> tuple[torch.Tensor, ...]:
        plan = triton_impl.plan_by(choice, weight, offsets, len(d_out), *case.size, False, geometry)
        out = triton_impl.forward_by(choice, x, weight, offsets, sample, plan, geometry)
        d_x = triton_impl.dgrad_by(choice, d_out, weight, offsets, plan, *case.size, geometry)
        return out, d_x, triton_impl.wgrad(x, d_out, offsets, sample, weight, geometry)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    offsets.copy_(torch.tensor([0, 2, 9, 9]))
    graph.replay()
    for replayed, eager in zip(results, run(), strict=True):
        torch.testing.assert_close(replayed, eager, rtol=0, atol=0)


H100, A100 = Gpu(90, 227 * 1024, 132, True), Gpu(80, 163 * 1024, 108, True)
CONSUMER = Gpu(120, 99 * 1024, 170, True)
BLOCK = Shape("half", 512, 512, 3)


@pytest.mark.parametrize(
    ("gpu", "shape", "batch", "expected"),
    [
        (H100, BLOCK, 512, Choice("descriptor", Tile(128, 256, 64, 8, 4))),
        (H100, BLOCK, 256, Choice("descriptor", Tile(128, 256, 64, 8, 4))),
        (H100, BLOCK, 128, Choice("persistent", Tile(128, 128, 64, 8, 3))),
        (H100, BLOCK, 2, Choice("descriptor", Tile(64, 64, 64, 4, 4))),
        (H100._replace(descriptors=False), BLOCK, 512, Choice("persistent", Tile(128, 256, 64, 8, 4))),
        (H100, BLOCK._replace(depth=48), 512, Choice("persistent", Tile(128, 256, 64, 8, 4))),
        (H100, BLOCK._replace(taps=17), 512, Choice("pointer", Tile(128, 256, 64, 8, 4))),
        (H100, BLOCK._replace(columns=384), 512, Choice("descriptor", Tile(128, 128, 64, 8, 3))),
        (H100, BLOCK._replace(columns=16), 10**5, Choice("descriptor", Tile(64, 64, 64, 4, 4))),
        (H100, Shape("narrow", 3, 64, 3), 512, Choice("persistent", Tile(64, 64, 32, 4, 2))),
        (A100, BLOCK, 512, Choice("persistent", Tile(128, 128, 64, 8, 3))),
        (Gpu(100, 227 * 1024, 148, True), Shape("ieee", 512, 512, 3), 1, Choice("pointer", Tile(64, 64, 16, 8, 3))),
        (CONSUMER, BLOCK, 512, Choice("persistent", Tile(64, 64, 64, 4, 4))),
        (H100._replace(shared=100 * 1024), BLOCK, 512, Choice("persistent", Tile(128, 128, 64, 8, 3))),
    ],
)
def test_the_choice_of_a_product(gpu, shape, batch, expected):
    """By the table: architecture, pairs (2 experts an image, 4x4 maps) and columns; what cannot be computed is not
    chosen: descriptors need whole blocks, masks 16 taps an axis, and every tile its shared memory."""
    assert choose("product", shape, batch * 2 * 16, gpu) == expected


def test_a_gpu_with_too_little_shared_memory_is_refused():
    with pytest.raises(ValueError, match=r"^tile: expected a GPU with 65536 bytes of shared memory, got 48000$"):
        choose("product", BLOCK, 4096, H100._replace(shared=48000))


def test_the_table_is_whole():
    """Every kind and operation is served at any size on every architecture; entries are candidates and say why."""
    for operation, kind, gpu in product(
        ("product", "filter"), DTYPES, (A100, H100, H100._replace(capability=100), CONSUMER)
    ):
        for columns, pairs in product((16, 64, 128, 256, 512, 2048), (1, 10**4, 10**7)):
            shape = Shape(kind, 512, columns, 3)
            assert choose(operation, shape, pairs, gpu) in candidates(operation, shape, gpu)
    for entry in json.loads(TABLE.read_text())["entries"]:
        assert entry["source"].startswith(("estimated: ", "measured: "))
        assert Tile(*entry["tile"]) in {"product": PRODUCT, "filter": FILTER}[entry["operation"]][entry["kind"]]


def test_candidates_keep_the_kernel_that_was_there():
    shape = Shape("half", 512, 512, 3)
    found = candidates("product", shape, H100)
    assert {choice.variant for choice in found} == {"descriptor", "persistent", "pointer"}
    assert {choice.tile for choice in found if choice.variant == "pointer"} == set(PRODUCT["half"])
    assert {choice.variant for choice in candidates("filter", shape, H100)} == {"carry", "divide"}
    assert all(choice.variant != "descriptor" for choice in candidates("product", shape, A100))
    assert all(choice.tile.shared(2) <= A100.shared for choice in candidates("product", shape, A100))
    assert triton_impl.product_candidates(torch.bfloat16, 512, 512, 90) == found
    assert triton_impl.filter_candidates(torch.bfloat16, 512, 512, 90) == candidates("filter", shape, H100)
    narrow = candidates("product", Shape("narrow", 3, 64, 3), A100)
    assert triton_impl.product_candidates(torch.float32, 3, 64, 80) == narrow


def test_measurements_become_the_table(tmp_path):
    """The fastest of each case, from half way (by ratio) to the next smaller case on; the rest of the table stays."""
    path = tmp_path / "tiles.json"
    path.write_text(TABLE.read_text())
    row = {"architecture": "sm_90", "kind": "half", "operation": "product", "source": "H100, 2026-01-01, 0123456"}
    large, small = list(PRODUCT["half"][1]), list(PRODUCT["half"][-1])
    rows = [
        row | {"pairs": 4096, "columns": 512, "variant": "pointer", "tile": small, "median_ms": 1.0},
        row | {"pairs": 4096, "columns": 512, "variant": "descriptor", "tile": large, "median_ms": 2.0},
        row | {"pairs": 16384, "columns": 512, "variant": "persistent", "tile": large, "median_ms": 3.0},
        row | {"pairs": 16384, "columns": 512, "variant": "pointer", "tile": small, "median_ms": 4.0},
    ]
    write_table(rows, path)
    for pairs in (1, 2000):  # fewer than were measured, by more than sqrt(2): as shipped
        assert choose("product", BLOCK, pairs, H100, path) == choose("product", BLOCK, pairs, H100)
    for pairs, expected in ((3000, "pointer"), (8000, "pointer"), (8200, "persistent"), (10**6, "persistent")):
        assert choose("product", BLOCK, pairs, H100, path).variant == expected
    assert choose("filter", BLOCK, 4096, H100, path) == choose("filter", BLOCK, 4096, H100)
    assert choose("product", BLOCK, 4096, A100, path) == choose("product", BLOCK, 4096, A100)
    for columns, pairs in product((16, 128, 256, 500), (1, 8000, 10**6)):  # fewer than were measured: as shipped
        narrower = BLOCK._replace(columns=columns)
        assert choose("product", narrower, pairs, H100, path) == choose("product", narrower, pairs, H100)
    write_table([row | {"architecture": "sm_120"} for row in rows], path)  # nothing shipped that could serve those
    assert choose("product", BLOCK._replace(columns=16), 1, CONSUMER, path) == Choice("pointer", Tile(*small))
    sources = {entry["source"] for entry in json.loads(path.read_text())["entries"]}
    assert "measured: H100, 2026-01-01, 0123456" in sources
    with pytest.raises(ValueError, match=r"^rows: expected at least one measurement, got 0$"):
        write_table([], path)
    with pytest.raises(ValueError, match=r"^rows: expected tiles of \[\[128, 256.*, got \[1, 2, 3, 4, 5\]$"):
        write_table([rows[0] | {"tile": [1, 2, 3, 4, 5]}], path)
