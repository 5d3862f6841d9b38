"""Top-k gate: softmax, selection, weights and the statistics of the balance losses, in one pass over the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.checks import FLOATS, expect, expect_dtype, expect_tensor
from robust_moe_kernels.dispatch import AUTO, Op
from robust_moe_kernels.operands import Operands, expect_index
from robust_moe_kernels.ops.gate import reference_impl
from robust_moe_kernels.ops.gate.reference_impl import KEEP, RENORMALIZE, STRAIGHT_THROUGH
from robust_moe_kernels.ops.routing import Route
from robust_moe_kernels.second_derivatives import another_follows

__all__ = ["GATE", "GateOutput", "expect_finite", "top_k_gate", "top_k_route"]

GATE = Op(__package__, cpu=("native", "reference"), cuda=("triton", "native", "reference"))


class GateOutput(NamedTuple):
    """What :func:`top_k_gate` returns; floats are float32 (float64 for float64 logits)."""

    scores: Tensor  # [B, E] softmax over all experts
    indices: Tensor  # [B, k] int64, best first
    weights: Tensor  # [B, k] factor of each chosen expert
    mean_scores: Tensor  # [E] P, the mean of scores over the batch
    argmax_fraction: Tensor  # [E] f, share of rows whose best expert it is; no gradient
    mean_entropy: Tensor  # [] mean over rows of H(scores), nats
    mean_square_lse: Tensor  # [] mean over rows of logsumexp(logits)^2
    nonfinite: Tensor  # [] int32, rows with a NaN or infinite logit


def top_k_gate(
    logits: Tensor, top_k: int, renormalize: bool = True, straight_through: bool = True, impl: str = AUTO
) -> GateOutput:
    """Route each row to its k highest logits (2509.05086 section 3).

    Softmax runs over all experts before the selection. Ties go to the lowest index. The weights of the kept experts are

    - k >= 2, or k = 1 with ``straight_through=False``: the kept scores, divided by their sum if ``renormalize`` (the
      release adds 1e-5 to that sum, we do not: k of E scores sum to at least k/E, so the weights sum to 1);
    - k = 1 with ``straight_through``: exactly 1 forward, the score's gradient backward. Without it and with
      ``renormalize`` a single weight is the constant 1 and the gate gets no task gradient.

    A NaN or infinite logit is an error: on the CPU at once, on a GPU the row is counted in ``nonfinite`` without
    waiting for the device and the caller reads it when it next reads anything
    (``robust_moe_kernels.modules.check_finite``).

    Args:
        logits: [B, E], any floating dtype; float16 and bfloat16 are computed in float32.
        top_k: 1 <= k <= E.
        impl: "auto", "reference", "native" (CPU and CUDA) or "triton".

    Returns:
        :class:`GateOutput`. ``scores``, ``weights``, ``mean_scores``, ``mean_entropy`` and ``mean_square_lse`` are
        differentiable with respect to ``logits``.

    Raises:
        TypeError, ValueError: wrong dtype or shape, k outside 1..E, non-finite logits on the CPU.
        ImplementationUnavailable: a named implementation cannot run here.
    """
    mode = _checked_mode(logits, top_k, renormalize, straight_through)
    return GateOutput(*torch.ops.robust_moe_kernels.top_k_gate(logits, top_k, mode, impl))


def top_k_route(
    logits: Tensor, top_k: int, renormalize: bool = True, straight_through: bool = True, impl: str = AUTO
) -> tuple[GateOutput, Route]:
    """As :func:`top_k_gate`, and its (sample, slot) pairs sorted by expert, as ``sort_by_expert`` would sort them: on a
    GPU a kernel less than one after the other."""
    mode = _checked_mode(logits, top_k, renormalize, straight_through)
    outputs = torch.ops.robust_moe_kernels.top_k_route(logits, top_k, mode, impl)
    order, sample, inverse, offsets, invalid = outputs[_FIELDS:]
    return GateOutput(*outputs[:_FIELDS]), Route(order, sample, inverse, offsets, invalid, top_k)


def _checked_mode(logits: Tensor, top_k: int, renormalize: bool, straight_through: bool) -> int:
    """The mode by its number; raises where an argument is wrong."""
    expect_tensor(logits, "logits")
    expect_dtype(logits, "logits", FLOATS)
    expect(logits.dim() == 2 and logits.shape[1] >= 1, "logits", "shape [B, E] with E >= 1", list(logits.shape))
    expect(1 <= top_k <= logits.shape[1], "top_k", f"1 <= k <= E = {logits.shape[1]}", top_k)
    if top_k == 1 and straight_through:
        return STRAIGHT_THROUGH
    return RENORMALIZE if renormalize else KEEP


_FIELDS = len(GateOutput._fields)
_MODES = (KEEP, RENORMALIZE, STRAIGHT_THROUGH)
_FORWARD = "robust_moe_kernels::top_k_gate"
_SORTED = "robust_moe_kernels::top_k_route"
_BACKWARD = "robust_moe_kernels::top_k_gate_backward"
for _name, _outputs in ((_FORWARD, _FIELDS), (_SORTED, _FIELDS + 5)):
    _results = ", ".join(["Tensor"] * _outputs)
    torch.library.define(_name, f"(Tensor logits, int top_k, int mode, str impl) -> ({_results})")
torch.library.define(
    _BACKWARD,
    "(Tensor logits, Tensor scores, Tensor indices, Tensor? d_scores, Tensor? d_weights, Tensor? d_mean_scores,"
    " Tensor? d_mean_entropy, Tensor? d_mean_square_lse, int mode, str impl) -> Tensor",
)


_LOGITS = Operands("logits float [B, E]")
_GRADIENTS = Operands(
    "logits float [B, E]; scores sum [B, E]; indices int64 [B, k]; d_scores? sum [B, E]; d_weights? sum [B, k];"
    " d_mean_scores? sum [E]; d_mean_entropy? sum []; d_mean_square_lse? sum []"
)


def _expect_choice(logits: Tensor, top_k: int, mode: int) -> None:
    experts = _LOGITS(logits)["E"]
    expect(1 <= top_k <= experts, "top_k", f"1 <= k <= E = {experts}", top_k)
    expect(mode in _MODES, "mode", f"one of {_MODES}", mode)


@torch.library.impl(_FORWARD, "default")
def _forward(logits: Tensor, top_k: int, mode: int, impl: str) -> tuple[Tensor, ...]:
    _expect_choice(logits, top_k, mode)
    outputs = GATE.choose(impl, logits).forward(logits.contiguous(), top_k, mode)
    expect_finite(GateOutput(*outputs[:_FIELDS]))
    return outputs


@torch.library.impl(_SORTED, "default")
def _forward_sorted(logits: Tensor, top_k: int, mode: int, impl: str) -> tuple[Tensor, ...]:
    _expect_choice(logits, top_k, mode)
    outputs = GATE.choose(impl, logits).forward_sorted(logits.contiguous(), top_k, mode)
    expect_finite(GateOutput(*outputs[:_FIELDS]))
    return outputs


def expect_finite(output: GateOutput) -> None:
    """Raise on the CPU, where looking costs nothing, if a row was not finite."""
    nonfinite = output.nonfinite
    if nonfinite.device.type == "cpu" and nonfinite.item():
        raise ValueError(f"logits: expected finite gate scores, got NaN or infinity in {nonfinite.item()} row(s)")


@torch.library.register_fake(_FORWARD)
def _forward_fake(logits: Tensor, top_k: int, mode: int, impl: str) -> tuple[Tensor, ...]:
    rows, experts = logits.shape
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shapes = ((rows, experts), (rows, top_k), (rows, top_k), (experts,), (experts,), (), (), ())
    kinds = (kind, torch.int64, kind, kind, kind, kind, kind, torch.int32)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, kinds, strict=True))


@torch.library.register_fake(_SORTED)
def _forward_sorted_fake(logits: Tensor, top_k: int, mode: int, impl: str) -> tuple[Tensor, ...]:
    rows, experts = logits.shape
    sizes = [rows * top_k] * 3 + [experts + 1]
    route = [logits.new_empty(size, dtype=torch.int64) for size in sizes]
    return *_forward_fake(logits, top_k, mode, impl), *route, logits.new_empty((), dtype=torch.int32)


@torch.library.impl(_BACKWARD, "default")
def _backward(
    logits: Tensor,
    scores: Tensor,
    indices: Tensor,
    d_scores: Tensor | None,
    d_weights: Tensor | None,
    d_mean_scores: Tensor | None,
    d_mean_entropy: Tensor | None,
    d_mean_square_lse: Tensor | None,
    mode: int,
    impl: str,
) -> Tensor:
    gradients = (d_scores, d_weights, d_mean_scores, d_mean_entropy, d_mean_square_lse)
    sizes = _GRADIENTS(logits, scores, indices, *gradients)
    expect(sizes["k"] >= 1, "indices", "shape [B, k] with k >= 1", list(indices.shape))
    expect(mode in _MODES, "mode", f"one of {_MODES}", mode)
    indices = expect_index(indices, "indices", sizes["E"])
    dense = (None if gradient is None else gradient.contiguous() for gradient in gradients)
    chosen = GATE.choose(impl, logits)
    return chosen.backward(logits.contiguous(), scores.contiguous(), indices, *dense, mode)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    _GRADIENTS.expect_kinds(logits, *rest[:7])
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _top_k, ctx.mode, ctx.impl = inputs
    gate, route = GateOutput(*output[:_FIELDS]), output[_FIELDS:]
    ctx.save_for_backward(logits, gate.scores, gate.indices)
    ctx.mark_non_differentiable(gate.indices, gate.argmax_fraction, gate.nonfinite, *route)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    d_scores, _, d_weights, d_mean_scores, _, d_mean_entropy, d_mean_square_lse, *_ = gradients
    logits, scores, indices = ctx.saved_tensors
    if another_follows():
        floats = (d_scores, d_weights, d_mean_scores, d_mean_entropy, d_mean_square_lse)
        return reference_impl.backward(logits, scores, indices, *floats, ctx.mode), None, None, None
    d_logits = torch.ops.robust_moe_kernels.top_k_gate_backward(
        logits,
        scores,
        indices,
        d_scores,
        d_weights,
        d_mean_scores,
        d_mean_entropy,
        d_mean_square_lse,
        ctx.mode,
        ctx.impl,
    )
    return d_logits, None, None, None


def _twice(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("the operation top_k_gate_backward has no derivative; top_k_gate has any number of them")


for _name in (_FORWARD, _SORTED):
    torch.library.register_autograd(_name, _autograd, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _twice)  # without it PyTorch warns and returns a wrong number
for _name in (_FORWARD, _SORTED):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(_name, _device, torch.float32)
