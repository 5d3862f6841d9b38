"""What one forward of a mixture-of-experts layer decided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.ranks import gather_over_ranks, mean_over_ranks, rank_count
from robust_moe_kernels.ops.gate.reference_impl import entropies

__all__ = ["RoutingRecord"]


@dataclass(frozen=True)
class RoutingRecord:
    """``layer.routing``: the last forward's decision, still attached to its graph, replaced by the next forward.

    N rows were routed, each by itself: the B maps of a batch, or all of its tokens, sample after sample. ``shape`` says
    how rows belong to samples, and :meth:`by_sample` puts any [N, ...] into that order.
    """

    scores: Tensor  # [N, E] softmax of the logits
    indices: Tensor  # [N, k] int64, best expert first
    weights: Tensor  # [N, k] factor of each chosen expert
    logits: Tensor  # [N, E] after noise
    clean_logits: Tensor  # [N, E] before noise
    noise_scale: Tensor | None  # [N, 1] standard deviation of the noise; None when none was added
    mean_scores: Tensor  # [E] P
    argmax_fraction: Tensor  # [E] f
    mean_entropy: Tensor  # []
    mean_square_lse: Tensor  # []
    nonfinite: Tensor  # [] int32, rows with NaN or infinite logits
    shape: tuple[int, ...]  # dimensions of the input that rows are counted by: (B,) of maps, (B, T) or more of tokens
    invalid: Tensor | None = None  # [] int32, experts out of range that a reroute named; None on a CPU or without one
    dropped: Tensor | None = None  # [N, k] bool, pairs that no expert computes (weight 0, index in range); None: none
    padding: Tensor | None = None  # [N] bool, rows that a padding mask left out, of statistics too; None without one

    def by_sample(self, values: Tensor) -> Tensor:
        """Values of the rows, [N, ...], as [*shape, ...]: with the sample first, then its tokens.

        Raises:
            ValueError: another number of rows.
        """
        rows = self.scores.shape[0]
        ok = values.dim() >= 1 and values.shape[0] == rows
        expect(ok, "values", f"shape [{rows}, ...], one for each row", list(values.shape))
        return values.reshape(*self.shape, *values.shape[1:])

    def dropped_count(self) -> Tensor:
        """[] int64: (row, expert) pairs that were dropped because a buffer was full, or that no expert chose; padding
        is not counted."""
        if self.dropped is None:
            return self.indices.new_zeros(())
        dropped = self.dropped if self.padding is None else self.dropped & ~self.padding[:, None]
        return dropped.sum()

    def with_padding(self, padding: Tensor) -> Self:
        """The gate's record with rows ``padding`` [N] left out of the statistics."""
        routed = ~padding
        share = routed.to(self.scores.dtype) / routed.sum().clamp_min(1)  # [N] of each row in a mean
        experts = torch.arange(self.scores.shape[1], device=padding.device)
        first = (self.indices[:, :1] == experts).to(share.dtype)
        entropy = entropies(self.scores)
        lse = self.logits.to(share.dtype).logsumexp(1)
        return replace(
            self,
            mean_scores=(self.scores * share[:, None]).sum(0),
            argmax_fraction=(first * share[:, None]).sum(0),
            mean_entropy=(entropy * share).sum(),
            mean_square_lse=(lse.square() * share).sum(),
            padding=padding,
        )

    def of_all_ranks(self) -> Self:
        """The record of the rows of every rank, each having as many, with one rank's below the other's; on its graph.
        What was drawn for a row, or chosen for it, stays; ``shape`` has the samples of all. All ranks have to ask."""
        floats = [self.scores, self.logits, self.clean_logits, self.weights]
        floats += [] if self.noise_scale is None else [self.noise_scale]
        kind = torch.promote_types(self.scores.dtype, self.logits.dtype)
        widths = [part.shape[1] for part in floats]
        parts = gather_over_ranks(torch.cat([part.to(kind) for part in floats], 1)).split(widths, 1)
        scores, logits, clean, weights, *scale = (part.to(own.dtype) for part, own in zip(parts, floats, strict=True))
        means = torch.cat(
            [self.mean_scores, self.argmax_fraction, self.mean_entropy.view(1), self.mean_square_lse.view(1)]
        )
        experts = len(self.mean_scores)
        mean_scores, first, entropy, lse = mean_over_ranks(means).split([experts, experts, 1, 1])
        flags = [self.dropped, self.padding]
        dropped, padding = (None if flag is None else gather_over_ranks(flag.int()).bool() for flag in flags)
        whole = replace(
            self,
            scores=scores,
            indices=gather_over_ranks(self.indices),
            weights=weights,
            logits=logits,
            clean_logits=clean,
            noise_scale=scale[0] if scale else None,
            mean_scores=mean_scores,
            argmax_fraction=first,
            mean_entropy=entropy[0],
            mean_square_lse=lse[0],
            shape=(self.shape[0] * rank_count(), *self.shape[1:]),
            dropped=dropped,
        )
        return whole if padding is None else whole.with_padding(padding)  # of which ranks have not alike

    def dropping(self, dropped: Tensor) -> Self:
        """The record with the pairs ``dropped`` [N, k] dropped, beside those that are."""
        every = dropped if self.dropped is None else self.dropped | dropped
        return replace(self, dropped=every, weights=self.weights.masked_fill(every, 0.0))

    @classmethod
    def fixed(cls, x: Tensor, expert: int, num_experts: int, shape: tuple[int, ...]) -> Self:
        """The record of a forward in which every row of x went to one expert and no gate ran: scores are one-hot."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        scores = x.new_zeros(x.shape[0], num_experts, dtype=kind)
        scores[:, expert] = 1.0
        one_hot = x.new_zeros(num_experts, dtype=kind)
        one_hot[expert] = 1.0
        zero = x.new_zeros((), dtype=kind)
        indices = torch.full((x.shape[0], 1), expert, device=x.device)
        return cls(
            scores=scores,
            indices=indices,
            weights=torch.ones_like(indices, dtype=kind),
            logits=scores,
            clean_logits=scores,
            noise_scale=None,
            mean_scores=one_hot,
            argmax_fraction=one_hot,
            mean_entropy=zero,
            mean_square_lse=zero,
            nonfinite=x.new_zeros((), dtype=torch.int32),
            shape=shape,
        )
