"""Gates of tokens: rows [N, C] in, one logit an expert out.

As the gates of maps, they are computed in the precision of their own parameters, float32 at least, outside autocast.
Each row's logits are from that row alone, but for :class:`AdaptiveClusteringGate` in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules.general_path import is_general
from robust_moe_kernels.modules.interception import has_hooks, transforming
from robust_moe_kernels.modules.ranks import sum_over_ranks
from robust_moe_kernels.ops.gate import pool_linear

__all__ = ["TOKEN_GATES", "AdaptiveClusteringGate", "LinearGate", "NoisyTopKGate"]


class LinearGate(nn.Module):
    """One linear layer without bias, whose softmax weighs the experts (2106.05974, section 2.2).

    A row's logits do not depend on the other rows, bit for bit: a library's product may sum one row in another order
    than many, and a rounding decides the route.

    forward: [N, C], any float -> logits [N, E] in the parameters' dtype, float32 for lower precisions.
    """

    last_layer = "fc"  # has one output per expert (:func:`~robust_moe_kernels.modules.prune_experts`)

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        plain = type(self.fc) is nn.Linear and not has_hooks(self.fc)
        if plain and not is_general():
            kind = torch.promote_types(weight.dtype, torch.float32)
            bias = None if self.fc.bias is None else self.fc.bias.to(kind)
            return pool_linear(x[:, :, None, None], weight.to(kind), bias)  # the mean over a map of one pixel
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(x.to(weight.dtype if isinstance(weight, Tensor) else torch.float32))


class NoisyTopKGate(LinearGate):
    """The router of V-MoE (Riquelme et al., 2106.05974, section 2.2): TOP_k(softmax(W x + noise)), the noise
    N(0, 1/E^2) in training alone, the k scores kept as they are.

    Noise and weights are the layer's: with this gate :meth:`~robust_moe_kernels.modules.FusedMLPMoE.from_mlp` sets
    ``noise="vmoe"``, ``noise_std=1``, ``renormalize=False`` and ``straight_through=False``. The losses that go with it
    are ``balance_loss(model, "vmoe")``.

    forward: as :class:`LinearGate`.
    """


class AdaptiveClusteringGate(LinearGate):
    """The adaptive clustering router of ACMoE (Nielsen, Teo, Abdullaev and Nguyen, ICLR 2025, arXiv:2502.15315): a
    linear gate in a space in which the features count the more the tighter the token's cluster is along them.

    The clusters are those of the routed layer before: cluster k has the tokens whose first choice there was expert k,
    whether or not the expert had room for them. Over its tokens h, as they come to this gate, s_qk is the mean absolute
    deviation of feature q from its mean, and M_k = diag(1/s_1k, ..., 1/s_dk). The logit of expert j for a token of
    cluster k is h^T M_k e_j, e_j being row j of the weight. Softmax and choice are those of any gate. The first routed
    layer of a network has no clusters and routes plainly.

    The scale, the floor, small clusters and evaluation are our choice: M_k is divided by the mean of its diagonal, so
    that logits keep their size and equal spreads give the identity; first, s_qk is raised to ``floor`` times its mean
    over the features, so that no M_k has an entry above 1 + 1/floor. Padding is in no cluster.

    As of batch norms, the spreads are the batch's in training, where a row's logits so depend on the batch's other
    rows, and a cluster of fewer than two tokens has the identity. In evaluation they are running means, and a row's
    logits are from that row and its cluster alone; a cluster that was never seen has the identity. Running means take
    the newest batch with a weight of ``rate``, the first batches with equal weights; not under
    :func:`~robust_moe_kernels.modules.attack_mode`, nor from a cluster of fewer than two tokens or with numbers that
    are not finite. Each process has its own, but for ``batch_over_ranks``. M_k is a constant: no gradient passes
    through it.

    State: that of :class:`LinearGate`; where there is a layer before, ``spread`` [K, C], the running means, and
    ``seen`` int64 [K], how many batches they are of, K being the number of that layer's experts.

    Args:
        in_features, num_experts: C and E.
        floor: in (0, 1].
        rate: in (0, 1].

    forward: as :class:`LinearGate`; ``clusters`` int64 [N] and ``padding`` bool [N] come from the layer
    (:func:`~robust_moe_kernels.modules.link_layers`); without clusters a plain linear gate.
    """

    spread: Tensor | None
    seen: Tensor | None
    over_ranks = False  # whether the batch in training is that of all ranks (``batch_over_ranks``)

    def __init__(self, in_features: int, num_experts: int, floor: float = 0.1, rate: float = 0.1) -> None:
        super().__init__(in_features, num_experts)
        for name, value in (("floor", floor), ("rate", rate)):
            expect(type(value) in (int, float) and 0 < value <= 1, name, "a number in (0, 1]", repr(value))
        self.floor = floor
        self.rate = rate
        self.learns = True  # whether running means move in training
        self.follow(None)

    @property
    def clusters(self) -> int | None:
        """K; None: there is no layer before."""
        return None if self.spread is None else len(self.spread)

    def follow(self, clusters: int | None) -> None:
        """Expect so many clusters, None: no layer before. What is known stays as long as their number does."""
        if getattr(self, "spread", None) is not None and self.clusters == clusters:
            return
        like = self.fc.weight.detach()
        self.register_buffer("spread", None if clusters is None else torch.ones_like(like[:1]).repeat(clusters, 1))
        seen = None if clusters is None else torch.zeros(clusters, dtype=torch.int64, device=like.device)
        self.register_buffer("seen", seen)

    def keep_clusters(self, clusters: list[int]) -> None:
        """Drop what is known of all other clusters, as of experts that are pruned in the layer before."""
        if self.spread is not None and self.seen is not None:
            self.spread, self.seen = self.spread[clusters], self.seen[clusters]

    def forward(self, x: Tensor, clusters: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        if clusters is None:
            return super().forward(x)
        wanted = "one that follows the layer before (link_layers links anew once a gate was replaced)"
        expect(self.spread is not None, "gate", wanted, "one that follows none")
        kind = torch.promote_types(self.fc.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            factors = self._factors(x.detach().to(kind), clusters, padding)
        return super().forward(x.to(kind) * factors.index_select(0, clusters))

    def _factors(self, x: Tensor, clusters: Tensor, padding: Tensor | None) -> Tensor:
        """The diagonals of M, [K, C]; in training from this batch, which then counts in the running means."""
        assert self.spread is not None and self.seen is not None
        if not self.training:
            return self._diagonals(self.spread.to(x.dtype))
        member = clusters[:, None] == torch.arange(len(self.spread), device=x.device)
        if padding is not None:
            member = member & ~padding[:, None]
        whole: Callable[[Tensor], Tensor] = sum_over_ranks if self.over_ranks else _unchanged
        count = whole(member.sum(0))  # [K]
        share = member.to(x.dtype) / count.clamp_min(1)  # [N, K] of each row in its cluster's means
        deviation = (x - whole(share.t() @ x).index_select(0, clusters)).abs()
        spread = whole(share.t() @ deviation)  # [K, C]
        known = count >= 2
        if self.learns:
            if (reason := transforming()) is not None:
                raise RuntimeError(f"gate: expected eval mode, or attack_mode, where {reason}, got training mode")
            counted = known & spread.isfinite().all(1)
            self.seen += counted
            weight = (1.0 / self.seen.clamp_min(1).to(x.dtype)).clamp_min(self.rate)[:, None]
            moved = self.spread.to(x.dtype).lerp(spread, weight)
            self.spread.copy_(torch.where(counted[:, None], moved, self.spread.to(x.dtype)))
        return torch.where(known[:, None], self._diagonals(spread), 1.0)

    def _diagonals(self, spread: Tensor) -> Tensor:
        mean = spread.mean(1, keepdim=True)
        relative = spread / mean.clamp_min(torch.finfo(spread.dtype).tiny)
        inverse = 1.0 / relative.clamp_min(self.floor)
        return inverse / inverse.mean(1, keepdim=True)


def _unchanged(x: Tensor) -> Tensor:
    return x


TOKEN_GATES: dict[str, type[nn.Module]] = {
    "linear": LinearGate,
    "noisy_top_k": NoisyTopKGate,
    "adaptive_clustering": AdaptiveClusteringGate,
}
