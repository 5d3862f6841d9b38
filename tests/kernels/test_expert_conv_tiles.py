"""Every kernel and tile that can compute the grouped convolution, and the table that chooses among them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conv_cases import Case, Inputs, assert_within_bounds, inputs_of

from robust_moe_kernels.layout import Geometry, channels_last
from robust_moe_kernels.ops.expert_conv.tiles import FILTER, PRODUCT, Choice, Tile

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
        geometry = Geometry(case.stride, case.padding, case.dilation)
        out = triton_impl.forward(x, weight, offsets, sample, [], geometry, choice)
        results = [out, None, None]
        if choice.variant != "descriptor" or case.channels[1] % choice.tile.k == 0:
            results[1] = triton_impl.dgrad(d_out, weight, offsets, [], *case.size, geometry, choice)
        assert_within_bounds(tuple(results), inputs, case, unit_of(kind))


@pytest.mark.usefixtures("kind_precision")
@pytest.mark.parametrize(("kind", "choice"), FILTERS, ids=label)
def test_every_filter_gradient(kind, choice):
    for name, dtype in cases_of(kind, choice):
        case, inputs = CASES[name], inputs_for(name, dtype)
        x, weight, offsets, sample, d_out = inputs.to("cuda" if HAS_GPU else "cpu")
        geometry = Geometry(case.stride, case.padding, case.dilation)
        if name != "odd":
            x, sample = channels_last(x.index_select(0, sample)), None
        d_weight = triton_impl.wgrad(x, d_out, offsets, sample, weight, geometry, choice)
        assert_within_bounds((None, None, d_weight), inputs, case, unit_of(kind))


@pytest.mark.parametrize("variant", ["descriptor", "persistent", "pointer", "carry", "divide"])
def test_strides(variant):
    """Classes of input pixels with different taps, a plan each; filter taps that reach few pixels."""
    case, inputs = CASES["stride"], inputs_for("stride", torch.float16)
    x, weight, offsets, sample, d_out = inputs.to("cuda" if HAS_GPU else "cpu")
    geometry = Geometry(case.stride, case.padding, case.dilation)
    if variant in ("carry", "divide"):
        d_weight = triton_impl.wgrad(x, d_out, offsets, sample, weight, geometry, Choice(variant, FILTER["half"][-1]))
        assert_within_bounds((None, None, d_weight), inputs, case)
    else:
        choice = Choice(variant, Tile(64, 64, 32, 4, 2))
        out = triton_impl.forward(x, weight, offsets, sample, [], geometry, choice)
        d_x = triton_impl.dgrad(d_out, weight, offsets, [], *case.size, geometry, choice)
        assert_within_bounds((out, d_x, None), inputs, case)
