"""The top-k gate in Triton: bound by launch latency (B*E is a few thousand numbers), so two launches forward, one
backward.

The first kernel writes scores, indices, weights and one row of partial sums a program; the second adds those rows in a
fixed order. No atomics, so every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust_moe_kernels import triton_support
from robust_moe_kernels.triton_support import Build, on_device

__all__ = ["backward", "builds", "forward", "why_not"]

why_not = triton_support.why_not

_TILE = 1024  # scores a program holds, 8 a thread; 2048 spilled in float64 (sm_80, E = 32)
_SMALLER_TILE = {8: 2, 128: 4}  # padded E -> divisor of its tile: the full one spills 4 to 8 bytes (sm_80, sm_90)
_EXTRA = 3  # partial sums besides 2E: entropy, squared logsumexp, non-finite rows


@triton.jit
def _forward_kernel(
    logits_ptr,  # [B, E] any float
    scores_ptr,  # [B, E] float32 or float64
    indices_ptr,  # [B, k] int64
    weights_ptr,  # [B, k] as scores
    partial_ptr,  # [programs, 2E + 3] as scores: sum of scores, argmax counts, entropy, lse^2, non-finite rows
    rows,
    experts,
    top_k,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One program: ROWS rows, all experts (padded to the power of two EXPERTS)."""
    kind: tl.constexpr = scores_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, EXPERTS)[None, :]
    inside = (row < rows) & (column < experts)
    logits = tl.load(logits_ptr + row * experts + column, mask=inside, other=0.0).to(kind)
    logits = tl.where(inside, logits, float("-inf"))
    real_row = tl.max(inside.to(tl.int32), 1) > 0
    broken = (logits != logits) | (tl.abs(logits) == float("inf"))
    nonfinite = tl.max((broken & inside).to(tl.int32), 1)
    # A row with a NaN has NaN scores, as softmax gives; the maximum must therefore not drop it.
    peak = tl.max(tl.where(inside & (logits == logits), logits, float("-inf")), 1)
    has_nan = tl.max(((logits != logits) & inside).to(tl.int32), 1)
    peak = tl.where(has_nan > 0, float("nan"), peak)
    peak = tl.where(real_row, peak, 0.0)
    shifted = tl.where(inside, logits - peak[:, None], float("-inf"))
    exponential = tl.exp(shifted)
    total = tl.sum(exponential, 1)
    total = tl.where(real_row, total, 1.0)
    scores = exponential / total[:, None]
    tl.store(scores_ptr + row * experts + column, scores, mask=inside)
    lse = peak + tl.log(total)
    log_scores = tl.where(scores > 0, shifted - tl.log(total)[:, None], 0.0)
    entropy = -tl.sum(tl.where(inside, scores * log_scores, 0.0), 1)

    key = tl.where(logits == logits, logits, float("-inf"))
    open_ = inside
    rank = tl.zeros((ROWS, EXPERTS), tl.int32) + top_k
    for j in range(top_k):
        best = tl.max(tl.where(open_, key, float("-inf")), 1)
        candidate = open_ & (key == best[:, None])
        chosen = tl.min(tl.where(candidate, column, EXPERTS), 1)
        hit = column == chosen[:, None]
        rank = tl.where(hit & open_, j, rank)
        open_ = open_ & (~hit)
    kept = inside & (rank < top_k)
    slot = row * top_k + rank
    tl.store(indices_ptr + slot, tl.zeros((ROWS, EXPERTS), tl.int64) + column, mask=kept)
    if MODE == 0:
        weights = scores
    elif MODE == 1:
        sum_kept = tl.sum(tl.where(kept, scores, 0.0), 1)
        weights = scores / tl.where(real_row, sum_kept, 1.0)[:, None]
    else:
        weights = tl.full((ROWS, EXPERTS), 1.0, kind)
    tl.store(weights_ptr + slot, weights, mask=kept)

    partial = partial_ptr + program * (2 * experts + 3)
    flat = tl.arange(0, EXPERTS)
    tl.store(partial + flat, tl.sum(tl.where(inside, scores, 0.0), 0), mask=flat < experts)
    first = tl.sum((kept & (rank == 0)).to(kind), 0)
    tl.store(partial + experts + flat, first, mask=flat < experts)
    tl.store(partial + 2 * experts, tl.sum(tl.where(real_row, entropy, 0.0), 0))
    tl.store(partial + 2 * experts + 1, tl.sum(tl.where(real_row, lse * lse, 0.0), 0))
    tl.store(partial + 2 * experts + 2, tl.sum(nonfinite.to(kind), 0))


@triton.jit
def _finish_kernel(
    partial_ptr,  # [programs, 2E + 3]
    mean_scores_ptr,  # [E]
    argmax_fraction_ptr,  # [E]
    mean_entropy_ptr,  # []
    mean_square_lse_ptr,  # []
    nonfinite_ptr,  # [] int32
    programs,
    rows,
    experts,
    EXPERTS: tl.constexpr,
):
    """One program: the sums of all programs, in program order, divided by the number of rows."""
    kind: tl.constexpr = partial_ptr.dtype.element_ty
    width = 2 * experts + 3
    column = tl.arange(0, EXPERTS)
    mask = column < experts
    score = tl.zeros((EXPERTS,), tl.float64)
    first = tl.zeros((EXPERTS,), tl.float64)
    rest = tl.zeros((4,), tl.float64)
    lane = tl.arange(0, 4)
    base = partial_ptr
    for _ in range(programs):
        score += tl.load(base + column, mask=mask, other=0.0).to(tl.float64)
        first += tl.load(base + experts + column, mask=mask, other=0.0).to(tl.float64)
        rest += tl.load(base + 2 * experts + lane, mask=lane < 3, other=0.0).to(tl.float64)
        base += width  # a pointer, so 64-bit
    tl.store(mean_scores_ptr + column, (score / rows).to(kind), mask=mask)
    tl.store(argmax_fraction_ptr + column, (first / rows).to(kind), mask=mask)
    tl.store(mean_entropy_ptr + lane, (rest / rows).to(kind), mask=lane == 0)
    tl.store(mean_square_lse_ptr + lane * 0, (rest / rows).to(kind), mask=lane == 1)
    tl.store(nonfinite_ptr + lane * 0, rest.to(tl.int32), mask=lane == 2)


@triton.jit
def _backward_kernel(
    logits_ptr,  # [B, E]
    scores_ptr,  # [B, E]
    indices_ptr,  # [B, k] int64
    d_scores_ptr,  # [B, E] or unused
    d_weights_ptr,  # [B, k] or unused
    d_mean_ptr,  # [E] or unused
    d_entropy_ptr,  # [] or unused
    d_square_ptr,  # [] or unused
    d_logits_ptr,  # [B, E] as logits
    rows,
    experts,
    top_k,
    MODE: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """One program: ROWS rows, all experts."""
    kind: tl.constexpr = scores_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, EXPERTS)[None, :]
    inside = (row < rows) & (column < experts)
    place = row * experts + column
    scores = tl.load(scores_ptr + place, mask=inside, other=0.0)
    slope = tl.zeros((ROWS, EXPERTS), kind)
    if HAS_SCORES:
        slope += tl.load(d_scores_ptr + place, mask=inside, other=0.0)
    if HAS_MEAN:
        slope += tl.load(d_mean_ptr + column, mask=column < experts, other=0.0) / rows
    if HAS_WEIGHTS:
        d_kept = tl.zeros((ROWS, EXPERTS), kind)
        kept = tl.zeros((ROWS, EXPERTS), kind)
        for j in range(top_k):
            index = tl.load(indices_ptr + row * top_k + j, mask=row < rows, other=-1)
            gradient = tl.load(d_weights_ptr + row * top_k + j, mask=row < rows, other=0.0)
            hit = column == index
            d_kept += tl.where(hit, gradient, 0.0)
            kept += tl.where(hit, scores, 0.0)
        if MODE == 1:
            total = tl.sum(kept, 1)[:, None]
            total = tl.where(total > 0, total, 1.0)
            shared = tl.sum(d_kept * kept / total, 1)[:, None]
            d_kept = tl.where(kept > 0, (d_kept - shared) / total, 0.0)
        slope += d_kept
    d_logits = scores * (slope - tl.sum(scores * slope, 1)[:, None])
    if HAS_ENTROPY or HAS_SQUARE:
        logits = tl.load(logits_ptr + place, mask=inside, other=0.0).to(kind)
        logits = tl.where(inside, logits, float("-inf"))
        peak = tl.max(logits, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp(logits - peak[:, None]), 1)
        lse = (peak + tl.log(tl.where(total > 0, total, 1.0)))[:, None]
        if HAS_ENTROPY:
            log_scores = tl.where(scores > 0, logits - lse, 0.0)
            entropy = -tl.sum(scores * log_scores, 1)[:, None]
            d_logits -= scores * (log_scores + entropy) * (tl.load(d_entropy_ptr) / rows)
        if HAS_SQUARE:
            d_logits += scores * (2.0 * lse) * (tl.load(d_square_ptr) / rows)
    tl.store(d_logits_ptr + place, d_logits.to(d_logits_ptr.dtype.element_ty), mask=inside)


def _tile(experts: int) -> tuple[int, int]:
    """(rows a program, experts padded to a power of two)."""
    padded = triton.next_power_of_2(experts)
    rows = max(1, min(32, _TILE // padded))
    return max(1, rows // _SMALLER_TILE.get(padded, 1)), padded


def _options(padded: int) -> dict[str, int]:
    """Four warps up to 1024 experts; above, where one row is the tile, as many more as keep 8 scores a thread."""
    return {"num_warps": max(4, min(16, padded // 256))}


def forward(logits: Tensor, top_k: int, mode: int) -> tuple[Tensor, ...]:
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
            _forward_kernel[(programs,)](
                logits, scores, indices, weights, partial, rows, experts, top_k,
                MODE=mode, ROWS=tile, EXPERTS=padded, **_options(padded),
            )  # fmt: skip
        _finish_kernel[(1,)](
            partial, *means, nonfinite, programs, max(rows, 1), experts, EXPERTS=padded, **_options(padded)
        )
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
        _backward_kernel[(triton.cdiv(rows, tile),)](
            logits, scores, indices, *pointers, d_logits, rows, experts, indices.shape[1],
            mode, *present, ROWS=tile, EXPERTS=padded, **_options(padded),
        )  # fmt: skip
    return d_logits


def builds() -> Iterator[Build]:
    """Configurations as they are launched, for the compile test: small E, large E and where the tile is special."""
    sizes = {"fp32": (1, 4, 8, 16, 64, 128, 512, 1024), "bf16": (64,), "fp64": (8, 128, 512)}
    for logits, several in sizes.items():
        for experts in several:
            yield from _builds(logits, "fp64" if logits == "fp64" else "fp32", experts)
    stats = ("partial_ptr", "mean_scores_ptr", "argmax_fraction_ptr", "mean_entropy_ptr", "mean_square_lse_ptr")
    for kind in ("fp32", "fp64"):
        signature = {**dict.fromkeys(stats, f"*{kind}"), "nonfinite_ptr": "*i32", "programs": "i32", "rows": "i32"}
        signature |= {"experts": "i32", "EXPERTS": "constexpr"}
        yield Build(_finish_kernel, signature, {"EXPERTS": 4}, _options(4))


def _builds(logits: str, kind: str, experts: int) -> Iterator[Build]:
    tile, padded = _tile(experts)
    sizes = {"rows": "i32", "experts": "i32", "top_k": "i32"}
    shape = {"ROWS": tile, "EXPERTS": padded}
    constexpr = dict.fromkeys(("MODE", *shape), "constexpr")
    pointers = {"logits_ptr": f"*{logits}", "scores_ptr": f"*{kind}", "indices_ptr": "*i64"}
    forward_signature = {**pointers, "weights_ptr": f"*{kind}", "partial_ptr": f"*{kind}", **sizes, **constexpr}
    yield Build(_forward_kernel, forward_signature, {"MODE": 1, **shape}, _options(padded))
    names = ("d_scores_ptr", "d_weights_ptr", "d_mean_ptr", "d_entropy_ptr", "d_square_ptr")
    flags = dict.fromkeys(("HAS_SCORES", "HAS_WEIGHTS", "HAS_MEAN", "HAS_ENTROPY", "HAS_SQUARE"), True)
    backward_signature = {**pointers, **dict.fromkeys(names, f"*{kind}"), "d_logits_ptr": f"*{logits}", **sizes}
    backward_signature |= dict.fromkeys(("MODE", *flags, *shape), "constexpr")
    yield Build(_backward_kernel, backward_signature, {"MODE": 1, **flags, **shape}, _options(padded))
