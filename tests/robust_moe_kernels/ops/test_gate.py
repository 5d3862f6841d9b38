"""Top-k gate against an oracle in long double written as loops over rows and a dense Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.gate import GATE, GateOutput, top_k_gate, top_k_route
from robust_moe_kernels.ops.gate.reference_impl import KEEP, RENORMALIZE, STRAIGHT_THROUGH
from robust_moe_kernels.ops.routing import sort_by_expert

OP = "gate"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SETTINGS = {KEEP: (False, False), RENORMALIZE: (True, False), STRAIGHT_THROUGH: (True, True)}  # mode -> arguments
DIFFERENTIABLE = ("scores", "weights", "mean_scores", "mean_entropy", "mean_square_lse")


def randn(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


class Case(NamedTuple):
    name: str
    top_k: int
    logits: Callable[[torch.Generator], Tensor]
    reason: str


CASES = (
    Case("empty_batch", 2, randn(0, 4), "no rows: means over max(B, 1) are 0, nothing is launched"),
    Case("one_row", 2, randn(1, 4), "the smallest batch; tiles are mostly padding"),
    Case("one_expert", 1, randn(5, 1), "softmax of one logit is exactly 1, its entropy 0"),
    Case("all_chosen", 4, randn(9, 4), "k = E: the selection is a full sort"),
    Case("prime", 3, randn(33, 7), "E pads to 8; one row more than a tile of 32"),
    Case("chunk", 2, randn(129, 12), "E pads to 16; one row more than two of the native chunks of 64"),
    Case("large", 8, randn(3, 1000), "E near 1024: one row a tile"),
    Case("larger", 3, randn(2, 1031), "E over 1024: a row exceeds the tile's usual 1024 scores"),
    Case("equal", 3, lambda _: torch.zeros(4, 6, dtype=torch.float64), "all tied: experts 0, 1, 2 in this order"),
    Case(
        "ties",
        3,
        lambda generator: torch.randint(-1, 2, (40, 9), generator=generator).double(),
        "many ties among three values: lowest index first, also across the k-th place",
    ),
    Case(
        "signed_zeros",
        2,
        lambda _: torch.tensor([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0], [-1.0, -0.0, 0.0]], dtype=torch.float64),
        "-0.0 equals 0.0 and ties with it, though its bits order differently",
    ),
    Case(
        "huge",
        2,
        lambda generator: 6e4 * torch.rand(8, 5, generator=generator, dtype=torch.float64) - 3e4,
        "exp overflows unless the maximum is taken off; most scores underflow to 0, whose entropy is 0, not NaN",
    ),
    Case(
        "rounds_to_one_score",
        2,
        lambda _: torch.tensor([[60.0, 0.0, 1.0, 2.0], [-120.0, -119.0, 0.0, -121.0]], dtype=torch.float64),
        "the second choice's score is at the edge of underflow: choice goes by logit",
    ),
)


def same_spread(values: Tensor) -> int:
    return int((values.max() - values.min()).item()) if values.numel() else 0


def oracle(logits: Tensor, top_k: int, mode: int) -> dict[str, np.ndarray]:
    """Every output, by the definition, one row at a time."""
    values = logits.detach().cpu().double().numpy().astype(np.longdouble)
    rows, experts = values.shape
    result = {
        "scores": np.zeros((rows, experts), np.longdouble),
        "indices": np.zeros((rows, top_k), np.int64),
        "weights": np.ones((rows, top_k), np.longdouble),
        "argmax_fraction": np.zeros(experts, np.longdouble),
    }
    entropy = square = np.longdouble(0)
    for b, row in enumerate(values):
        lse = row.max() + np.log(sum(np.exp(value - row.max()) for value in row))
        score = np.exp(row - lse)
        ranked = sorted(range(experts), key=lambda e: (-row[e], e))[:top_k]
        kept = score[ranked]
        result["scores"][b], result["indices"][b] = score, ranked
        if mode != STRAIGHT_THROUGH:
            result["weights"][b] = kept / kept.sum() if mode == RENORMALIZE else kept
        result["argmax_fraction"][ranked[0]] += np.longdouble(1) / rows
        entropy -= sum(s * np.log(s) for s in score if s > 0)
        square += lse * lse
    batch = max(rows, 1)
    result["mean_scores"] = result["scores"].sum(0) / batch
    result["mean_entropy"], result["mean_square_lse"] = np.array(entropy / batch), np.array(square / batch)
    return result


def oracle_gradient(logits: Tensor, top_k: int, mode: int, upstream: dict[str, np.ndarray]) -> np.ndarray:
    """d(sum of upstream * outputs)/d logits: each output's derivative by scores, times the softmax's Jacobian."""
    values = logits.detach().cpu().double().numpy().astype(np.longdouble)
    rows = len(values)
    outputs = oracle(logits, top_k, mode)
    gradient = np.zeros_like(values)
    for b in range(rows):
        score, chosen = outputs["scores"][b], outputs["indices"][b]
        jacobian = np.diag(score) - np.outer(score, score)  # d score_i / d logit_j
        by_score = upstream["scores"][b] + upstream["mean_scores"] / rows
        kept = score[chosen]
        for j in range(top_k):
            for i in range(top_k):
                if mode == RENORMALIZE:
                    slope = ((i == j) - kept[j] / kept.sum()) / kept.sum()
                else:  # straight-through has the gradient of the kept score
                    slope = np.longdouble(i == j)
                by_score[chosen[i]] += upstream["weights"][b, j] * slope
        log_score = np.log(np.where(score > 0, score, 1))
        by_score = by_score - upstream["mean_entropy"] / rows * (log_score + 1)
        lse = values[b].max() + np.log(np.exp(values[b] - values[b].max()).sum())
        gradient[b] = jacobian @ by_score + upstream["mean_square_lse"] / rows * 2 * lse * score
    return gradient


def run(logits: Tensor, top_k: int, mode: int, impl: str) -> GateOutput:
    renormalize, straight_through = SETTINGS[mode]
    return top_k_gate(logits, top_k, renormalize, straight_through, impl)


def modes(top_k: int) -> tuple[int, ...]:
    return (KEEP, RENORMALIZE, STRAIGHT_THROUGH) if top_k == 1 else (KEEP, RENORMALIZE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_matches_the_oracle(case, dtype, generator):
    logits = case.logits(generator).to(dtype)
    # Rounding alone: taking the maximum off costs half a unit of the difference (the logits' spread), exp, log and each
    # of E additions one more; squaring the logsumexp doubles its share. Relative to the largest true value.
    units = 2 * (logits.shape[1] + same_spread(logits) + 4)
    for mode in modes(case.top_k):
        actual, truth = run(logits, case.top_k, mode, "reference"), oracle(logits, case.top_k, mode)
        np.testing.assert_array_equal(actual.indices.numpy(), truth["indices"])
        for name in (*DIFFERENTIABLE, "argmax_fraction"):
            got = getattr(actual, name)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            scale = max(np.abs(truth[name]).max(initial=0), 1e-30)
            error = np.abs(got.numpy() - truth[name]).max(initial=0)
            assert error <= units * torch.finfo(got.dtype).eps * scale, name
        assert actual.nonfinite.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_the_reference(rival, case, dtype, generator, assert_as_accurate):
    logits = case.logits(generator).to(dtype)
    for mode in modes(case.top_k):
        reference, truth = run(logits, case.top_k, mode, "reference"), oracle(logits, case.top_k, mode)
        actual = run(logits.to(rival.device), case.top_k, mode, rival.impl)
        assert torch.equal(actual.indices.cpu(), reference.indices)
        for name in (*DIFFERENTIABLE, "argmax_fraction"):
            assert_as_accurate(getattr(actual, name), getattr(reference, name), truth[name])
        assert actual.nonfinite.item() == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sorted_as_one_after_the_other(target, case, generator, assert_same_bits):
    logits = case.logits(generator).float().to(target.device)
    for mode in modes(case.top_k):
        gate, route = top_k_route(logits, case.top_k, *SETTINGS[mode], target.impl)
        assert_same_bits(gate, run(logits, case.top_k, mode, target.impl))
        assert_same_bits(route, sort_by_expert(gate.indices, logits.shape[1], target.impl))


def test_sorted_has_the_gates_gradient_and_refusals(target, generator):
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(target.device)
    gradients = []
    for function in (top_k_gate, lambda *arguments, **options: top_k_route(*arguments, **options)[0]):
        logits = values.clone().requires_grad_()
        out = function(logits, 2, impl=target.impl)
        loss = (out.weights * out.indices).sum() + out.mean_entropy
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0
    with pytest.raises(ValueError, match="top_k: expected 1 <= k <= E = 5, got 6"):
        top_k_route(values, 6, impl=target.impl)
    if target.device == "cpu":
        with pytest.raises(ValueError, match="logits: expected finite gate scores, got NaN or infinity in 1 row"):
            top_k_route(values.index_fill(0, torch.tensor(2), torch.inf), 2, impl=target.impl)


def upstream_for(outputs: GateOutput, generator: torch.Generator, only: str | None) -> dict[str, Tensor]:
    gradients = {}
    for name in DIFFERENTIABLE:
        output = getattr(outputs, name)
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
        gradients[name] = drawn if only in (None, name) else torch.zeros_like(drawn)
    return gradients


def gradient_of(logits: Tensor, top_k: int, mode: int, impl: str, upstream: dict[str, Tensor]) -> Tensor:
    logits = logits.clone().requires_grad_()
    outputs = run(logits, top_k, mode, impl)
    pairs = [(getattr(outputs, name), grad.to(logits.device)) for name, grad in upstream.items() if grad.any()]
    if not pairs:  # an empty batch: its means are constants
        pairs = [(outputs.scores, upstream["scores"].to(logits.device))]
    (gradient,) = torch.autograd.grad([output for output, _ in pairs], logits, [grad for _, grad in pairs])
    return gradient


@pytest.mark.parametrize(
    ("only", "dtype"),
    [*((None, dtype) for dtype in DTYPES), *((name, torch.float32) for name in DIFFERENTIABLE)],
    ids=str,
)
@pytest.mark.parametrize("name", ["one_row", "one_expert", "all_chosen", "prime", "ties", "huge", "empty_batch"])
def test_gradient(rival, name, only, dtype, generator, assert_as_accurate):
    """Each output's gradient alone (the others absent, not zero) and all together."""
    case = next(case for case in CASES if case.name == name)
    logits = case.logits(generator).to(dtype)
    for mode in modes(case.top_k):
        upstream = upstream_for(run(logits, case.top_k, mode, "reference"), generator, only)
        exact = {key: value.double().numpy().astype(np.longdouble) for key, value in upstream.items()}
        truth = oracle_gradient(logits, case.top_k, mode, exact)
        reference = gradient_of(logits, case.top_k, mode, "reference", upstream)
        actual = gradient_of(logits.to(rival.device), case.top_k, mode, rival.impl, upstream)
        # slope - sum(scores * slope) cancels where one score is near 1: the unit is that of the terms.
        terms = max(float(np.abs(truth).max(initial=0)), max(np.abs(g).max(initial=0) for g in exact.values()))
        assert_as_accurate(actual, reference, truth, magnitude=float(terms))


@pytest.mark.parametrize("mode", [KEEP, RENORMALIZE])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_gradcheck(target, mode, top_k, generator):
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64).to(target.device).requires_grad_()

    def differentiable(values: Tensor) -> tuple[Tensor, ...]:
        outputs = run(values, top_k, mode, target.impl)
        return tuple(getattr(outputs, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(differentiable, (logits,))


def test_straight_through_is_one_forward_and_the_score_backward(target, generator):
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(target.device).requires_grad_()
    outputs = top_k_gate(logits, 1, renormalize=True, straight_through=True, impl=target.impl)
    assert (outputs.weights == 1).all()
    upstream = torch.randn(6, 1, generator=generator, dtype=torch.float64).to(target.device)
    (through,) = torch.autograd.grad(outputs.weights, logits, upstream)
    kept = logits.softmax(-1).gather(1, logits.argmax(-1, keepdim=True))
    (score,) = torch.autograd.grad(kept, logits, upstream)
    torch.testing.assert_close(through, score, rtol=0, atol=4 * torch.finfo(torch.float64).eps)
    assert through.abs().max() > 0.01


def test_renormalised_single_weight_has_no_gradient(target, generator):
    """The trap that straight_through is for: score / score is the constant 1."""
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(target.device).requires_grad_()
    outputs = top_k_gate(logits, 1, renormalize=True, straight_through=False, impl=target.impl)
    assert (outputs.weights == 1).all()
    (gradient,) = torch.autograd.grad(outputs.weights.sum(), logits)
    assert gradient.abs().max() <= 4 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("options", [(2, True, True), (2, False, True), (1, True, True), (1, False, False)], ids=str)
def test_second_derivatives(target, options):
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.1, 0.7, -0.3]], dtype=torch.float64, device=target.device)

    def floats(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = top_k_gate(logits, *options, impl=target.impl)
        # a straight-through weight is 1 whatever the logits: its gradient is the score's
        weights = () if options[0] == 1 and options[2] else (out.weights,)
        return out.scores, *weights, out.mean_scores, out.mean_entropy, out.mean_square_lse

    assert torch.autograd.gradcheck(floats, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(floats, logits)


def test_the_raw_gradient_has_no_derivative(target):
    logits, scores, weights = (torch.rand(2, 3, device=target.device, requires_grad=True) for _ in range(3))
    indices = torch.tensor([[0, 1, 2], [2, 1, 0]], device=target.device)
    gradient = torch.ops.robust_moe_kernels.top_k_gate_backward(
        logits, scores, indices, None, weights, None, None, None, 1, target.impl
    )
    with pytest.raises(RuntimeError, match="top_k_gate_backward has no derivative"):
        gradient.sum().backward()


def test_no_gradient_through_counts(target):
    logits = torch.randn(4, 3, device=target.device, requires_grad=True)
    outputs = top_k_gate(logits, 2, impl=target.impl)
    assert [outputs.indices.requires_grad, outputs.argmax_fraction.requires_grad, outputs.nonfinite.requires_grad] == [
        False
    ] * 3
    assert all(getattr(outputs, name).requires_grad for name in DIFFERENTIABLE)


LAYOUTS = {
    "transposed": lambda logits: logits.t().contiguous().t(),
    "every_other_row": lambda logits: logits.repeat_interleave(2, 0)[::2],
    "columns_of_wider": lambda logits: torch.cat([logits, logits + 1], 1)[:, : logits.shape[1]],
    "offset_storage": lambda logits: torch.cat([logits[:1] + 1, logits])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_no_bit(target, layout, generator, assert_same_bits):
    logits = torch.randn(6, 5, generator=generator).to(target.device)
    strided = LAYOUTS[layout](logits)
    assert torch.equal(strided, logits)
    assert_same_bits(top_k_gate(strided, 2, impl=target.impl), top_k_gate(logits, 2, impl=target.impl))
    upstream = torch.randn(6, 2, generator=generator).to(target.device)
    gradients = []
    for values in (strided, logits):
        leaf = values.detach().requires_grad_()
        weights = top_k_gate(leaf, 2, impl=target.impl).weights
        # A gradient that is itself strided, as sums and transposes hand back.
        gradients.append(torch.autograd.grad(weights, leaf, upstream.t().contiguous().t())[0])
    assert_same_bits(gradients[0], gradients[1])


def test_expanded_gradient(target, generator):
    """sum() hands back a gradient of stride 0."""
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(target.device).requires_grad_()
    scores = top_k_gate(logits, 2, impl=target.impl).scores
    (gradient,) = torch.autograd.grad(scores.sum(), logits)
    assert gradient.abs().max() <= 8 * torch.finfo(torch.float64).eps  # scores sum to 1 whatever the logits are


def test_two_runs_give_the_same_bits(target, generator, assert_same_bits):
    logits = torch.randn(150, 9, generator=generator).to(target.device)
    assert_same_bits(run(logits, 2, RENORMALIZE, target.impl), run(logits, 2, RENORMALIZE, target.impl))


def test_thread_count_changes_no_bit(generator, same_bits_for_any_threads):
    """1100 rows are 18 chunks, enough for four threads forward and backward."""
    logits = torch.randn(1100, 9, generator=generator)
    upstream = upstream_for(run(logits, 3, RENORMALIZE, "reference"), generator, None)

    def compute() -> tuple[object, ...]:
        return run(logits, 3, RENORMALIZE, "native"), gradient_of(logits, 3, RENORMALIZE, "native", upstream)

    same_bits_for_any_threads(compute)


def test_batch_statistics_are_those_of_the_rows(target, generator):
    """The statistics against the outputs they summarise, over several tiles."""
    logits = torch.randn(100, 6, generator=generator, dtype=torch.float64).to(target.device)
    outputs = top_k_gate(logits, 2, impl=target.impl)
    tolerance = {"rtol": 0, "atol": 32 * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(outputs.mean_scores, outputs.scores.mean(0), **tolerance)
    shares = outputs.indices[:, 0].bincount(minlength=6) / 100.0
    torch.testing.assert_close(outputs.argmax_fraction, shares.double(), rtol=0, atol=1e-7)
    assert outputs.argmax_fraction.sum().item() == pytest.approx(1, abs=1e-14)
    entropy = torch.special.entr(outputs.scores).sum(1).mean()
    torch.testing.assert_close(outputs.mean_entropy, entropy, **tolerance)
    torch.testing.assert_close(outputs.mean_square_lse, logits.logsumexp(1).square().mean(), **tolerance)


BROKEN = {
    "nan": [[1.0, float("nan"), 0.5], [0.0, 1.0, 2.0], [float("nan")] * 3],
    "infinity": [[1.0, float("inf"), 0.5], [0.0, 1.0, 2.0], [float("inf")] * 3],
    "minus_infinity": [[1.0, float("-inf"), 0.5], [0.0, 1.0, 2.0], [float("-inf")] * 3],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BROKEN)
def test_nonfinite_rows_are_counted_and_indices_stay_valid(target, kind, dtype, assert_same_bits):
    """What a GPU does, where nothing waits: the implementation counts rows, and its indices never point outside."""
    logits = torch.tensor(BROKEN[kind], dtype=dtype, device=target.device)
    forward = GATE.module(target.impl).forward
    for top_k in (1, 2, 3):
        outputs = GateOutput(*forward(logits, top_k, RENORMALIZE))
        assert outputs.nonfinite.item() == 2
        assert outputs.nonfinite.dtype == torch.int32
        for row in outputs.indices.tolist():
            assert len(set(row)) == top_k
            assert set(row) <= {0, 1, 2}
        assert outputs.indices[1].tolist() == [2, 1, 0][:top_k]
        reference = GateOutput(*GATE.module("reference").forward(logits, top_k, RENORMALIZE))
        assert_same_bits(outputs.indices, reference.indices)
        clean = GateOutput(*forward(logits[1:2], top_k, RENORMALIZE))
        assert_same_bits(outputs.scores[1:2], clean.scores)  # a broken row spoils no other
        assert_same_bits(outputs.weights[1:2], clean.weights)
        if kind == "nan":
            assert outputs.scores[0].isnan().all()


@pytest.mark.parametrize("kind", BROKEN)
def test_nonfinite_logits_raise_on_the_cpu(kind):
    for impl in ("auto", *("reference", "native", "triton")):
        if impl == "auto" or GATE.why_not(impl, "cpu") is None:
            with pytest.raises(ValueError, match=r"logits: expected finite gate scores, got NaN or infinity in 2 row"):
                top_k_gate(torch.tensor(BROKEN[kind]), 2, impl=impl)


@pytest.mark.parametrize("top_k", [1, 2])
def test_opcheck(target, top_k, generator):
    logits = torch.randn(5, 4, generator=generator).to(target.device).requires_grad_()
    mode = STRAIGHT_THROUGH if top_k == 1 else RENORMALIZE
    ops = torch.ops.robust_moe_kernels
    torch.library.opcheck(ops.top_k_gate.default, (logits, top_k, mode, target.impl))
    torch.library.opcheck(ops.top_k_route.default, (logits, top_k, mode, target.impl))
    fixed = logits.detach()
    outputs = GateOutput(*ops.top_k_gate(fixed, top_k, mode, target.impl))
    gradients = [torch.randn_like(getattr(outputs, name)) for name in DIFFERENTIABLE]
    for present in (gradients, [None, gradients[1], None, None, None]):
        arguments = (fixed, outputs.scores, outputs.indices, *present, mode, target.impl)
        torch.library.opcheck(ops.top_k_gate_backward.default, arguments)


def test_autocast_computes_in_float32(target, generator, assert_same_bits):
    logits = torch.randn(7, 6, generator=generator).to(target.device)
    with torch.autocast(target.device, torch.bfloat16):
        inside = top_k_gate(logits, 2, impl=target.impl)
        narrow = top_k_gate(logits.bfloat16(), 2, impl=target.impl)
    assert inside.scores.dtype == narrow.scores.dtype == torch.float32
    assert_same_bits(inside, top_k_gate(logits, 2, impl=target.impl))
    assert_same_bits(narrow, top_k_gate(logits.bfloat16().float(), 2, impl=target.impl))


def _weighted(logits: Tensor, impl: str) -> Tensor:
    outputs = top_k_gate(logits * 2.0, 2, impl=impl)
    return (outputs.weights * outputs.indices).sum() + outputs.mean_entropy + outputs.mean_scores.square().sum()


def test_compiles_without_graph_breaks(target, generator):
    values = torch.randn(6, 4, generator=generator).to(target.device)
    results = []
    for function in (_weighted, torch.compile(_weighted, fullgraph=True, backend="aot_eager")):
        logits = values.clone().requires_grad_()
        loss = function(logits, target.impl)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_inductor(generator):
    """The one default-backend compilation of this suite: gate, generated code and autograd in one graph."""
    values = torch.randn(6, 4, generator=generator)
    results = []
    for function in (_weighted, torch.compile(_weighted, fullgraph=True)):
        logits = values.clone().requires_grad_()
        loss = function(logits, "auto")
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_is_in_the_table():
    assert OPS[OP] is GATE
