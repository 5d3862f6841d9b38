"""One random valid call of every op with native code: the functions that are public and the raw ones below them.

``CALLS`` is the table. A new op is one function here, which draws the arguments of a call and says how far the native
result may be from the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from draws import FLOATS, Draw
from torch import Tensor

from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.apgd import apgd_step, apgd_track
from robust_moe_kernels.ops.attack_step import pgd_step, random_start, sample_cross_entropy
from robust_moe_kernels.ops.expert_conv import conv_dgrad, conv_forward, conv_wgrad, expert_conv
from robust_moe_kernels.ops.expert_mlp import ACTIVATIONS, expert_mlp
from robust_moe_kernels.ops.gate import pool_linear, top_k_gate, top_k_route
from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import sort_by_expert

__all__ = ["CALLS", "Call"]

RAW = torch.ops.robust_moe_kernels
IMAGES = (torch.float32, torch.float64)


@dataclass
class Call:
    """A call and its error bound, in units of the result's spacing: ``terms`` times ``magnitude``.

    ``magnitude`` is a number, added to the size of the result's element, or None: what the reference returns for the
    sizes of the arguments, which bounds any sum of products; ``spread``: the largest element of that, as Winograd's
    sums need.
    ``terms`` 0: the same bits. ``derived``: some arguments are results of others, and with one of them spoilt there is
    no right answer.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    terms: float = 0.0
    magnitude: float | None = None
    spread: bool = False
    derived: bool = False


def top(*tensors: Any) -> float:
    """1 + the largest size of an element."""
    sizes = [t.double().abs().nan_to_num(0, 0, 0).max().item() for t in tensors if isinstance(t, Tensor) and t.numel()]
    return 1.0 + max(sizes, default=0.0)


def gate(d: Draw) -> Call:
    experts = d.size(20, 1)
    logits = d.floats(d.batch(200), experts, dtype=d.choice(FLOATS))
    how = {"renormalize": d.chance(0.5), "straight_through": d.chance(0.5)}
    function = d.choice((top_k_gate, top_k_route))
    return Call(function, {"logits": logits, "top_k": d.size(experts, 1), **how}, 64, top(logits) ** 2)


def gate_backward(d: Draw) -> Call:
    experts = d.size(12, 1)
    logits = d.floats(d.batch(100), experts, dtype=d.choice(FLOATS))
    gate = top_k_gate(logits, d.size(experts, 1), impl="reference")
    kind = gate.scores.dtype
    gradients = {
        f"d_{name}": d.floats(*getattr(gate, name).shape, dtype=kind) if d.chance(0.6) else None
        for name in ("scores", "weights", "mean_scores", "mean_entropy", "mean_square_lse")
    }
    inputs = {"logits": logits, "scores": gate.scores, "indices": gate.indices}
    magnitude = 8 * experts * top(logits) * top(*gradients.values())
    arguments = inputs | gradients | {"mode": d.choice((0, 1, 2))}
    return Call(RAW.top_k_gate_backward, arguments, 64, magnitude, derived=True)


def pool(d: Draw) -> Call:
    batch, channels, (height, width) = d.batch(9), max(d.channels(), 1), d.map_size(1)
    kind = d.choice(IMAGES)
    x = d.floats(batch, channels, height, width, dtype=d.choice(FLOATS))
    weight = d.floats(d.size(6, 1), channels, dtype=kind)
    bias = d.floats(weight.shape[0], dtype=kind) if d.chance(0.5) else None
    return Call(pool_linear, {"x": x, "weight": weight, "bias": bias}, height * width + channels + 8)


def pool_backward(d: Draw) -> Call:
    kind, experts, (height, width) = d.choice(IMAGES), d.size(6, 1), d.map_size(1)
    inputs = {
        "d_logits": d.floats(d.batch(9), experts, dtype=kind),
        "weight": d.floats(experts, max(d.channels(), 1), dtype=kind),
    }
    like = {"height": height, "width": width, "channels_last": d.chance(0.5), "dtype": d.choice(FLOATS)}
    return Call(RAW.pool_linear_backward, inputs | like, experts + 8)


def sort(d: Draw) -> Call:
    experts = d.size(40, 1)
    return Call(sort_by_expert, {"indices": d.integers(0, experts, d.size(90), d.size(4, 1)), "num_experts": experts})


def _maps(d: Draw, batch: int, dtype: torch.dtype) -> Tensor:
    """[batch, ...] of two to five dimensions."""
    return d.floats(batch, *(d.size(9) for _ in range(d.random.randint(1, 4))), dtype=dtype)


def send(d: Draw) -> Call:
    batch, top_k = d.batch(12), d.size(4, 1)
    return Call(dispatch, {"x": _maps(d, batch, d.choice(FLOATS)), "route": d.route(batch, top_k, d.size(6, 1))})


def send_weighted(d: Draw) -> Call:
    batch, top_k, kind = d.batch(12), d.size(4, 1), d.choice(FLOATS)
    route = d.route(batch, top_k, d.size(6, 1))
    weights = d.floats(batch, top_k, dtype=torch.promote_types(kind, torch.float32)) if d.chance(0.8) else None
    pairs = {"order": route.order, "inverse": route.inverse, "weights": weights, "top_k": top_k}
    return Call(RAW.dispatch, {"x": _maps(d, batch, kind)} | pairs)


def merge(d: Draw) -> Call:
    batch, top_k, kind = d.batch(12), d.size(4, 1), d.choice(FLOATS)
    route = d.route(batch, top_k, d.size(6, 1))
    y = _maps(d, batch * top_k, kind)
    if d.chance(0.3):
        pairs = {"order": route.order, "inverse": route.inverse, "weights": None, "top_k": top_k}
        return Call(RAW.combine, {"y": y} | pairs, top_k + 2)
    return Call(combine, {"y": y, "route": route, "weights": d.floats(batch, top_k, dtype=d.choice(FLOATS))}, top_k + 2)


def row_dot(d: Draw) -> Call:
    batch, top_k, kind = d.batch(12), d.size(4, 1), d.choice(FLOATS)
    x = _maps(d, batch, kind)
    route = d.route(batch, top_k, d.size(6, 1))
    y = d.floats(batch * top_k, *x.shape[1:], dtype=kind)
    pairs = {"order": route.order, "inverse": route.inverse, "top_k": top_k}
    return Call(RAW.row_dot, {"x": x, "y": y} | pairs, x.shape[1:].numel() + 2)


def _convolution(d: Draw) -> tuple[dict[str, Any], Tensor, int, int, float]:
    """A convolution's arguments, the gradient of its output, its map's size and the length of its longest sum."""
    winograd, d.large = d.chance(0.4), False
    experts, inputs, outputs = d.size(4, 1), max(d.channels(), 1), max(d.channels(), 1)
    rows, offsets = d.rows(experts, 6)
    if winograd:
        inputs, outputs = max(inputs, 16), max(outputs, 16)
        kernel, geometry = (3, 3), Geometry((1, 1), (d.size(2), d.size(2)), (1, 1))
        size = (d.choice((4, 6, 8, 7)), d.choice((4, 6, 8)))
    else:
        kernel = (d.size(4, 1), d.size(4, 1))
        pairs = [(d.size(3, least), d.size(3, least)) for least in (1, 0, 1)]
        geometry, size = Geometry(*pairs), (d.size(9, 1), d.size(9, 1))
        if min(geometry.output_size(*size, kernel)) < 1:
            geometry = Geometry(geometry.stride, kernel, (1, 1))
    kind = d.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    weight = d.floats(experts, outputs, inputs, *kernel, dtype=kind)
    if d.chance(0.7):
        weight = weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)  # as modules.experts keeps them
    sample, batch = None, rows
    if d.chance(0.5):
        batch = d.size(5, 1)
        sample = torch.randint(0, batch, (rows,), generator=d.generator)
    out_size = geometry.output_size(*size, kernel)
    arguments = {
        "x": d.floats(batch, inputs, *size, dtype=kind), "weight": weight, "offsets": offsets, "sample": sample,
        "geometry": geometry,
    }  # fmt: skip
    terms = kernel[0] * kernel[1] * max(inputs, outputs) + rows * out_size[0] * out_size[1] + 16
    return arguments, d.floats(rows, outputs, *out_size, dtype=kind), *size, 16.0 * terms


def convolve(d: Draw) -> Call:
    arguments, d_out, height, width, terms = _convolution(d)
    which = d.choice(("public", "forward", "dgrad", "wgrad"))
    if which == "public":
        geometry, sample = arguments.pop("geometry"), arguments.pop("sample")
        if sample is not None:
            arguments["x"] = arguments["x"][sample]
        return Call(expert_conv, arguments | geometry._asdict(), terms, spread=True)
    if which == "forward":
        return Call(conv_forward, arguments | {"plan": []}, terms, spread=True)
    if which == "wgrad":
        return Call(conv_wgrad, arguments | {"d_out": d_out}, terms, spread=True)
    del arguments["x"], arguments["sample"]
    sizes = {"d_out": d_out, "plan": [], "height": height, "width": width}
    return Call(conv_dgrad, arguments | sizes, terms, spread=True)


def mlp(d: Draw) -> Call:
    """Now and then the pairs of one more expert are dropped."""
    kind, activation = d.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)), d.choice([*ACTIVATIONS])
    experts, tokens, top_k = d.size(5, 1), d.batch(12), d.size(3, 1)
    channels, hidden, outputs = (max(d.channels(), 1) for _ in range(3))
    inner, pairs = ACTIVATIONS[activation].inputs(hidden), tokens * top_k
    route = d.route(tokens, top_k, experts + d.chance(0.3))
    route = route._replace(offsets=route.offsets[: experts + 1])
    draw = partial(d.floats, dtype=kind)
    operands = {
        "x": draw(tokens, channels), "weight1": draw(experts, inner, channels),
        "weight2": draw(experts, outputs, hidden), "bias2": draw(experts, outputs) if d.chance(0.7) else None,
        "weights": d.floats(tokens, top_k), "activation": activation,
    }  # fmt: skip
    # Derivatives are at most 2.3 times those at an argument's size. What lies between two products may have 16 bits.
    terms = (
        40.0 * (channels + hidden + outputs + pairs + 16) + 8.0 * torch.finfo(kind).eps / torch.finfo(torch.float32).eps
    )
    if d.chance(0.5):
        more = {"bias1": draw(experts, inner) if d.chance(0.7) else None, "route": route}
        return Call(expert_mlp, operands | more, terms)
    more = {"d_y": draw(tokens, outputs), "z": draw(pairs, inner), "needs": [d.chance(0.7) for _ in range(6)]}
    tables = {"order": route.order, "inverse": route.inverse, "offsets": route.offsets}
    return Call(RAW.expert_mlp_backward, operands | more | tables, terms)


def _batch(d: Draw) -> tuple[int, ...]:
    return (d.batch(9), *(d.size(9) for _ in range(d.random.randint(1, 3))))


def _gradient(d: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of an attack: now and then with a number that is none."""
    gradient = d.floats(*shape, dtype=dtype)
    if gradient.numel() and d.chance(0.2):
        gradient = gradient.clone()  # where elements share their memory
        gradient[d.place(gradient)] = d.choice((float("nan"), float("inf"), -0.0))
    return gradient


def step(d: Draw) -> Call:
    shape, kind, norm = _batch(d), d.choice(IMAGES), d.choice(("Linf", "L2"))
    inputs = {"x": d.images(*shape, dtype=kind), "grad": _gradient(d, shape, d.choice(FLOATS))}
    rest = {"x0": d.images(*shape, dtype=kind), "eps": d.number(0, 0.5), "alpha": d.number(0, 0.2), "norm": norm}
    flag = {"nonfinite": d.choice((None, torch.tensor(False)))}
    return Call(pgd_step, inputs | rest | flag, 0 if norm == "Linf" else 16, 1.0)


def start(d: Draw) -> Call:
    shape, norm = _batch(d), d.choice(("Linf", "L2"))
    x0 = d.images(*shape, dtype=d.choice(IMAGES))
    index = d.integers(-(2**62), 2**62, shape[0]) if d.chance(0.5) else None
    numbers = {"seed": d.random.randrange(-(2**63), 2**64), "stream": d.random.randrange(2**32)}
    arguments = {"x0": x0, "eps": d.number(0, 0.5), "sample_index": index, "norm": norm}
    return Call(random_start, arguments | numbers, 0 if norm == "Linf" else 16, 1.0)


def climb(d: Draw) -> Call:
    shape, kind, norm = _batch(d), d.choice(IMAGES), d.choice(("Linf", "L2"))
    images = {name: d.images(*shape, dtype=kind) for name in ("x", "previous", "x0")}
    rest = {"grad": _gradient(d, shape, kind), "eta": d.images(shape[0], dtype=kind), "norm": norm}
    numbers = {"eps": d.number(0, 0.5), "share": d.number(0, 1), "nonfinite": d.choice((None, torch.tensor(False)))}
    return Call(apgd_step, images | rest | numbers, 0 if norm == "Linf" else 64, 1.0)


def track(d: Draw) -> Call:
    shape, kind = _batch(d), d.choice(IMAGES)
    x = d.images(*shape, dtype=kind)
    rows = {"improved": d.flags(shape[0]), "fooled": d.flags(shape[0])}
    kept = {name: torch.zeros_like(x.contiguous()) for name in ("x_best", "grad_best", "x_fooled")}
    return Call(apgd_track, {"x": x.contiguous(), "grad": d.floats(*shape, dtype=kind)} | rows | kept)


def cross_entropy(d: Draw) -> Call:
    classes, samples = d.size(40, 1), d.batch(60)
    logits, y = d.floats(samples, classes, dtype=d.choice(FLOATS)), d.integers(0, classes, samples)
    if d.chance(0.5):
        return Call(sample_cross_entropy, {"logits": logits, "y": y}, 16, top(logits))
    d_loss = d.floats(samples, dtype=torch.promote_types(logits.dtype, torch.float32))
    gradient = {"d_loss": d_loss, "logits": logits, "y": y}
    return Call(RAW.sample_cross_entropy_backward, gradient, 16 * top(logits), top(d_loss))


def _routed(d: Draw) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor, tuple[int, ...]]:
    """(what draws rows' maps, what draws a table, offsets, shape of the maps)."""
    experts, channels, kind = d.size(5, 1), d.channels(), d.choice(FLOATS)
    rows, offsets = d.rows(experts, 4)
    shape = (rows, channels, *d.map_size())
    table = partial(d.floats, experts, channels, dtype=torch.promote_types(kind, torch.float32))
    return partial(d.floats, *shape, dtype=kind), table, offsets, shape


def sums(d: Draw) -> Call:
    rows, table, offsets, shape = _routed(d)
    masked = d.chance(0.5)
    tables = {name: table() if masked else None for name in ("scale", "shift")}
    maps = {"value": rows(), "other": rows(), "offsets": offsets}
    return Call(RAW.column_sums, maps | tables | {"shares": d.size(4, 1)}, shape[0] * shape[2] * shape[3] + 8)


def shift(d: Draw) -> Call:
    rows, table, offsets, _ = _routed(d)
    tables = {name: table() for name in ("scale", "shift")}
    return Call(RAW.scale_shift, {"z": rows(), "offsets": offsets, "relu": d.chance(0.5)} | tables, 4)


def norm_backward(d: Draw) -> Call:
    rows, table, offsets, _ = _routed(d)
    training, masked = d.chance(0.5), d.chance(0.5)
    there = {"p": True, "q": training, "r": training, "scale": masked, "shift": masked}
    tables = {name: table() if wanted else None for name, wanted in there.items()}
    return Call(RAW.norm_backward, {"d": rows(), "z": rows(), "offsets": offsets} | tables, 8)


def _shares(d: Draw, *names: str) -> dict[str, Any]:
    """Sums over an expert's pixels, and tables of these names."""
    experts, channels = d.size(5, 1), d.channels()
    sums = torch.randn(2, d.size(4, 1), experts, channels, generator=d.generator, dtype=torch.float64)
    sums[1] = sums[1].abs() + sums[0].square()  # a variance that is no difference of equal numbers
    tables = {name: d.floats(experts, channels) for name in names}
    return {"shares": sums, "offsets": d.rows(experts, 4)[1], "pixels": d.size(9)} | tables


def finalise(d: Draw) -> Call:
    arguments = _shares(d, "weight", "bias", "running_mean", "running_var")
    rest = {"tracked": d.integers(0, 9, arguments["weight"].shape[0]), "eps": 1e-5, "momentum": d.number(0, 1)}
    return Call(RAW.norm_finalise, arguments | rest, 4, 1e-3)


def finalise_backward(d: Draw) -> Call:
    arguments = _shares(d, "scale", "mean", "rstd") | {"training": d.chance(0.5)}
    return Call(RAW.norm_finalise_backward, arguments, 16, 1e-8 * top(*arguments.values()) ** 4)


def head(d: Draw) -> Call:
    batch, top_k, experts, channels = d.batch(6), d.size(3, 1), d.size(5, 1), d.channels()
    route, size = d.route(batch, top_k, experts), d.map_size()
    rows, normed, kind = batch * top_k, d.chance(0.5), d.choice(FLOATS)
    table = partial(d.floats, dtype=torch.promote_types(kind, torch.float32))
    tables = {name: table(experts, channels) for name in ("scale", "shift")}
    tables |= {name: table(experts, channels) if normed else None for name in ("skip_scale", "skip_shift")}
    maps = {
        name: d.floats(count, channels, *size, dtype=kind)
        for name, count in (("z", rows), ("x", rows if normed else batch))
    }
    pairs = {"order": route.order, "inverse": route.inverse, "offsets": route.offsets}
    arguments = maps | tables | pairs | {"weights": table(batch, top_k)}
    function = d.choice((RAW.head_forward, RAW.head_backward, RAW.head_norm_backward))
    if function is not RAW.head_forward:
        arguments["d_out"] = d.floats(batch, channels, *size, dtype=kind)
    return Call(function, arguments, channels * size[0] * size[1] + top_k + 8)


def sum_rows(d: Draw) -> Call:
    batch, top_k = d.batch(6), d.size(3, 1)
    rows = partial(d.floats, batch * top_k, d.channels(), *d.map_size(), dtype=d.choice(FLOATS))
    inverse = torch.randperm(batch * top_k, generator=d.generator)
    return Call(
        RAW.sum_rows,
        {"rows": rows(), "other": rows(), "inverse": inverse, "top_k": top_k},
        top_k + 2,
    )


CALLS: tuple[Callable[[Draw], Call], ...] = (
    gate, gate_backward, pool, pool_backward, sort, send, send_weighted, merge, row_dot, convolve, convolve, convolve,
    mlp, mlp, step, start, climb, track, cross_entropy, sums, shift, norm_backward, finalise, finalise_backward, head,
    head, sum_rows,
)  # fmt: skip
