"""Copies of a module for experts, whose batch norms see few rows: one, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from types import MethodType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.modules.norm_over_ranks import norm_over_ranks
from robust_moe_kernels.modules.ranks import rank_count
from robust_moe_kernels.modules.walk import modules_of, tensors_of

__all__ = ["ExpertBatchNorm2d", "copied", "copies", "kind_of", "original"]

_BatchNorm = nn.modules.batchnorm._BatchNorm
_TABLES = ("_parameters", "_buffers", "_modules")  # of what a module has registered


class ExpertBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that sees its own expert's rows only, however few they are.

    In training, no rows leave the running statistics as they were. A single value a channel (n*H*W = 1), where
    ``nn.BatchNorm2d`` raises, has variance 0: the output is the bias, no gradient flows to the input, the running mean
    moves and the running variance, whose unbiased estimate does not exist, stays.
    """

    replaces: ClassVar[type[nn.Module]] = nn.BatchNorm2d
    over_ranks = False  # whether its rows in training are those of all ranks (``batch_over_ranks``)

    def forward(self, x: Tensor) -> Tensor:
        if self.over_ranks and self.training and rank_count() > 1:
            return _of_all_ranks(self, x)
        if not self.training or x.numel() > x.shape[1]:
            return super().forward(x)
        if x.shape[0] > 0 and self.track_running_stats and self.running_mean is not None:
            batches: Any = self.num_batches_tracked
            batches.add_(1)
            _move_mean(self, x)
        zeros = _zeros(x)
        return (zeros.to(self.weight.dtype) * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _FewRows(_BatchNorm):
    """What :class:`ExpertBatchNorm2d` does, before a batch norm of another class, which may do more than normalise
    (timm's activate too): two rows of zeros stand for the single one, which normalises to zeros as they do."""

    replaces: ClassVar[type[nn.Module]]
    over_ranks = False  # as of ExpertBatchNorm2d; for a class that does no more than normalise

    def forward(self, x: Tensor) -> Tensor:
        if self.over_ranks and self.training and rank_count() > 1:
            return _of_all_ranks(self, x)
        if not self.training or x.numel() > x.shape[1]:
            return super().forward(x)
        if x.shape[0] == 0:
            self.training = False
            try:
                return super().forward(x)
            finally:
                self.training = True
        mean, variance = self._buffers["running_mean"], self._buffers["running_var"]
        if mean is not None and variance is not None:  # copies move with the zeros
            self._buffers |= {"running_mean": mean.clone(), "running_var": variance.clone()}
        try:
            zeros = _zeros(x)
            out = super().forward(torch.cat([zeros, zeros]))[:1]
        finally:
            self._buffers |= {"running_mean": mean, "running_var": variance}
        if self.track_running_stats and mean is not None:
            _move_mean(self, x)
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name that a pickle could find it by.
        found: Any = super().__reduce_ex__(protocol)
        return _made, (self.replaces,), *found[2:]


def _of_all_ranks(norm: _BatchNorm, x: Tensor) -> Tensor:
    batches: Any = norm.num_batches_tracked
    momentum = norm.momentum
    if momentum is None:
        momentum = 0.0 if batches is None else 1.0 / (float(batches) + 1.0)
    out, count = norm_over_ranks(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, momentum, norm.eps)
    if batches is not None:
        batches += (count > 0).to(batches.dtype)
    return out


def _zeros(x: Tensor) -> Tensor:
    """Zeros that hang on x: what came before, and the scale, have the gradient 0 then, not none."""
    return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)


def _move_mean(norm: _BatchNorm, x: Tensor) -> None:
    """Move the running mean towards a single value per channel, after the batch was counted. By a norm's own update: a
    change in place is one that the backward of an earlier forward refuses."""
    mean, batches = norm.running_mean, norm.num_batches_tracked
    assert mean is not None
    share = norm.momentum
    if share is None:
        assert batches is not None  # it cannot average without
        share = 1.0 / float(batches)
    twice = torch.cat([x, x]).detach().to(mean.dtype)
    with torch.no_grad():
        F.batch_norm(twice, mean, torch.ones_like(mean), training=True, momentum=share)


@cache
def _for_experts(kind: Any) -> Any:
    """The class that takes a batch norm's place in an expert."""
    if kind is nn.BatchNorm2d:
        return ExpertBatchNorm2d
    return type(f"Expert{kind.__name__}", (_FewRows, kind), {"replaces": kind})


def _made(kind: Any) -> Any:
    return nn.Module.__new__(_for_experts(kind))


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it stands for where that has a name and it has none."""
    return module.replaces if isinstance(module, _FewRows) else type(module)


def copies(module: nn.Module, count: int) -> list[nn.Module]:
    """Copies of a module, each norm of which is that of an expert; modes and ``requires_grad`` as in the module."""
    made = [copied(module) for _ in range(count)]
    for each in (part for whole in made for part in modules_of(whole)):
        if isinstance(each, _BatchNorm) and not isinstance(each, ExpertBatchNorm2d | _FewRows):
            kind: Any = type(each)
            each.__class__ = _for_experts(kind)
    return made


def original(expert: nn.Module) -> nn.Module:
    """The expert itself, its norms of the replaced module's classes again."""
    for each in modules_of(expert):
        if isinstance(each, ExpertBatchNorm2d | _FewRows):
            each.__class__ = each.replaces  # type: ignore[assignment]
    return expert


def copied(module: nn.Module) -> nn.Module:
    """A deep copy that refers to the same modules and parameters outside of the module: those that it has not
    registered, and so neither trains nor moves."""
    return copy.deepcopy(module, {id(value): value for value in _outside(module)})


def _outside(module: nn.Module) -> Iterator[nn.Module | nn.Parameter]:
    parts = modules_of(module)
    seen = {id(value) for value in (*parts, *tensors_of(parts))}
    waiting: list[Any] = [value for part in parts for name, value in vars(part).items() if name not in _TABLES]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module | nn.Parameter):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif isinstance(value, MethodType):
            waiting.append(value.__self__)
