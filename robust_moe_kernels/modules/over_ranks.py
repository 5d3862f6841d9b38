"""A batch that lies on several ranks: routing statistics and batch norms of the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.block_experts import BlockExperts
from robust_moe_kernels.modules.norm_over_ranks import norm_over_ranks
from robust_moe_kernels.modules.ranks import rank_count
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.token_gates import AdaptiveClusteringGate
from robust_moe_kernels.modules.walk import modules_of

__all__ = ["batch_over_ranks"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


def batch_over_ranks(model: nn.Module, norms: bool = False) -> None:
    """From now on a forward of ``model`` in training is one of the batch that all ranks have together, each the samples
    r, r + R, ... of it, as many as the others. Without several ranks nothing changes.

    Balance losses, the statistics of adaptive clustering and those of the released score noise are of the whole batch;
    score noise is what one rank would draw for it. Buffers of limited capacity are each rank's own, and so is whatever
    else draws numbers (dropout). Every rank makes the same forwards and backwards in the same order.

    Args:
        norms: batch norms too take their statistics from the whole batch, those of experts from the rows that each
            expert was given on any rank, as ``torch.nn.SyncBatchNorm`` does for a dense network. An expert without rows
            on a rank takes part there with none. Two sums over the ranks for each norm and training step.

    Raises:
        ValueError: with ``norms``, batch norms in blocks of a kind that cannot run on no rows (:class:`BlockExperts`).
    """
    modules = modules_of(model)
    for module in modules:
        if isinstance(module, MoELayer | AdaptiveClusteringGate):
            module.over_ranks = True
        elif norms and isinstance(module, BlockExperts):
            inside = any(isinstance(part, _BatchNorm) for part in modules_of(module))
            expect(
                not inside,
                "norms",
                "experts that may be given no rows on a rank, as residual blocks, or none with batch norms",
                type(module[0]).__name__,
            )
    if not norms:
        return
    for layer in (module for module in modules if isinstance(module, MoELayer)):
        experts: Any = layer.experts
        experts.over_ranks = True  # every expert runs, so that its norms take part
        for part in (each for each in modules_of(experts) if isinstance(each, _BatchNorm)):
            part.__dict__["own_rows"] = True  # no parameter, buffer or module
    for norm in (module for module in modules if isinstance(module, _BatchNorm)):
        kind: Any = type(norm)
        if hasattr(norm, "over_ranks"):  # of an expert, whose few rows it knows what to do with
            norm.__dict__["over_ranks"] = True
        elif not isinstance(norm, _OfAllRanks):
            norm.__class__ = _for_ranks(kind)


class _OfAllRanks(_BatchNorm):
    """A batch norm of some class, whatever else that does, whose statistics in training are those of all ranks."""

    replaces: ClassVar[Any]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or rank_count() == 1:
            return super().forward(x)
        with _Normalising() as mode:
            out = super().forward(x)
        if getattr(self, "own_rows", False) and mode.count is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked -= (mode.count == 0).to(self.num_batches_tracked.dtype)  # it was no batch
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name that a pickle could find it by.
        found: Any = super().__reduce_ex__(protocol)
        return _made, (self.replaces,), *found[2:]


class _Normalising(TorchFunctionMode):
    """Inside, ``F.batch_norm`` in training is that of all ranks."""

    count: Tensor | None = None  # of values per channel, on all ranks

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._norm(*args, **(kwargs or {})) if func is F.batch_norm else func(*args, **(kwargs or {}))

    def _norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        out, self.count = norm_over_ranks(x, running_mean, running_var, weight, bias, momentum, eps)
        return out


@cache
def _for_ranks(kind: Any) -> Any:
    """The class that takes the place of a batch norm's class."""
    return type(f"OfAllRanks{kind.__name__}", (_OfAllRanks, kind), {"replaces": kind})


def _made(kind: Any) -> Any:
    return nn.Module.__new__(_for_ranks(kind))
