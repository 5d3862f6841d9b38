"""Whole networks as experts: the mixture of "Optimizing Robustness and Accuracy in Mixture of Experts" (ICML 2025)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe_kernels.checks import expect
from robust_moe_kernels.layout import expert_of_row
from robust_moe_kernels.modules import MoELayer, moe_layers, rank_count, sum_over_ranks
from robust_moe_kernels.ops.permute import combine, dispatch
from robust_moe_kernels.ops.routing import Route

from .mixing import MIXES, log_mixture

__all__ = ["ROUTINGS", "ExpertMixture", "NetworkExperts"]

ROUTINGS = ("soft", "top_k", "hard")  # all experts, the best k, the best


class NetworkExperts(nn.Module):
    """E networks as the experts of a :class:`~robust_moe_kernels.modules.MoELayer`.

    A network sees the images that are routed to it and no others: its batch norms are those of its own rows, and in
    training one that gets no image keeps its statistics and gets no gradient (``None``, so that optimisers skip it).
    Where every image goes to E experts each network runs on the whole batch and nothing waits for the router;
    otherwise the sizes of the segments are read on the host once a forward.

    In training a network may be sent a single image. Batch norms over maps of several pixels can do with that;
    ``BatchNorm1d``, or maps of one pixel, cannot: PyTorch refuses, and the error names the expert.

    Args:
        networks: modules of one kind of input and output, float [n, C, H, W] -> logits [n, classes].
        in_channels: C.
        mix: "logits": sum_i w_i f_i(x); "probabilities": log sum_i w_i softmax(f_i(x)).

    Raises:
        ValueError: no networks, another ``mix``, networks with routed layers of their own; in a forward, networks
            whose outputs differ in shape, or that refuse the images they are sent.
    """

    over_ranks = False  # whether the networks' norms in training are those of all ranks (``batch_over_ranks``)

    def __init__(self, networks: Sequence[nn.Module], in_channels: int, mix: str = "logits") -> None:
        super().__init__()
        expect(len(networks) >= 1, "networks", "at least one", len(networks))
        expect(mix in MIXES, "mix", f"one of {', '.join(MIXES)}", repr(mix))
        inner = next((number for number, network in enumerate(networks) if moe_layers(network)), None)
        # it would see, and record, the routes of a part of the batch only
        expect(inner is None, "networks", "networks without mixture-of-experts layers of their own", f"network {inner}")
        self.networks = nn.ModuleList(networks)
        self.in_channels = in_channels
        self.domain = mix

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.networks)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """All of x [B, C, H, W] through one network: what :meth:`mix` returns where its weight is 1."""
        return self._in_domain(self.networks[expert](x))

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        """Images [B, C, H, W] through the networks that they are routed to -> [B, classes].

        weights: [B, k]. Logits keep the dtype of the networks' outputs; the logarithms of mixed probabilities are
        float32 (float64 for networks in float64).
        """
        if route.top_k >= self.num_experts:
            return self._mix_all(x, route, weights)
        if x.shape[0] == 0:  # an empty batch still has an output shape
            return self.one(0, x)
        rows = self.segments(dispatch(x, route), route.counts.tolist())
        if self.domain == "logits":
            return combine(rows, route, weights)
        return self.blend(rows.index_select(0, route.inverse).unflatten(0, weights.shape), weights)

    def segments(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Images [R, C, H, W] sorted by network, ``counts[i]`` of them for network i, each through its own, as ``one``
        returns them."""
        if rows.shape[0] == 0:
            return self.one(0, rows)
        # one whose norms are those of all ranks takes part, without rows, where another rank has some
        wide = self.over_ranks and self.training and rank_count() > 1
        run = sum_over_ranks(torch.tensor(counts, device=rows.device)).tolist() if wide else counts
        outputs = [self._run(i, segment) for i, segment in enumerate(rows.split(counts)) if run[i]]
        self._expect_one_shape(outputs)
        return self._in_domain(torch.cat(outputs))

    def blend(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Outputs [B, n, classes] as ``one`` and ``segments`` return them, mixed with weights [B, n]."""
        kind = torch.promote_types(outputs.dtype, torch.float32)
        if self.domain == "logits":
            return (weights[:, :, None].to(kind) * outputs.to(kind)).sum(1).to(outputs.dtype)
        return log_mixture(outputs, weights.to(outputs.dtype))

    def _mix_all(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        outputs = [network(x) for network in self.networks]
        self._expect_one_shape(outputs)
        stacked = self._in_domain(torch.stack(outputs, 1))  # [B, E, classes]
        kind = torch.promote_types(stacked.dtype, torch.float32)
        # imposed routes may name an expert twice
        expert = expert_of_row(route.offsets, route.order.numel()).index_select(0, route.inverse).view(weights.shape)
        named = expert[:, :, None] == torch.arange(self.num_experts, device=x.device)  # [B, n, E]
        return self.blend(stacked, (named * weights[:, :, None].to(kind)).sum(1))

    def _run(self, expert: int, rows: Tensor) -> Tensor:
        try:
            return self.networks[expert](rows)
        except ValueError as error:
            raise ValueError(f"networks: expert {expert} on the {len(rows)} images routed to it: {error}") from error

    def _in_domain(self, logits: Tensor) -> Tensor:
        if self.domain == "logits":
            return logits
        return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)

    def _expect_one_shape(self, outputs: list[Tensor]) -> None:
        shapes = {tuple(output.shape[1:]) for output in outputs}
        expect(len(shapes) == 1, "networks", "outputs of one shape", " and ".join(map(str, sorted(shapes))))

    def extract(self, expert: int) -> nn.Module:
        """One network with its own copy of the parameters."""
        return copy.deepcopy(self.networks[expert]).requires_grad_(True)

    def keep(self, experts: Sequence[int]) -> None:
        """Drop all other networks, in place; those that stay are in the order given."""
        self.networks = nn.ModuleList(self.networks[expert] for expert in experts)

    def extra_repr(self) -> str:
        return f"mix={self.domain!r}"


class ExpertMixture(MoELayer):
    """F(x) = sum_i a_i(x) f_i(x): E whole networks behind a router on the image.

    A :class:`~robust_moe_kernels.modules.MoELayer`, so what finds, measures, attacks and reroutes those works on it;
    ``gate`` is the router. State dict: ``gate.*`` and ``experts.networks.{i}.*``.

    The released code of the paper routes by a hard argmax that no gradient passes: that is ``routing="hard",
    straight_through=False``, which warns. By default the router of every routing learns.

    Args:
        router: float [B, C, H, W] -> logits [B, E], a_i their softmax; see :data:`robust_moe.models.ROUTERS`.
        networks: the E experts, each with an input normalisation of its own; see :class:`NetworkExperts`.
        in_channels: C.
        routing: "soft": all E, weighted by their scores; "top_k": the best k; "hard": the best one.
        top_k: k of "top_k", 1 <= k <= E; not used by the others.
        renormalize: divide the kept scores by their sum. With "hard" and no ``straight_through`` the weight is then
            the constant 1; without, it is the score.
        straight_through: of one kept score: forward weight exactly 1, the score's gradient.
        mix: "logits" or "probabilities", see :class:`NetworkExperts`.
        noise_std: standard deviation of the score noise in training, in units of each row's own spread; 0: none.

    forward: float [B, C, H, W] in [0, 1] -> logits [B, classes]; of "probabilities", their logarithms.

    Raises:
        ValueError: an argument out of range; what MoELayer and NetworkExperts raise.
    """

    def __init__(
        self,
        router: nn.Module,
        networks: Sequence[nn.Module],
        in_channels: int,
        routing: str = "soft",
        top_k: int = 2,
        renormalize: bool = True,
        straight_through: bool = True,
        mix: str = "logits",
        noise_std: float = 0.0,
    ) -> None:
        expect(routing in ROUTINGS, "routing", f"one of {', '.join(ROUTINGS)}", repr(routing))
        experts = NetworkExperts(networks, in_channels, mix)
        chosen = {"soft": experts.num_experts, "top_k": top_k, "hard": 1}[routing]
        super().__init__(router, experts, chosen, renormalize, straight_through, noise_std)
