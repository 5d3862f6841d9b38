"""The Triton kernels of the top-k gate; ``triton_impl`` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from robust_moe_kernels.ops.routing.triton_kernels import sort_program

__all__ = ["gate_backward_kernel", "gate_finish_kernel", "gate_forward_kernel"]


@triton.jit
def gate_forward_kernel(
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
def gate_finish_kernel(
    partial_ptr,  # [programs, 2E + 3]
    mean_scores_ptr,  # [E]
    argmax_fraction_ptr,  # [E]
    mean_entropy_ptr,  # []
    mean_square_lse_ptr,  # []
    nonfinite_ptr,  # [] int32
    indices_ptr,  # [B, k] int64; this and the route's five are unused unless SORT
    order_ptr,
    sample_ptr,
    inverse_ptr,  # [B * k] int64
    offsets_ptr,  # [E + 1] int64
    invalid_ptr,  # [] int32
    programs,
    rows,
    experts,
    top_k,
    pairs,
    SORT: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first program: the sums of all programs, in program order, divided by the number of rows. With SORT, E + 1
    more that sort the pairs, an expert each and those out of range."""
    if SORT:  # noqa: SIM102  # decided by the compiler, the other by the program
        if tl.program_id(0) > 0:
            sort_program(
                tl.program_id(0) - 1, indices_ptr, order_ptr, sample_ptr, inverse_ptr, offsets_ptr, invalid_ptr, pairs,
                experts, top_k, BLOCK,
            )  # fmt: skip
            return
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
def gate_backward_kernel(
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
