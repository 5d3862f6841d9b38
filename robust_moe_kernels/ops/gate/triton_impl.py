"""The top-k gate in Triton: bound by launch latency (B*E is a few thousand numbers), so two launches forward, one
backward.

The first kernel writes scores, indices, weights and one row of partial sums a program; the second adds those rows in a
fixed order, and sorts the indices by expert in its other programs where they are asked for. No atomics, so every run
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.checks import expect
from robust_moe_kernels.ops.gate.triton_kernels import gate_backward_kernel, gate_finish_kernel, gate_forward_kernel
from robust_moe_kernels.ops.gate.triton_pool import pool_builds, pool_linear, pool_linear_backward
from robust_moe_kernels.ops.routing.triton_kernels import SORT_BLOCK
from robust_moe_kernels.triton_support import Build, on_device

__all__ = ["backward", "builds", "forward", "forward_sorted", "pool_linear", "pool_linear_backward", "why_not"]

why_not = triton_support.why_not

_TILE = 1024  # scores a program holds, 8 a thread; 2048 spilled in float64 (sm_80, E = 32)
_SMALLER_TILE = {8: 2, 128: 4}  # padded E -> divisor of its tile: the full one spills 4 to 8 bytes (sm_80, sm_90)
_EXTRA = 3  # partial sums besides 2E: entropy, squared logsumexp, non-finite rows


def _tile(experts: int) -> tuple[int, int]:
    """(rows a program, experts padded to a power of two)."""
    padded = triton.next_power_of_2(experts)
    rows = max(1, min(32, _TILE // padded))
    return max(1, rows // _SMALLER_TILE.get(padded, 1)), padded


def _options(padded: int) -> dict[str, int]:
    """Four warps up to 1024 experts; above, where one row is the tile, as many more as keep 8 scores a thread."""
    return {"num_warps": max(4, min(16, padded // 256))}


def _finish_options(padded: int) -> dict[str, int]:
    """With the registers of the sort, see ``routing.triton_impl``."""
    return {**_options(padded), "maxnreg": 128}


def forward(logits: Tensor, top_k: int, mode: int) -> tuple[Tensor, ...]:
    return _forward(logits, top_k, mode, ())


def forward_sorted(logits: Tensor, top_k: int, mode: int) -> tuple[Tensor, ...]:
    rows, experts = logits.shape
    expect(rows * top_k < 2**31, "logits", "fewer than 2^31 pairs of a row and an expert", rows * top_k)
    order, sample, inverse = (logits.new_empty(rows * top_k, dtype=torch.int64) for _ in range(3))
    offsets = logits.new_empty(experts + 1, dtype=torch.int64)
    route = (order, sample, inverse, offsets, logits.new_empty((), dtype=torch.int32))
    return *_forward(logits, top_k, mode, route), *route


def _forward(logits: Tensor, top_k: int, mode: int, route: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gate's outputs; fills ``route`` if there is one."""
    rows, experts = logits.shape
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tile, padded = _tile(experts)
    programs = triton.cdiv(rows, tile)
    scores = logits.new_empty(rows, experts, dtype=kind)
    indices = logits.new_empty(rows, top_k, dtype=torch.int64)
    weights = logits.new_empty(rows, top_k, dtype=kind)
    partial = logits.new_empty(programs, 2 * experts + _EXTRA, dtype=kind)
    means = [logits.new_empty(shape, dtype=kind) for shape in ((experts,), (experts,), (), ())]
    nonfinite = logits.new_empty((), dtype=torch.int32)
    with on_device(logits):
        if rows:
            gate_forward_kernel[(programs,)](
                logits, scores, indices, weights, partial, rows, experts, top_k,
                MODE=mode, ROWS=tile, EXPERTS=padded, **_options(padded),
            )  # fmt: skip
        gate_finish_kernel[(2 + experts if route else 1,)](
            partial, *means, nonfinite, indices, *(route or [indices] * 4 + [nonfinite]), programs, max(rows, 1),
            experts, top_k, rows * top_k, SORT=bool(route), EXPERTS=padded, BLOCK=SORT_BLOCK,
            **_finish_options(padded),
        )  # fmt: skip
    return scores, indices, weights, *means, nonfinite


def backward(
    logits: Tensor,
    scores: Tensor,
    indices: Tensor,
    d_scores: Tensor | None,
    d_weights: Tensor | None,
    d_mean_scores: Tensor | None,
    d_mean_entropy: Tensor | None,
    d_mean_square_lse: Tensor | None,
    mode: int,
) -> Tensor:
    d_logits = torch.empty_like(logits)
    rows, experts = logits.shape
    if not rows:
        return d_logits
    tile, padded = _tile(experts)
    gradients = (d_scores, d_weights, d_mean_scores, d_mean_entropy, d_mean_square_lse)
    present = [gradient is not None for gradient in gradients]
    pointers = [scores if gradient is None else gradient for gradient in gradients]  # an unused one is never read
    with on_device(logits):
        gate_backward_kernel[(triton.cdiv(rows, tile),)](
            logits, scores, indices, *pointers, d_logits, rows, experts, indices.shape[1],
            mode, *present, ROWS=tile, EXPERTS=padded, **_options(padded),
        )  # fmt: skip
    return d_logits


def builds() -> Iterator[Build]:
    """Configurations as they are launched, for the compile test: small E, large E and where the tile is special."""
    yield from pool_builds()
    sizes = {"fp32": (1, 4, 8, 16, 64, 128, 512, 1024), "bf16": (64,), "fp64": (8, 128, 512)}
    for logits, several in sizes.items():
        for experts in several:
            yield from _builds(logits, "fp64" if logits == "fp64" else "fp32", experts)
    stats = ("partial_ptr", "mean_scores_ptr", "argmax_fraction_ptr", "mean_entropy_ptr", "mean_square_lse_ptr")
    for kind in ("fp32", "fp64"):
        signature = {**dict.fromkeys(stats, f"*{kind}"), "nonfinite_ptr": "*i32"}
        route = ("indices_ptr", "order_ptr", "sample_ptr", "inverse_ptr", "offsets_ptr")
        pairs = {**dict.fromkeys(route, "*i64"), "invalid_ptr": "*i32"}
        numbers = dict.fromkeys(("programs", "rows", "experts", "top_k", "pairs"), "i32")
        signature = {**signature, **pairs, **numbers, **dict.fromkeys(("SORT", "EXPERTS", "BLOCK"), "constexpr")}
        for sort, padded in ((False, 4), (True, 4), (True, 1024)):
            constants = {"SORT": sort, "EXPERTS": padded, "BLOCK": SORT_BLOCK}
            yield Build(gate_finish_kernel, signature, constants, _finish_options(padded))


def _builds(logits: str, kind: str, experts: int) -> Iterator[Build]:
    tile, padded = _tile(experts)
    sizes = {"rows": "i32", "experts": "i32", "top_k": "i32"}
    shape = {"ROWS": tile, "EXPERTS": padded}
    constexpr = dict.fromkeys(("MODE", *shape), "constexpr")
    pointers = {"logits_ptr": f"*{logits}", "scores_ptr": f"*{kind}", "indices_ptr": "*i64"}
    forward_signature = {**pointers, "weights_ptr": f"*{kind}", "partial_ptr": f"*{kind}", **sizes, **constexpr}
    yield Build(gate_forward_kernel, forward_signature, {"MODE": 1, **shape}, _options(padded))
    names = ("d_scores_ptr", "d_weights_ptr", "d_mean_ptr", "d_entropy_ptr", "d_square_ptr")
    flags = dict.fromkeys(("HAS_SCORES", "HAS_WEIGHTS", "HAS_MEAN", "HAS_ENTROPY", "HAS_SQUARE"), True)
    backward_signature = {**pointers, **dict.fromkeys(names, f"*{kind}"), "d_logits_ptr": f"*{logits}", **sizes}
    backward_signature |= dict.fromkeys(("MODE", *flags, *shape), "constexpr")
    yield Build(gate_backward_kernel, backward_signature, {"MODE": 1, **flags, **shape}, _options(padded))
