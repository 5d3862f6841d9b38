"""Every operation that takes tensors, with valid arguments: what the checks of operands are tried on.

An operation is small and valid as it stands here; ``operand_checks`` changes its arguments. No two sizes of one
operation are the same, so that a mix-up shows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels import ops
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops import apgd, attack_step, expert_block, expert_conv, expert_mlp, gate, permute, routing
from robust_moe_kernels.ops.routing import Route, sort_by_expert

B, K, E, C, H, W, O = 3, 2, 4, 5, 7, 8, 6  # samples, experts of each, experts, channels, pixels, outputs
R = B * K
RAW = torch.ops.robust_moe_kernels
UNIT = [1, 1, 1, 1, 1, 1]


class Case(NamedTuple):
    """One operation with valid arguments, ``impl`` apart."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    scalars: dict[str, tuple[Any, ...]] = {}  # values out of range of arguments that are no tensors  # noqa: RUF012
    indices: tuple[str, ...] = ()  # arguments whose numbers are places, so that one too large or negative is wrong

    def tensors(self) -> dict[str, Tensor]:
        """The arguments that are tensors."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}


def registered() -> set[str]:
    """Names of all operations that importing the package registers with PyTorch."""
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("robust_moe_kernels::") for name in names if name.startswith("robust_moe_kernels::")}


def public() -> set[str]:
    """Names of the public functions of the packages under ``ops`` that take tensors."""
    packages = (apgd, attack_step, expert_block, expert_conv, expert_mlp, gate, permute, routing)
    if {package.__name__.rsplit(".", 1)[-1] for package in packages} != set(ops.OPS):
        raise RuntimeError("packages: expected those of OPS")
    functions = {name: getattr(package, name) for package in packages for name in package.__all__}
    checks = {name for name in functions if name.startswith("expect_")}  # of what an operation returned
    return {name for name, value in functions.items() if callable(value) and not isinstance(value, type)} - checks


def _numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def _maps(rows: int, channels: int = C) -> Tensor:
    return _numbers(rows, channels, H, W).contiguous(memory_format=torch.channels_last)


def _table(seed: int) -> Tensor:
    return _numbers(E, C, seed=seed) + 0.25


def _route() -> Route:
    return sort_by_expert(torch.tensor([[0, 3], [3, 1], [0, 1]]), E)


def _sent(
    call: Callable[..., Tensor], data: Tensor, order: Any, inverse: Any, top_k: Any, *rest: Any, impl: str
) -> Any:
    route = _route()._replace(order=order, inverse=inverse, top_k=top_k)
    return call(data, route, *rest, impl=impl)


def _dispatch(x: Any, order: Any, inverse: Any, top_k: Any, impl: str) -> Any:
    return _sent(permute.dispatch, x, order, inverse, top_k, impl=impl)


def _combine(y: Any, order: Any, inverse: Any, top_k: Any, weights: Any, impl: str) -> Any:
    return _sent(permute.combine, y, order, inverse, top_k, weights, impl=impl)


def _expert_mlp(order: Any, inverse: Any, offsets: Any, impl: str, **operands: Any) -> Any:
    route = _route()._replace(order=order, inverse=inverse, offsets=offsets)
    return expert_mlp.expert_mlp(**operands, route=route, impl=impl)


def _geometric(call: Callable[..., Any], *, geometry: list[int], **arguments: Any) -> Any:
    return call(**arguments, geometry=Geometry.of_numbers(geometry))


def _share_count(value: Tensor, offsets: Tensor, impl: str) -> int:
    return expert_block.share_count(value, offsets)


def raw_cases() -> dict[str, Case]:
    """A case for each registered operation."""
    r = _route()
    index = {"order": r.order, "inverse": r.inverse}
    route = {**index, "offsets": r.offsets}
    weights = _numbers(B, K)
    scale = {"scale": _table(1), "shift": _table(2) - 0.5}
    filters = _numbers(E, O, C, 3, 3)
    whole = {"geometry": ([0, 1, 1, 1, 1, 1], [1, 1, -1, 1, 1, 1], [1, 1, 1, 1, 1], [*UNIT, 1], [1, 1, 1, 1, 9, 1],
             [1, 1, 2**40, 1, 1, 1])}  # fmt: skip
    ks = {"top_k": (0, -1, K + 1, R + 1)}
    shares = {"shares": _numbers(2, 3, E, C, dtype=torch.float64) + 1.0, "offsets": r.offsets, "pixels": H * W}
    norm = {name: _table(seed) for seed, name in enumerate(("weight", "bias", "running_mean", "running_var"))}
    head = {"z": _maps(R), **scale, "x": _maps(B), "skip_scale": None, "skip_shift": None, **route, "weights": weights}
    skipped = head | {"x": _maps(R), "skip_scale": _table(3), "skip_shift": _table(4)}
    images = dict.fromkeys(("x", "previous", "grad", "x0"), _numbers(B, C, H, W))
    logits = _numbers(B, E)
    labels = torch.tensor([0, 3, 1])
    gate_back = {
        "logits": logits, "scores": logits.softmax(1), "indices": logits.topk(K).indices, "d_scores": _numbers(B, E),
        "d_weights": _numbers(B, K), "d_mean_scores": _numbers(E), "d_mean_entropy": torch.tensor(0.5),
        "d_mean_square_lse": torch.tensor(0.25), "mode": 1,
    }  # fmt: skip
    layers = {"weight1": _numbers(E, 2 * H, C), "bias1": _numbers(E, 2 * H), "weight2": _numbers(E, O, H),
              "bias2": _numbers(E, O)}  # fmt: skip
    mlp = {"x": _numbers(B, C), **layers, "weights": weights, **route}
    mlp_back = {"d_y": _numbers(B, O), "z": _numbers(R, 2 * H) - 0.5, **{k: v for k, v in mlp.items() if k != "bias1"}}
    gated = {"activation": ("gelu", "silu ", "")}
    norms = {"norm": ("linf", "", "L3")}
    flag = torch.tensor(False)
    kept = {name: torch.zeros(B, C, H, W) for name in ("x_best", "grad_best", "x_fooled")}
    rows = {"improved": torch.tensor([True, False, True]), "fooled": torch.tensor([False, True, False])}
    routed = ("order", "inverse", "offsets")
    mapped = {"height": (0, -1, H + 1), "width": (W - 1,)}
    return {
        "sort_by_expert": Case(RAW.sort_by_expert, {"indices": r.order.view(B, K) % E, "num_experts": E},
                               {"num_experts": (0, -1, 2, 2**40)}, ("indices",)),
        "dispatch": Case(RAW.dispatch, {"x": _numbers(B, C, H), **index, "weights": weights, "top_k": K}, ks,
                         routed[:2]),
        "combine": Case(RAW.combine, {"y": _numbers(R, C, H), **index, "weights": weights, "top_k": K}, ks,
                        routed[:2]),
        "row_dot": Case(RAW.row_dot, {"x": _numbers(B, C, H), "y": _numbers(R, C, H), **index, "top_k": K}, ks,
                        routed[:2]),
        "expert_conv_plan": Case(RAW.expert_conv_plan, {"weight": filters, "offsets": r.offsets, "rows": R, "height": H,
                                 "width": W, "backward": False, "geometry": UNIT},
                                 whole | {"rows": (-1, R - 1), "height": (0, -1), "width": (0, -5)}, ("offsets",)),
        "expert_conv_forward": Case(RAW.expert_conv_forward, {"x": _maps(B), "weight": filters, "offsets": r.offsets,
                                    "sample": r.sample, "plan": [], "geometry": UNIT},
                                    whole | {"plan": ([filters],)}, ("offsets", "sample")),
        "expert_conv_dgrad": Case(RAW.expert_conv_dgrad, {"d_out": _maps(R, O), "weight": filters, "offsets": r.offsets,
                                  "plan": [], "height": H, "width": W, "geometry": UNIT},
                                  whole | mapped | {"plan": ([filters],)}, ("offsets",)),
        "expert_conv_wgrad": Case(RAW.expert_conv_wgrad, {"x": _maps(B), "d_out": _maps(R, O), "offsets": r.offsets,
                                  "sample": r.sample, "weight": filters, "geometry": UNIT}, whole,
                                  ("offsets", "sample")),
        "expert_mlp_forward": Case(RAW.expert_mlp_forward, mlp | {"rows": R, "activation": "glu_gelu"},
                                   gated | {"rows": (-1, R - 1, R + 1)}, routed),
        "expert_mlp_backward": Case(RAW.expert_mlp_backward, mlp_back | {"activation": "glu_silu", "needs": [True] * 6},
                                    gated | {"needs": ([True] * 5, [], [False] * 7)}, routed),
        "column_sums": Case(RAW.column_sums, {"value": _maps(R), "other": _maps(R) + 1, "offsets": r.offsets, **scale,
                            "shares": 3}, {"shares": (0, -1, 2**40)}, ("offsets",)),
        "norm_finalise": Case(RAW.norm_finalise, {**shares, **norm, "tracked": torch.arange(E), "eps": 1e-5,
                              "momentum": 0.1}, {"pixels": (-1, 2**40)}, ("offsets",)),
        "norm_finalise_backward": Case(RAW.norm_finalise_backward, {**shares, "scale": _table(1), "mean": _table(2),
                                       "rstd": _table(3), "training": True}, {"pixels": (-1, 2**40)}, ("offsets",)),
        "scale_shift": Case(RAW.scale_shift, {"z": _maps(R), "offsets": r.offsets, **scale, "relu": True}, {},
                            ("offsets",)),
        "norm_backward": Case(RAW.norm_backward, {"d": _maps(R), "z": _maps(R), "offsets": r.offsets, "p": _table(3),
                              "q": _table(4), "r": _table(5), **scale}, {"q": (None,), "scale": (None,)}, ("offsets",)),
        "head_forward": Case(RAW.head_forward, head, {"skip_scale": (_table(3),)}, routed),
        "head_backward": Case(RAW.head_backward, {"d_out": _maps(B), **skipped}, {"skip_shift": (None,)}, routed),
        "head_norm_backward": Case(RAW.head_norm_backward, {"d_out": _maps(B), **skipped}, {"skip_scale": (None,)},
                                   routed),
        "sum_rows": Case(RAW.sum_rows, {"rows": _maps(R), "other": _maps(R), "inverse": r.inverse, "top_k": K},
                         {"top_k": (0, -1, R + 1, 4)}, ("inverse",)),
        "top_k_gate": Case(RAW.top_k_gate, {"logits": logits, "top_k": K, "mode": 1},
                           {"top_k": (0, -1, E + 1), "mode": (-1, 3)}),
        "top_k_route": Case(RAW.top_k_route, {"logits": logits, "top_k": K, "mode": 0},
                            {"top_k": (0, -1, E + 1), "mode": (-1, 3)}),
        "top_k_gate_backward": Case(RAW.top_k_gate_backward, gate_back, {"mode": (-1, 3)}, ("indices",)),
        "pool_linear": Case(RAW.pool_linear, {"x": _maps(B), "weight": _numbers(E, C), "bias": _numbers(E)}),
        "pool_linear_backward": Case(RAW.pool_linear_backward, {"d_logits": _numbers(B, E), "weight": _numbers(E, C),
                                     "height": H, "width": W, "channels_last": True, "dtype": torch.float32},
                                     {"height": (0, -1), "width": (0,), "dtype": (torch.int64,)}),
        "pgd_step": Case(RAW.pgd_step, {"x": images["x"], "grad": images["x"] - 0.5, "x0": images["x0"], "eps": 0.1,
                         "alpha": 0.05, "norm": "L2", "nonfinite": flag}, norms),
        "random_start": Case(RAW.random_start, {"x0": images["x0"], "sample_index": torch.arange(B), "eps": 0.1,
                             "seed": 1, "stream": 2, "norm": "Linf"}, norms | {"stream": (-1, 2**32)}),
        "apgd_step": Case(RAW.apgd_step, {**images, "eta": torch.full((B,), 0.2), "eps": 0.1, "share": 0.75,
                          "norm": "Linf", "nonfinite": flag}, norms),
        "apgd_track": Case(RAW.apgd_track, {"x": images["x"], "grad": images["grad"], **rows, **kept}),
        "sample_cross_entropy": Case(RAW.sample_cross_entropy, {"logits": logits, "y": labels}),
        "sample_cross_entropy_backward": Case(RAW.sample_cross_entropy_backward, {"d_loss": _numbers(B),
                                              "logits": logits, "y": labels}),
    }  # fmt: skip


def public_cases() -> dict[str, Case]:
    """A case for each public function."""
    raw = raw_cases()
    same = {name: Case(case.call, *case[1:]) for name, case in raw.items() if name in expert_block.__all__}
    r = _route()
    route = {"order": r.order, "inverse": r.inverse, "top_k": K}
    ks = {"top_k": (0, -1, R + 1, None, 1.5)}
    images = raw["pgd_step"].arguments
    names = {"conv_forward": "forward", "conv_dgrad": "dgrad", "conv_wgrad": "wgrad", "conv_plan": "plan"}
    made = {
        name: Case(partial(_geometric, getattr(expert_conv, name)), *raw[f"expert_conv_{short}"][1:])
        for name, short in names.items()
    }
    for name, case in made.items():  # of_numbers refuses other numbers of numbers
        wrong = tuple(numbers for numbers in case.scalars["geometry"] if len(numbers) == 6)
        made[name] = case._replace(scalars={**case.scalars, "geometry": wrong})
    shape = made["conv_plan"].arguments
    key = {"weight": shape["weight"], "rows": R, "height": H, "width": W, "backward": False, "geometry": UNIT}
    return {
        **same,
        **made,
        "share_count": Case(_share_count, {"value": _maps(R), "offsets": r.offsets}),
        "plan_key": Case(partial(_geometric, expert_conv.plan_key), key),
        "expert_conv": Case(expert_conv.expert_conv, {"x": _maps(R), "weight": shape["weight"], "offsets": r.offsets,
                            "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
                            {"stride": ((0, 1), 1, (2.0, 1)), "padding": ((-1, 0),), "dilation": ((9, 9), (1,))},
                            ("offsets",)),
        "expert_mlp": Case(_expert_mlp, *raw["expert_mlp_forward"][1:]),
        "sort_by_expert": Case(routing.sort_by_expert, *raw["sort_by_expert"][1:]),
        "dispatch": Case(_dispatch, {"x": _numbers(B, C, H), **route}, ks, ("order", "inverse")),
        "combine": Case(_combine, {"y": _numbers(R, C, H), **route, "weights": _numbers(B, K)}, ks,
                        ("order", "inverse")),
        "top_k_gate": Case(gate.top_k_gate, {"logits": _numbers(B, E), "top_k": K}, {"top_k": (0, -1, E + 1)}),
        "top_k_route": Case(gate.top_k_route, {"logits": _numbers(B, E), "top_k": 1}, {"top_k": (0, -1, E + 1)}),
        "pool_linear": Case(gate.pool_linear, raw["pool_linear"].arguments),
        "pgd_step": Case(attack_step.pgd_step, images, {"norm": ("linf",), "eps": (-1.0, float("nan"))}),
        "random_start": Case(attack_step.random_start, raw["random_start"].arguments,
                             {"stream": (-1, 2**32), "seed": (2**64,), "eps": (-1.0,)}),
        "sample_cross_entropy": Case(attack_step.sample_cross_entropy, raw["sample_cross_entropy"].arguments),
        "apgd_step": Case(apgd.apgd_step, raw["apgd_step"].arguments, {"share": (2.0,), "eps": (-1.0,)}),
        "apgd_track": Case(apgd.apgd_track, raw["apgd_track"].arguments),
    }  # fmt: skip
