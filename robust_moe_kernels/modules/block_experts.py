"""Blocks of any kind as experts, which the engine does not compute: each runs by itself on its own rows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.block_probe import BlockForm, block_form
from robust_moe_kernels.modules.expert_norms import copies
from robust_moe_kernels.modules.experts import Experts
from robust_moe_kernels.modules.probe import modes_kept
from robust_moe_kernels.modules.walk import modules_of

__all__ = ["BlockExperts"]


class BlockExperts(Experts):
    """E modules [B, C, H, W] -> [B, C', H', W'] in place of one, whatever they compute: squeeze-and-excitation, other
    norms and activations, another order, ConvNeXt's blocks, drop path.

    Each runs on the contiguous segment of its own rows, and not at all without rows: its statistics stay then, and its
    parameters' gradient is 0. A batch norm's statistics are those of the expert's own rows; a single value per channel
    in training, where PyTorch's refuse, normalises to 0 (see ``ExpertBatchNorm2d``). Other layers do with one row what
    they do.

    Modules and parameters that a block refers to without having registered them are outside of it: all experts refer
    to the same. What is registered is each expert's own, also where the rest of the model has it too.

    State: the blocks' own names after the expert's number, e.g. ``0.conv1.weight`` [O, I, 3, 3].

    Raises:
        ValueError: no blocks; in a forward in training, norms that were made ``SyncBatchNorm`` where other processes
            take part: they would wait for an expert that has no rows here.
    """

    together: ClassVar[bool] = False
    known: ClassVar[bool] = False

    def __init__(self, blocks: Iterable[nn.Module], form: BlockForm) -> None:
        super().__init__(blocks)
        self.form = form

    @classmethod
    def of(cls, block: nn.Module, num_experts: int) -> Self:
        """Copies of a block. Raises ValueError for a module that maps something else, see :func:`block_form`."""
        form = block_form(block)
        return cls(copies(block, num_experts), form)

    @property
    def in_channels(self) -> int:
        return self.form.in_channels

    def content(self) -> None:
        """Nothing for the engine."""

    def read(self, members: list[list[Any]]) -> None:
        """Nothing for the engine."""

    def on_engine(self, content: Any, *_: Any) -> None:
        """Not computed there."""

    def draw(self, part: nn.Module) -> None:
        """Initialise one module of an expert: a convolution as :class:`Experts` does, a linear layer as PyTorch does;
        all else, such as norms, scales and tables of positions, keeps its numbers."""
        if isinstance(part, nn.Linear):
            part.reset_parameters()
        else:
            super().draw(part)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """All of x [B, C, H, W] through one expert."""
        if x.shape[0] == 0:
            return self._of_none(x)
        return super().one(expert, x.clone() if self.form.writes else x)

    def segments(self, rows: Tensor, counts: list[int]) -> Tensor:
        if self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            waits = any(isinstance(part, nn.SyncBatchNorm) and part.training for part in modules_of(self))
            expected = "norms that wait for no other process, where an expert may have no rows"
            expect(not waits, "experts", expected, "SyncBatchNorm")
        taken = sum(counts)
        ends = list(accumulate(counts))
        parts = [self.one(e, rows[end - n : end]) for e, (n, end) in enumerate(zip(counts, ends, strict=True)) if n]
        if not parts:
            parts.append(self._of_none(rows))
        first = parts[0]
        if taken < len(rows):
            parts.append(first.new_zeros(len(rows) - taken, *first.shape[1:]))
        idle = [p for e, n in enumerate(counts) if n == 0 for p in self[e].parameters()]
        if torch.is_grad_enabled() and any(p.requires_grad for p in idle):
            parts.append(_empty_of(idle, first))
        return torch.cat(parts)

    def _of_none(self, x: Tensor) -> Tensor:
        """The output for no rows: of the shape that one row has, by a run in evaluation that leaves no trace. Blocks
        that fold maps into each other cannot say it of none."""
        expert = self[0]
        with torch.no_grad(), modes_kept(expert):
            like = expert.eval()(x.new_zeros(1, *x.shape[1:]))
        return _empty_of([x], like)


def _empty_of(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """No rows [0, ...] of the form of ``like``, whose gradient is a zero for each number of the tensors."""
    numbers = torch.cat([tensor.reshape(-1)[:0].to(like.dtype) for tensor in tensors])
    return numbers.reshape(0, *like.shape[1:])
