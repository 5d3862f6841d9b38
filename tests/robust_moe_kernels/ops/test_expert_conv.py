"""The grouped convolution, forward and both gradients, against loops over rows, pixels and taps in NumPy."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from conv_cases import Case, Inputs, assert_within_bounds, inputs_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from robust_moe_kernels import native
from robust_moe_kernels.dispatch import ImplementationUnavailable
from robust_moe_kernels.layout import Geometry, channels_last
from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.expert_conv import (
    EXPERT_CONV,
    conv_dgrad,
    conv_forward,
    conv_plan,
    conv_wgrad,
    expert_conv,
    plan_key,
)
from robust_moe_kernels.ops.expert_conv.tiles import Choice, Gpu, Tile

OP = "expert_conv"
triton_impl = pytest.importorskip("robust_moe_kernels.ops.expert_conv.triton_impl")
from robust_moe_kernels.ops.expert_conv import triton_plan  # noqa: E402  # imports Triton

ONE, TWO, NONE = (1, 1), (2, 2), (0, 0)
CASES = (
    Case("block", (3, 0, 1, 2), (12, 15), (4, 4), (3, 3), ONE, ONE, ONE, 4, "the 4x4 block; experts with 0 and 1 rows"),
    Case("image", (2, 3), (3, 7), (5, 4), (3, 3), TWO, ONE, ONE, 3, "C = 3, H != W, stride 2: odd and even inputs"),
    Case("stem", (1, 2), (3, 5), (6, 5), (7, 7), TWO, (3, 3), ONE, None, "kernel 7, larger than the map"),
    Case("dilated", (2, 1), (4, 5), (7, 5), (3, 2), ONE, (2, 1), (2, 3), 3, "dilation, an even kernel"),
    Case("downsample", (3, 2), (5, 9), (5, 6), (1, 1), TWO, NONE, ONE, 4, "1x1: inputs between the strides get 0"),
    Case("sparse", (2, 2), (4, 4), (8, 7), (2, 2), (3, 4), NONE, ONE, None, "stride beyond the kernel"),
    Case("common", (2, 1), (4, 4), (7, 6), (3, 3), TWO, TWO, TWO, 2, "stride and dilation share a factor"),
    Case("border", (2, 1), (3, 4), (2, 3), (3, 3), ONE, (3, 3), ONE, 2, "padding of a kernel: outputs without taps"),
    Case("wide", (21, 15), (70, 67), (2, 2), (2, 2), ONE, ONE, ONE, 9, "more than one block of channels and of rows"),
    Case("one_channel", (2, 1), (1, 1), (3, 3), (3, 3), ONE, ONE, ONE, 2, "C = K = 1"),
    Case("one_output_a_line", (6, 1), (1, 3), (8, 2), (4, 3), (1, 3), (0, 1), ONE, None, "PyTorch 2.14 gets it wrong"),
    Case("shares", (20,), (3, 4), (4, 4), (1, 1), ONE, NONE, ONE, None, "filter gradient in two shares"),
    Case("no_rows", (0, 0), (3, 4), (4, 4), (3, 3), ONE, ONE, ONE, None, "an empty batch"),
)  # fmt: skip

IN_PARTS = (
    Case("large filter", (1,), (1, 1), (12, 12), (11, 11), ONE, (5, 5), ONE, None, "other taps reach every pixel"),
    Case("deep", (2, 1), (45, 3), (6, 6), (11, 11), ONE, (5, 5), ONE, 2, "121 taps: a panel holds 38 channels"),
    Case("many_rows", (69, 1), (19, 3), (2, 3), (3, 3), ONE, ONE, ONE, None, "pairs of rows in three blocks"),
    Case("whole_lines", (3, 2), (7, 96), (2, 2), (3, 3), ONE, ONE, ONE, None, "gradients written past the caches"),
    Case("large_map", (5, 0, 1), (3, 2), (20, 27), (3, 3), ONE, ONE, ONE, None, "more pixels than a block; long runs"),
)  # fmt: skip
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_extension = pytest.mark.skipif(native.why_not_cpu("cpu") is not None, reason="needs the compiled extension")


def by_name(name: str) -> Case:
    return next(case for case in (*CASES, *IN_PARTS) if case.name == name)


def run(inputs: Inputs, case: Case, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """(out, d_x, d_weight)."""
    x, weight, offsets, sample, d_out = inputs
    rest = (case.geometry, impl)
    return (
        conv_forward(x, weight, offsets, sample, [], *rest),
        conv_dgrad(d_out, weight, offsets, [], *case.size, *rest),
        conv_wgrad(x, d_out, offsets, sample, weight, *rest),
    )


def unit_of(target, dtype: torch.dtype) -> float | None:
    """float32 on a GPU is multiplied as PyTorch's convolutions are told to, by default with 11 bits."""
    tf32 = target.device == "cuda" and dtype == torch.float32
    return 2.0**-10 if tf32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_oracle(target, case, generator):
    inputs = inputs_of(case, generator)
    results = run(inputs.to(target.device), case, target.impl)
    assert_within_bounds(results, inputs, case, unit_of(target, torch.float32))
    assert results[0].stride() == channels_last(results[0]).stride()
    for expert, count in enumerate(case.counts):
        assert count or not results[2][expert].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["block", "image"])
def test_other_dtypes(target, name, dtype, generator):
    """What an implementation computes is within the bounds; what it does not, it refuses by name and leaves to the
    reference under "auto". 16-bit sums are float32, rounded once."""
    case = by_name(name)
    inputs = inputs_of(case, generator, dtype)
    here = inputs.to(target.device)
    reason = EXPERT_CONV.module(target.impl).why_not_case(here.x, here.weight)
    unit = unit_of(target, torch.float32) if target.impl == "reference" else None
    if reason is None:
        assert_within_bounds(run(here, case, target.impl), inputs, case, unit)
    else:
        message = f"impl='{target.impl}' cannot run on {target.device}: {re.escape(reason)}"
        with pytest.raises(ImplementationUnavailable, match=message):
            run(here, case, target.impl)
        assert_within_bounds(run(here, case, "auto"), inputs, case, unit)


@needs_extension
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("case", (*CASES, *IN_PARTS), ids=lambda case: case.name)
def test_native_in_every_dtype(case, dtype, generator):
    """Sums in float32, rounded once."""
    inputs = inputs_of(case, generator, dtype)
    assert_within_bounds(run(inputs, case, "native"), inputs, case)


@needs_extension
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_weights_of_any_layout(dtype, generator):
    """1x1 filters, of which contiguous ones have the input channels innermost, too."""
    for case in (by_name("image"), by_name("downsample"), by_name("wide")):
        inputs = inputs_of(case, generator, dtype)
        expected = run(inputs, case, "native")
        results = run(inputs._replace(weight=inputs.weight.contiguous()), case, "native")
        assert all(torch.equal(got, same) for got, same in zip(results, expected, strict=True))
        assert results[2].is_contiguous()


@needs_extension
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_native_gradient_of_filters_with_gaps(dtype, generator):
    """Whose taps are at equal distances, and no longer are once the gaps are left out."""
    case = Case("gaps", (2,), (1, 2), (3, 3), (2, 2), ONE, NONE, ONE, None, "")
    inputs = inputs_of(case, generator, dtype)
    weight = torch.zeros(24, dtype=dtype).as_strided(inputs.weight.shape, (24, 6, 1, 8, 4)).copy_(inputs.weight)
    results = run(inputs._replace(weight=weight), case, "native")
    assert all(torch.equal(got, same) for got, same in zip(results, run(inputs, case, "native"), strict=True))
    assert results[2].stride() == torch.empty_like(weight).stride()


@needs_extension
def test_native_error_of_bfloat16_is_that_of_one_rounding(generator):
    """At most the reference's, of which that rounding is the most; both against float64."""
    case = Case("layer", (7, 4), (160, 96), (4, 4), (3, 3), ONE, ONE, ONE, None, "")
    inputs = inputs_of(case, generator, torch.bfloat16)
    results, own = run(inputs, case, "native"), run(inputs, case, "reference")
    for got, theirs, truth in zip(results, own, run(inputs.to(torch.float64), case, "reference"), strict=True):
        error, bound = (got.double() - truth).norm(), (theirs.double() - truth).norm()
        rounding = (truth.to(torch.bfloat16).double() - truth).norm()
        assert error <= 1.01 * rounding
        assert error <= 1.01 * bound


@needs_extension
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_native_bfloat16_carries_what_is_not_finite(value, generator):
    """To the results that it reaches, as in float32, and to no other: odd channels lie beside the next pixel's."""
    case = by_name("image")
    inputs = inputs_of(case, generator, torch.bfloat16)._replace(sample=None)
    x, d_out = inputs.x[torch.zeros(5, dtype=torch.int64)].contiguous(memory_format=torch.channels_last), inputs.d_out
    x[2, 0, 3, 1] = value
    d_out[4, 0, 1, 1] = value
    inputs = inputs._replace(x=x, d_out=d_out)
    for got, same in zip(run(inputs, case, "native"), run(inputs.to(torch.float32), case, "native"), strict=True):
        assert 0 < got.isfinite().sum() < got.numel()
        assert torch.equal(got.isfinite(), same.isfinite())
        assert torch.equal(got.isnan(), same.isnan())


@needs_extension
def test_native_operands_have_one_dtype(generator):
    x, weight, offsets, sample, _ = inputs_of(by_name("block"), generator, torch.bfloat16)
    assert EXPERT_CONV.module("native").why_not_case(x, weight) is None
    message = "the native convolution computes float32, bfloat16, float16, not torch.bfloat16 with torch.float32"
    assert EXPERT_CONV.module("native").why_not_case(x, weight.float()) == message
    with pytest.raises(TypeError, match=r"^weight: "):
        conv_forward(x, weight.float(), offsets, sample, [], by_name("block").geometry, "native")


def test_precision_of_float32_follows_pytorch():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")):
            torch.backends.cudnn.conv.fp32_precision = setting
            wanted = "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else expected
            assert triton_impl.precision(torch.float32) == wanted
            assert triton_impl.precision(torch.bfloat16) == "tf32"  # has no meaning there, and no second kernel
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_weight_layouts(target, generator, assert_same_bits):
    """Any strides of the filters: the same numbers; the gradient has the layout of its filters."""
    case = by_name("image")
    inputs = inputs_of(case, generator).to(target.device)
    expected = run(inputs, case, target.impl)
    layouts = (inputs.weight.contiguous(), inputs.weight.transpose(3, 4).contiguous().transpose(3, 4))
    for weight in layouts:
        results = run(inputs._replace(weight=weight), case, target.impl)
        if target.impl == "reference":  # PyTorch picks its algorithm by layout
            torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
        else:
            assert_same_bits(tuple(t.contiguous() for t in results), tuple(t.contiguous() for t in expected))
        assert results[2].stride() == weight.stride()


def test_gather_reads_the_sample(target, generator, assert_same_bits):
    case = by_name("block")
    inputs = inputs_of(case, generator).to(target.device)
    gathered = inputs._replace(x=channels_last(inputs.x.index_select(0, inputs.sample)), sample=None)
    results, expected = run(inputs, case, target.impl), run(gathered, case, target.impl)
    if target.impl == "reference":  # PyTorch picks its algorithm by layout
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
    else:
        assert_same_bits(results, expected)


def test_any_memory_format_of_the_maps(target, generator, assert_same_bits):
    case = by_name("image")
    inputs = inputs_of(case, generator).to(target.device)
    planes = inputs._replace(x=inputs.x.contiguous(), d_out=inputs.d_out.contiguous())
    assert_same_bits(run(inputs, case, target.impl), run(planes, case, target.impl))


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    for name in ("block", "shares"):
        inputs = inputs_of(by_name(name), generator).to(target.device)
        assert_same_bits(*(run(inputs, by_name(name), target.impl) for _ in range(2)))


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_thread_count_changes_no_bit(dtype, generator, same_bits_for_any_threads):
    for case in (by_name("wide"), by_name("whole_lines")):
        inputs = inputs_of(case, generator, dtype)
        same_bits_for_any_threads(lambda: run(inputs, case, "native"))  # noqa: B023  # called at once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_rounds_16_bits_once(dtype, generator):
    """Also for filters that PyTorch 2.14's own convolution of bfloat16 does not survive."""
    case = Case("dilated", (3,), (2, 16), (2, 1), (2, 1), (3, 2), ONE, (2, 3), None, "")
    inputs = inputs_of(case, generator, dtype)
    assert_within_bounds(run(inputs, case, "reference"), inputs, case)
    with torch.autocast("cpu", torch.bfloat16):
        assert_within_bounds(run(inputs, case, "reference"), inputs, case)


@pytest.mark.parametrize("name", ["image", "common"])
def test_gradcheck(name, generator):
    case = by_name(name)._replace(batch=None, counts=(1, 0, 1), channels=(2, 2))
    inputs = inputs_of(case, generator, torch.float64)
    leaves = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    geometry = case.geometry
    assert torch.autograd.gradcheck(lambda x, w: expert_conv(x, w, inputs.offsets, *geometry), leaves, fast_mode=True)


def test_gradients_are_the_raw_operations(target, generator, assert_same_bits, monkeypatch):
    """And only those that are asked for: an attack must not compute the filters' gradient."""
    case = by_name("image")._replace(batch=None)
    inputs = inputs_of(case, generator).to(target.device)
    x, weight = inputs.x.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    geometry = case.geometry
    out = expert_conv(x, weight, inputs.offsets, *geometry, target.impl)
    gradients = torch.autograd.grad(out, (x, weight), inputs.d_out, retain_graph=True)
    assert_same_bits((out.detach(), *gradients), run(inputs, case, target.impl))
    monkeypatch.setattr(EXPERT_CONV.module(target.impl), "wgrad", lambda *_: pytest.fail("wgrad ran"))
    out = expert_conv(x, weight.detach(), inputs.offsets, *geometry, target.impl)
    assert_same_bits(torch.autograd.grad(out, x, inputs.d_out), gradients[:1])


def test_opcheck(target, generator):
    case = Case("", (2, 0, 1), (3, 4), (3, 4), (3, 2), TWO, ONE, ONE, 2, "")
    x, weight, offsets, sample, d_out = inputs_of(case, generator).to(target.device)
    ops, rest = torch.ops.robust_moe_kernels, (case.geometry.numbers(), target.impl)
    for backward in (False, True):
        torch.library.opcheck(
            ops.expert_conv_plan.default, (weight, offsets, len(d_out), *case.size, backward, *rest),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
    plan = conv_plan(weight, offsets, len(d_out), *case.size, False, case.geometry, target.impl)
    torch.library.opcheck(ops.expert_conv_forward.default, (x, weight, offsets, sample, plan, *rest))
    torch.library.opcheck(ops.expert_conv_forward.default, (x, weight, offsets, sample, [], *rest))
    torch.library.opcheck(ops.expert_conv_dgrad.default, (d_out, weight, offsets, [], *case.size, *rest))
    torch.library.opcheck(ops.expert_conv_wgrad.default, (x, d_out, offsets, sample, weight, *rest))


SHARED = (
    Case("3x3", (3, 0, 2), (16, 16), (4, 5), (3, 3), ONE, ONE, ONE, 4, "all products of a residual block"),
    Case("dilated", (3, 0, 2), (16, 16), (6, 5), (3, 2), ONE, (2, 1), (2, 2), 4, "spans of 4 and 2, padding 2 and 1"),
    Case("1x1", (3, 2), (16, 16), (3, 3), (1, 1), ONE, NONE, ONE, 4, "a single tap is its own mirror image"),
)


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_one_plan_serves_every_product_of_equal_geometry(target, case, generator, assert_same_bits):
    """Forward with and without gathering, and the input gradient: the bits of products that plan for themselves."""
    x, weight, offsets, sample, d_out = inputs_of(case, generator).to(target.device)
    rows, rest = len(d_out), (case.geometry, target.impl)
    of = weight, offsets, rows, *case.size
    assert plan_key(weight, rows, *case.size, False, *rest) == plan_key(weight, rows, *case.size, True, *rest)
    plan = conv_plan(*of, False, *rest)
    assert bool(plan) == (target.impl == "triton")
    gathered = channels_last(x.index_select(0, sample))
    results = [
        (
            conv_forward(x, weight, offsets, sample, plan, *rest),
            conv_forward(gathered, weight, offsets, None, plan, *rest),
            conv_dgrad(d_out, weight, offsets, plan, *case.size, *rest),
        )
        for plan in (plan, [])
    ]
    assert_same_bits(*results)


def test_plans_compile_into_one_graph(target, generator, assert_same_bits):
    """Also with another number of rows, which must not compile a plan of the first one's shape."""

    def both(inputs: Inputs) -> tuple[Tensor, Tensor]:
        x, weight, offsets, sample, d_out = inputs
        rest = (SHARED[0].geometry, target.impl)
        plan = conv_plan(weight, offsets, sample.shape[0], *SHARED[0].size, False, *rest)
        return (
            conv_forward(x, weight, offsets, sample, plan, *rest),
            conv_dgrad(d_out, weight, offsets, plan, *SHARED[0].size, *rest),
        )

    if target.impl == "reference":
        pytest.skip("the reference reads the segments' sizes on the host")
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for counts in ((3, 0, 2), (4, 6, 1)):
        inputs = inputs_of(SHARED[0]._replace(counts=counts), generator).to(target.device)
        assert_same_bits(compiled(inputs), both(inputs))


def test_keys_of_plans_that_cannot_be_shared(generator):
    """Another map, geometry, number of rows or direction: another key; implementations without plans have none."""
    case = by_name("image")
    weight = inputs_of(case, generator).weight
    base = (5, 4, 4, False, Geometry((1, 1), (1, 1), (1, 1)))
    others = (
        (6, 4, 4, False, Geometry((1, 1), (1, 1), (1, 1))),
        (5, 4, 5, False, Geometry((1, 1), (1, 1), (1, 1))),
        (5, 4, 4, False, Geometry((1, 1), (0, 0), (1, 1))),
        (5, 4, 4, True, Geometry((1, 1), (0, 0), (1, 1))),
        (5, 4, 4, False, Geometry((2, 2), (1, 1), (1, 1))),
        (5, 4, 4, True, Geometry((2, 2), (1, 1), (1, 1))),
    )
    keys = [plan_key(weight, *of, "triton") for of in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert plan_key(weight, *base, "triton") == keys[0]
    assert plan_key(weight, *base, "native") is plan_key(weight, *base, "reference") is None


def test_a_plan_that_does_not_fit_is_refused(generator):
    case = by_name("block")
    x, weight, offsets, sample, _ = inputs_of(case, generator)
    plan = conv_plan(weight, offsets.clamp_max(3), 3, *case.size, False, case.geometry, "triton")
    with pytest.raises(ValueError, match=r"^plan: expected tensors of shapes .*, or none, got "):
        conv_forward(x, weight, offsets, sample, plan, case.geometry, "triton")
    with pytest.raises(ValueError, match=r"^plan: expected no tensors: this implementation needs none, got 3 tensors"):
        conv_forward(x, weight, offsets, sample, plan, case.geometry, "reference")


def test_launching_reads_nothing_from_the_gpu(generator, monkeypatch):
    """Fake CUDA tensors have no values: whatever the host needed from them to launch would raise."""
    launched = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            assert all(type(size) is int and size > 0 for size in grid)
            return lambda *_args, **_options: launched.append(self.name)

    for name in ("pointer_kernel", "persistent_kernel", "divide_kernel", "carry_kernel"):
        monkeypatch.setattr(triton_impl, name, Recorder(name))
    monkeypatch.setattr(triton_plan, "plan_kernel", Recorder("plan_kernel"))
    for module in (triton_impl, triton_plan):
        monkeypatch.setattr(module, "on_device", lambda _: nullcontext())
        monkeypatch.setattr(module, "gpu_of", lambda _: Gpu(90, 227 * 1024, 132, True))
    case = by_name("image")
    geometry = case.geometry
    real = inputs_of(case, generator)
    with FakeTensorMode() as mode:
        x, weight, offsets, sample, d_out = (mode.from_tensor(tensor).to("cuda") for tensor in real)
        results = (
            triton_impl.forward(x, weight, offsets, sample, [], geometry),
            triton_impl.dgrad(d_out, weight, offsets, [], *case.size, geometry),
            triton_impl.wgrad(x, d_out, offsets, sample, weight, geometry),
        )
    assert [name.split("_")[-1] for name in launched] == ["kernel"] * 5
    assert launched[::2][:2] == ["plan_kernel"] * 2
    assert {launched[1], launched[3]} <= {"pointer_kernel", "persistent_kernel"}
    assert launched[4] in ("divide_kernel", "carry_kernel")
    assert {result.device.type for result in results} == {"cuda"}


def test_sizes_beyond_the_plan_are_refused(generator):
    """The kernel's 32-bit places: refused in words, not computed wrongly."""
    x = torch.empty(1, 1, 1, 2**14, device="meta")
    weight, offsets = torch.empty(1, 1, 1, 1, 1, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="x: expected maps and filters below 2\\^14 lines and columns"):
        triton_impl.forward(x, weight, offsets, None, [], Geometry(ONE, NONE, ONE))


def test_filters_beyond_a_descriptor_are_refused():
    """Its coordinates have 32 bits: refused in words, not computed wrongly."""
    x = torch.empty(1, 512, 1, 1, device="meta", dtype=torch.float16)
    weight = torch.empty(2**22, 512, 512, 1, 1, device="meta", dtype=torch.float16)
    offsets = torch.empty(2**22 + 1, dtype=torch.int64, device="meta")
    choice = Choice("descriptor", Tile(64, 64, 64, 4, 4))
    with pytest.raises(
        ValueError, match=r"^weight: expected fewer than 2\^31 lines of filters, E \* kh \* kw \* I, got"
    ):
        triton_impl.forward_by(choice, x, weight, offsets, None, [], Geometry(ONE, NONE, ONE))


def test_filters_that_begin_anywhere(generator, assert_same_bits):
    """Descriptors begin at multiples of 16 bytes; filters that do not are read without, to the same bits."""
    x, weight, offsets, sample, _ = inputs_of(SHARED[0]._replace(channels=(64, 64)), generator, torch.float16)
    stored = torch.empty(weight.numel() + 1, dtype=torch.float16)[1:]
    moved = stored.view(weight.permute(0, 3, 4, 2, 1).shape).permute(0, 4, 3, 1, 2).copy_(weight)
    assert moved.stride() == weight.stride()
    geometry, choice = Geometry(ONE, ONE, ONE), Choice("descriptor", Tile(64, 64, 64, 4, 4))
    results = [triton_impl.forward_by(choice, x, w, offsets, sample, [], geometry) for w in (moved, weight)]
    assert_same_bits(*results)


def test_is_in_the_table():
    assert OPS[OP] is EXPERT_CONV
