"""Tensors in another dtype, as autocast makes them: many in one launch, and filters once for an attack."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.modules.interception import Snapshot, is_batched
from robust_moe_kernels.modules.stacks import Stack, same, unchanged

__all__ = ["CastFilters", "converted"]


class CastFilters(NamedTuple):
    """All layers' filters in another dtype, and those that they were made of."""

    values: list[Tensor]
    filters: list[Stack]
    states: list[Snapshot]

    def is_of(self, filters: list[Stack], dtype: torch.dtype) -> bool:
        return self.values[0].dtype == dtype and same(filters, self.filters) and unchanged(filters, self.states)


def converted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors in another dtype, differentiable: one launch for all of them, and one for all of their gradients."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return list(_Converted.apply(dtype, *tensors))
    return _convert([tensor.detach() for tensor in tensors], dtype)


class _Converted(torch.autograd.Function):
    """Tensors, all of one dtype, in another; one multi-tensor launch each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.kind = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_convert(list(tensors), dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or any(gradient is not None and is_batched(gradient) for gradient in gradients):
            return (None, *(None if gradient is None else gradient.to(ctx.kind) for gradient in gradients))
        found = iter(_convert([gradient for gradient in gradients if gradient is not None], ctx.kind))
        return (None, *(None if gradient is None else next(found) for gradient in gradients))


def _convert(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    converted = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if converted:
        torch._foreach_copy_(converted, tensors)
    return converted
