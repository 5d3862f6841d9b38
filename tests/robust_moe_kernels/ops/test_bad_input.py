"""Every documented error of the ops: one sentence that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from robust_moe_kernels.dispatch import IMPLEMENTATIONS, ImplementationUnavailable
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.apgd import apgd_step, apgd_track
from robust_moe_kernels.ops.attack_step import pgd_step, random_start
from robust_moe_kernels.ops.expert_block import scale_shift
from robust_moe_kernels.ops.expert_conv import conv_dgrad, conv_forward, conv_plan, conv_wgrad, expert_conv
from robust_moe_kernels.ops.expert_mlp import expert_mlp
from robust_moe_kernels.ops.gate import top_k_gate
from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import Route, sort_by_expert

LOGITS = torch.zeros(3, 4)
INDICES = torch.zeros(3, 2, dtype=torch.int64)
IMAGES = torch.full((2, 3, 4, 4), 0.5)
PAIR = torch.zeros(3, 3, 4, 4)  # whose first two and last two images share one
FLAG = torch.tensor(False)
META = torch.device("meta")  # a second device that every machine has


def route() -> Route:
    return sort_by_expert(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3)


def gate(**changes) -> object:
    return top_k_gate(**{"logits": LOGITS, "top_k": 2} | changes)


def sort(**changes) -> object:
    return sort_by_expert(**{"indices": INDICES, "num_experts": 4} | changes)


def send(**changes) -> object:
    return dispatch(**{"x": torch.zeros(3, 5), "route": route()} | changes)


def merge(**changes) -> object:
    return combine(**{"y": torch.zeros(6, 5), "route": route(), "weights": torch.ones(3, 2)} | changes)


def step(**changes) -> object:
    return pgd_step(**{"x": IMAGES, "grad": IMAGES, "x0": IMAGES, "eps": 0.1, "alpha": 0.05} | changes)


def start(**changes) -> object:
    return random_start(**{"x0": IMAGES, "eps": 0.1, "seed": 0} | changes)


def climb(**changes) -> object:
    images = dict.fromkeys(("x", "previous", "grad", "x0"), IMAGES)
    return apgd_step(**images | {"eta": torch.full((2,), 0.2), "eps": 0.1} | changes)


def track(**changes) -> object:
    kept = {name: torch.zeros_like(IMAGES) for name in ("x_best", "grad_best", "x_fooled")}
    rows = dict.fromkeys(("improved", "fooled"), torch.tensor([True, False]))
    return apgd_track(**{"x": IMAGES, "grad": IMAGES} | rows | kept | changes)


ROWS = torch.zeros(4, 2, 5, 5)
FILTERS = torch.zeros(3, 2, 2, 3, 3)
OFFSETS = torch.tensor([0, 1, 1, 4])
UNIT = Geometry((1, 1), (0, 0), (1, 1))


def convolve(**changes) -> object:
    return expert_conv(**{"x": ROWS, "weight": FILTERS, "offsets": OFFSETS} | changes)


def convolve_raw(impl: str = "auto") -> object:
    return conv_forward(ROWS, FILTERS, OFFSETS, None, [], UNIT, impl)


def convolve_with(geometry: Geometry) -> object:
    return conv_forward(ROWS, FILTERS, OFFSETS, None, [], geometry)


def convolve_back(impl: str = "auto") -> object:
    return conv_dgrad(ROWS[:, :, 2:, 2:], FILTERS, OFFSETS, [], 5, 5, UNIT, impl)


def convolve_plan(impl: str = "auto") -> object:
    return conv_plan(FILTERS, OFFSETS, 4, 5, 5, False, UNIT, impl)


def convolve_filters(impl: str = "auto") -> object:
    return conv_wgrad(ROWS, ROWS[:, :, 2:, 2:], OFFSETS, None, FILTERS, UNIT, impl)


def normalize(impl: str = "auto") -> object:
    return scale_shift(ROWS, OFFSETS, torch.ones(3, 2), torch.zeros(3, 2), True, impl)


def transform(impl: str = "auto", **changes) -> object:
    layers = (torch.ones(3, 6, 5), None, torch.ones(3, 5, 6), None)
    return expert_mlp(torch.zeros(3, 5), *layers, changes.get("route", route()), torch.ones(3, 2), "relu", impl=impl)


class Bad(NamedTuple):
    call: Callable[..., object]
    changes: dict[str, object]
    error: type[Exception]
    message: str


TYPES = "float32 or float64 or float16 or bfloat16"
BAD = (
    Bad(gate, {"logits": [[1.0, 2.0]]}, TypeError, "logits: expected a tensor, got list"),
    Bad(gate, {"logits": INDICES}, TypeError, f"logits: expected dtype {TYPES}, got int64"),
    Bad(gate, {"logits": torch.zeros(4)}, ValueError, "logits: expected shape [B, E] with E >= 1, got [4]"),
    Bad(gate, {"logits": torch.zeros(2, 3, 4)}, ValueError, "logits: expected shape [B, E] with E >= 1, got [2, 3, 4]"),
    Bad(gate, {"logits": torch.zeros(3, 0)}, ValueError, "logits: expected shape [B, E] with E >= 1, got [3, 0]"),
    Bad(gate, {"top_k": 0}, ValueError, "top_k: expected 1 <= k <= E = 4, got 0"),
    Bad(gate, {"top_k": -1}, ValueError, "top_k: expected 1 <= k <= E = 4, got -1"),
    Bad(gate, {"top_k": 5}, ValueError, "top_k: expected 1 <= k <= E = 4, got 5"),
    Bad(sort, {"indices": [[0, 1]]}, TypeError, "indices: expected a tensor, got list"),
    Bad(sort, {"indices": INDICES.int()}, TypeError, "indices: expected dtype int64, got int32"),
    Bad(sort, {"indices": INDICES[0]}, ValueError, "indices: expected shape [B, k] with k >= 1, got [2]"),
    Bad(sort, {"indices": INDICES[:, :0]}, ValueError, "indices: expected shape [B, k] with k >= 1, got [3, 0]"),
    Bad(sort, {"num_experts": 0}, ValueError, "num_experts: expected E >= 1, got 0"),
    Bad(sort, {"indices": INDICES - 1}, ValueError, "indices: expected experts in [0, 4), got values from -1 to -1"),
    Bad(sort, {"indices": INDICES + 4}, ValueError, "indices: expected experts in [0, 4), got values from 4 to 4"),
    Bad(send, {"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    Bad(send, {"x": torch.zeros(3, 5).int()}, TypeError, f"x: expected dtype {TYPES}, got int32"),
    Bad(send, {"x": torch.zeros(4, 5)}, ValueError, "x: expected shape [3, ...], got [4, 5]"),
    Bad(send, {"x": torch.zeros(3)}, ValueError, "x: expected shape [3, ...], got [3]"),
    Bad(
        send,
        {"x": torch.zeros(3, 5, device=META)},
        ValueError,
        "route.order: expected a tensor on meta (the device of x), got cpu",
    ),
    Bad(merge, {"y": 1.0}, TypeError, "y: expected a tensor, got float"),
    Bad(merge, {"y": torch.zeros(6, 5).bool()}, TypeError, f"y: expected dtype {TYPES}, got bool"),
    Bad(merge, {"y": torch.zeros(3, 5)}, ValueError, "y: expected shape [6, ...], got [3, 5]"),
    Bad(merge, {"weights": None}, TypeError, "weights: expected a tensor, got NoneType"),
    Bad(merge, {"weights": torch.ones(3, 2).int()}, TypeError, f"weights: expected dtype {TYPES}, got int32"),
    Bad(merge, {"weights": torch.ones(6)}, ValueError, "weights: expected shape [3, 2] ([B, k]), got [6]"),
    Bad(merge, {"weights": torch.ones(2, 3)}, ValueError, "weights: expected shape [3, 2] ([B, k]), got [2, 3]"),
    Bad(
        merge,
        {"weights": torch.ones(3, 2, device=META)},
        ValueError,
        "weights: expected a tensor on cpu (the device of y), got meta",
    ),
    Bad(convolve, {"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    Bad(convolve, {"x": ROWS.int()}, TypeError, f"x: expected dtype {TYPES}, got int32"),
    Bad(convolve, {"x": ROWS[0]}, ValueError, "x: expected shape [R, I, H, W], got [2, 5, 5]"),
    Bad(convolve, {"weight": 1.0}, TypeError, "weight: expected a tensor, got float"),
    Bad(convolve, {"weight": FILTERS.half()}, TypeError, "weight: expected dtype float32, got float16"),
    Bad(
        convolve,
        {"weight": FILTERS[0]},
        ValueError,
        "weight: expected shape [E, O, 2, kh, kw], all >= 1, got [2, 2, 3, 3]",
    ),
    Bad(
        convolve,
        {"weight": FILTERS[:, :, :1]},
        ValueError,
        "weight: expected shape [E, O, 2, kh, kw], all >= 1, got [3, 2, 1, 3, 3]",
    ),
    Bad(
        convolve,
        {"weight": FILTERS.to(META)},
        ValueError,
        "weight: expected a tensor on cpu (the device of x), got meta",
    ),
    Bad(convolve, {"offsets": [0, 1, 1, 4]}, TypeError, "offsets: expected a tensor, got list"),
    Bad(convolve, {"offsets": OFFSETS.int()}, TypeError, "offsets: expected dtype int64, got int32"),
    Bad(convolve, {"offsets": OFFSETS[1:]}, ValueError, "offsets: expected shape [4], got [3]"),
    Bad(
        convolve,
        {"offsets": OFFSETS.to(META)},
        ValueError,
        "offsets: expected a tensor on cpu (the device of x), got meta",
    ),
    Bad(
        convolve,
        {"offsets": OFFSETS + 1},
        ValueError,
        "offsets: expected numbers that rise from 0 to R = 4, got [1, 2, 2, 5]",
    ),
    Bad(convolve_with, {"geometry": (1,) * 6}, TypeError, "geometry: expected a Geometry, got tuple"),
    Bad(convolve, {"stride": 2}, ValueError, "stride: expected two integers >= 1, got 2"),
    Bad(convolve, {"stride": (0, 1)}, ValueError, "stride: expected two integers >= 1, got (0, 1)"),
    Bad(convolve, {"padding": (0, -1)}, ValueError, "padding: expected two integers >= 0, got (0, -1)"),
    Bad(convolve, {"dilation": (1, 0)}, ValueError, "dilation: expected two integers >= 1, got (1, 0)"),
    Bad(
        convolve,
        {"dilation": (3, 1)},
        ValueError,
        "x: expected maps that give an output of at least 1x1, got [4, 2, 5, 5] -> [-1, 3]",
    ),
    Bad(step, {"x": "image"}, TypeError, "x: expected a tensor, got str"),
    Bad(step, {"x": IMAGES.bfloat16()}, TypeError, "x: expected dtype float32 or float64, got bfloat16"),
    Bad(step, {"x": IMAGES.byte()}, TypeError, "x: expected dtype float32 or float64, got uint8"),
    Bad(step, {"x": IMAGES[0, 0, 0]}, ValueError, "x: expected at least 2 dimensions [B, ...], got shape [4]"),
    Bad(step, {"grad": None}, TypeError, "grad: expected a tensor, got NoneType"),
    Bad(step, {"grad": IMAGES.long()}, TypeError, f"grad: expected dtype {TYPES}, got int64"),
    Bad(
        step,
        {"grad": IMAGES[:1]},
        ValueError,
        "grad: expected shape [2, 3, 4, 4] (the shape of x), got [1, 3, 4, 4]",
    ),
    Bad(step, {"x0": 0.5}, TypeError, "x0: expected a tensor, got float"),
    Bad(step, {"x0": IMAGES.double()}, TypeError, "x0: expected dtype float32, got float64"),
    Bad(step, {"x0": IMAGES[0]}, ValueError, "x0: expected shape [2, 3, 4, 4] (the shape of x), got [3, 4, 4]"),
    Bad(
        step,
        {"grad": IMAGES.to(META)},
        ValueError,
        "grad: expected a tensor on cpu (the device of x), got meta",
    ),
    Bad(step, {"x0": IMAGES.to(META)}, ValueError, "x0: expected a tensor on cpu (the device of x), got meta"),
    Bad(step, {"eps": -0.1}, ValueError, "eps: expected a finite number >= 0, got -0.1"),
    Bad(step, {"eps": float("nan")}, ValueError, "eps: expected a finite number >= 0, got nan"),
    Bad(step, {"eps": float("inf")}, ValueError, "eps: expected a finite number >= 0, got inf"),
    Bad(step, {"alpha": -1}, ValueError, "alpha: expected a finite number >= 0, got -1"),
    Bad(step, {"alpha": float("nan")}, ValueError, "alpha: expected a finite number >= 0, got nan"),
    Bad(step, {"nonfinite": True}, TypeError, "nonfinite: expected a tensor, got bool"),
    Bad(step, {"nonfinite": torch.zeros(())}, TypeError, "nonfinite: expected dtype bool, got float32"),
    Bad(step, {"nonfinite": FLAG[None]}, ValueError, "nonfinite: expected shape [] (a scalar), got [1]"),
    Bad(
        step,
        {"nonfinite": FLAG.to(META)},
        ValueError,
        "nonfinite: expected a tensor on cpu (the device of x), got meta",
    ),
    Bad(step, {"norm": "linf"}, ValueError, "norm: expected one of Linf, L2, got 'linf'"),
    Bad(start, {"x0": IMAGES.half()}, TypeError, "x0: expected dtype float32 or float64, got float16"),
    Bad(start, {"x0": IMAGES[0, 0, 0]}, ValueError, "x0: expected at least 2 dimensions [B, ...], got shape [4]"),
    Bad(start, {"eps": -1.0}, ValueError, "eps: expected a finite number >= 0, got -1.0"),
    Bad(start, {"stream": -1}, ValueError, "stream: expected an integer in [0, 2^32), got -1"),
    Bad(start, {"stream": 2**32}, ValueError, "stream: expected an integer in [0, 2^32), got 4294967296"),
    Bad(start, {"seed": 2**64}, ValueError, "seed: expected a 64-bit integer, got 18446744073709551616"),
    Bad(start, {"seed": -(2**63) - 1}, ValueError, "seed: expected a 64-bit integer, got -9223372036854775809"),
    Bad(start, {"seed": torch.tensor(2)}, ValueError, "seed: expected a 64-bit integer, got 2"),
    Bad(start, {"norm": "L1"}, ValueError, "norm: expected one of Linf, L2, got 'L1'"),
    Bad(start, {"sample_index": [0, 1]}, TypeError, "sample_index: expected a tensor, got list"),
    Bad(
        start,
        {"sample_index": torch.arange(2, dtype=torch.int32)},
        TypeError,
        "sample_index: expected dtype int64, got int32",
    ),
    Bad(start, {"sample_index": torch.arange(3)}, ValueError, "sample_index: expected shape [2] ([B]), got [3]"),
    Bad(
        start,
        {"sample_index": torch.arange(2, device=META)},
        ValueError,
        "sample_index: expected a tensor on cpu (the device of x0), got meta",
    ),
    Bad(climb, {"x": IMAGES.half()}, TypeError, "x: expected dtype float32 or float64, got float16"),
    Bad(climb, {"x": IMAGES[0, 0, 0]}, ValueError, "x: expected at least 2 dimensions [B, ...], got shape [4]"),
    Bad(climb, {"previous": None}, TypeError, "previous: expected a tensor, got NoneType"),
    Bad(climb, {"grad": IMAGES.bfloat16()}, TypeError, "grad: expected dtype float32, got bfloat16"),
    Bad(climb, {"x0": IMAGES[:1]}, ValueError, "x0: expected shape [2, 3, 4, 4] (the shape of x), got [1, 3, 4, 4]"),
    Bad(climb, {"x0": IMAGES.to(META)}, ValueError, "x0: expected a tensor on cpu (the device of x), got meta"),
    Bad(climb, {"eta": 0.2}, TypeError, "eta: expected a tensor, got float"),
    Bad(climb, {"eta": torch.ones(2).double()}, TypeError, "eta: expected dtype float32, got float64"),
    Bad(climb, {"eta": torch.ones(2, 1)}, ValueError, "eta: expected shape [2] ([B]), got [2, 1]"),
    Bad(climb, {"eps": float("inf")}, ValueError, "eps: expected a finite number >= 0, got inf"),
    Bad(climb, {"share": 1.5}, ValueError, "share: expected a number in [0, 1], got 1.5"),
    Bad(climb, {"share": float("nan")}, ValueError, "share: expected a number in [0, 1], got nan"),
    Bad(climb, {"nonfinite": True}, TypeError, "nonfinite: expected a tensor, got bool"),
    Bad(climb, {"nonfinite": torch.zeros(())}, TypeError, "nonfinite: expected dtype bool, got float32"),
    Bad(climb, {"nonfinite": FLAG[None]}, ValueError, "nonfinite: expected shape [] (a scalar), got [1]"),
    Bad(
        climb,
        {"nonfinite": FLAG.to(META)},
        ValueError,
        "nonfinite: expected a tensor on cpu (the device of x), got meta",
    ),
    Bad(climb, {"norm": "L1"}, ValueError, "norm: expected one of Linf, L2, got 'L1'"),
    Bad(track, {"x": IMAGES.long()}, TypeError, "x: expected dtype float32 or float64, got int64"),
    Bad(track, {"grad": 1}, TypeError, "grad: expected a tensor, got int"),
    Bad(track, {"improved": torch.ones(2)}, TypeError, "improved: expected dtype bool, got float32"),
    Bad(track, {"fooled": torch.ones(3) > 0}, ValueError, "fooled: expected shape [2] ([B]), got [3]"),
    Bad(track, {"x_best": IMAGES.double()}, TypeError, "x_best: expected dtype float32, got float64"),
    Bad(
        track,
        {"grad_best": torch.zeros(2, 3, 4, 8)[..., ::2]},
        ValueError,
        "grad_best: expected a contiguous tensor, got strides (96, 32, 8, 2)",
    ),
    Bad(track, {"x_best": IMAGES}, ValueError, "x_best: expected memory of its own, got memory that x has a part in"),
    Bad(
        track,
        {"x_best": PAIR[:2], "x_fooled": PAIR[1:]},
        ValueError,
        "x_best: expected memory of its own, got memory that x_fooled has a part in",
    ),
    Bad(
        track,
        {"x": IMAGES.contiguous(memory_format=torch.channels_last)},
        ValueError,
        "x_best: expected a channels-last tensor, got strides (48, 16, 4, 1)",
    ),
)


ROUTES = (
    (None, TypeError, "route: expected a Route, as sort_by_expert makes it, got NoneType"),
    (route()._replace(top_k=0), ValueError, "route.top_k: expected an integer k >= 1, got 0"),
    (route()._replace(top_k=True), ValueError, "route.top_k: expected an integer k >= 1, got True"),
    (route()._replace(order="x"), TypeError, "route.order: expected a tensor, got str"),
    (route()._replace(inverse=None), TypeError, "route.inverse: expected a tensor, got NoneType"),
    (route()._replace(offsets=[0, 2, 4, 6]), TypeError, "route.offsets: expected a tensor, got list"),
    (route()._replace(offsets=FLAG), TypeError, "route.offsets: expected dtype int64, got bool"),
    (route()._replace(order=INDICES), ValueError, "route.order: expected shape [R], got [3, 2]"),
    (route()._replace(inverse=INDICES[0]), ValueError, "route.inverse: expected shape [R] = [6], got [2]"),
)


@pytest.mark.parametrize("call", [send, merge, transform])
@pytest.mark.parametrize(("bad", "error", "message"), ROUTES, ids=[message for *_, message in ROUTES])
def test_what_is_no_route(call: Callable[..., object], bad: object, error: type[Exception], message: str) -> None:
    """Every operation that takes a route refuses it in the same words."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(route=bad)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.call.__name__}-{bad.message.split(', got')[0][:60]}")
def test_message(bad):
    with pytest.raises(bad.error, match="^" + re.escape(bad.message) + "$"):
        bad.call(**bad.changes)


CALLS = {
    "gate": (gate,),
    "routing": (sort,),
    "permute": (send, merge),
    "expert_conv": (convolve, convolve_raw, convolve_back, convolve_plan, convolve_filters),
    "expert_block": (normalize,),
    "expert_mlp": (transform,),
    "attack_step": (step, start),
    "apgd": (climb, track),
}


def test_every_op_is_called_here():
    assert set(CALLS) == set(OPS)


@pytest.mark.parametrize("call", [call for calls in CALLS.values() for call in calls], ids=lambda call: call.__name__)
def test_good_input_passes(call):
    """The defaults of the table above are valid, so each row fails for its own reason."""
    for impl in ("auto", "reference"):
        call(impl=impl)


@pytest.mark.parametrize("name", OPS)
def test_a_named_implementation_never_falls_back(name, monkeypatch):
    """Each implementation in turn is unable to run: naming it raises with the reason, whatever else could run."""
    for impl in IMPLEMENTATIONS:
        op = OPS[name]
        with monkeypatch.context() as patch:
            why_not = lambda asked, device, broken=impl: "it is out of order" if asked == broken else None  # noqa: E731
            patch.setattr(op, "why_not", why_not)
            for call in CALLS[name]:
                with pytest.raises(ImplementationUnavailable) as caught:
                    call(impl=impl)
                assert str(caught.value) == f"{name}: impl='{impl}' cannot run on cpu: it is out of order"


@pytest.mark.parametrize("name", OPS)
def test_an_unknown_implementation_is_refused(name):
    for call in CALLS[name]:
        with pytest.raises(ImplementationUnavailable, match=r"impl='cuda'.*expected one of reference, native, triton"):
            call(impl="cuda")


def test_unavailable_is_a_runtime_error():
    assert issubclass(ImplementationUnavailable, RuntimeError)
