"""The general path: a mixture layer in plain PyTorch, beside the fused operations.

It can be differentiated any number of times, transformed by ``torch.func``, traced and exported. It is taken with
``impl="reference"`` on a layer, inside :func:`general_path`, and by itself where something is at work that the fused
operations cannot take part in.

In evaluation under a transformation or a tracer, where no decision may depend on a number, every expert runs on every
sample and the weights of those that were not chosen are 0: E/k times the work. Otherwise each runs on its own samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.expert_module import ExpertModule
from robust_moe_kernels.modules.interception import is_batched, tracing, transforming
from robust_moe_kernels.modules.route_options import RouteOptions
from robust_moe_kernels.ops.gate import GateOutput, expect_finite
from robust_moe_kernels.ops.gate import reference_impl as gate
from robust_moe_kernels.ops.routing.reference_impl import sort_by_expert

__all__ = ["decide_plainly", "general_path", "is_general", "mix_plainly", "wanted"]

_INSIDE: ContextVar[bool] = ContextVar("general_path", default=False)


@contextmanager
def general_path() -> Iterator[None]:
    """Inside, in this thread, every mixture layer takes the general path. A checkpointed function that enters this
    enters it again when it is computed again; around it, set ``impl="reference"`` on the layers."""
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)


def is_general() -> bool:
    """Whether the general path is taken now: gates then leave out fused operations too."""
    return _INSIDE.get()


def wanted(impl: str) -> bool:
    """Whether a layer with that ``impl`` takes the general path in this forward; warns where it does so by itself."""
    if impl == "reference" or _INSIDE.get():
        return True
    reason = transforming() or tracing()
    if reason is not None and not torch.compiler.is_dynamo_compiling():
        warnings.warn(
            f"{reason}: mixture-of-experts layers run in plain PyTorch here, in evaluation every expert on every sample"
            " (E/k times the work)",
            stacklevel=3,
        )
    return reason is not None


def decide_plainly(logits: Tensor, options: RouteOptions) -> GateOutput:
    """What ``top_k_gate`` returns, from operations of PyTorch alone."""
    best = _best_by_counting if tracing() else gate.best_experts
    indices = best(gate.ranking(logits), options.top_k)
    found = GateOutput(*gate.outputs_of(logits, indices, gate.KEEP))
    if logits.device.type == "cpu" and not (transforming() or tracing()):
        expect_finite(found)
    return found._replace(weights=options.weigh(found.weights))


def _best_by_counting(key: Tensor, top_k: int) -> Tensor:
    """``best_experts`` of the gate's reference without a stable sort, which ONNX has not: an expert's place is the
    number of those before it."""
    expert = torch.arange(key.shape[1], device=key.device)
    mine, other = key[:, :, None], key[:, None, :]
    before = (other > mine) | ((other == mine) & (expert < expert[:, None]))
    place = before.sum(2)  # [B, E]
    return (expert[:, None] * (place[:, :, None] == expert[:top_k])).sum(1)


def mix_plainly(experts: ExpertModule, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Rows [N, ...] through the experts ``indices`` [N, n] of each, mixed with ``weights`` [N, n]; an index of E stands
    for no expert."""
    if tracing() or (transforming() and not _training(experts)):
        _expect_evaluation(experts)
        every = torch.stack([experts.one(expert, x) for expert in range(experts.num_experts)], 1)
        named = indices[:, :, None] == torch.arange(experts.num_experts, device=indices.device)
        return experts.blend(every, (named * weights[:, :, None]).sum(1))
    if is_batched(indices) or is_batched(x):
        _expect_evaluation(experts)
    _, sample, inverse, offsets, _ = sort_by_expert(indices.reshape(-1), experts.num_experts, indices.shape[1])
    rows = experts.segments(x.index_select(0, sample), offsets.diff().tolist())
    return experts.blend(rows.index_select(0, inverse).unflatten(0, indices.shape), weights)


def _expect_evaluation(experts: ExpertModule) -> None:
    expect(not _training(experts), "layer", "eval mode where a forward is traced or mapped over", "training mode")


def _training(experts: ExpertModule) -> bool:
    """Whether a norm would learn from the rows that it sees."""
    if not isinstance(experts, nn.Module):
        got = type(experts).__name__
        raise TypeError(
            f"layer.experts: expected a torch.nn.Module where a forward is traced or mapped over, got {got}"
        )
    norms = (module for module in experts.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    return any(norm.training or norm.running_mean is None for norm in norms)
