"""The mixture-of-experts layer: gate, sort, dispatch, experts, combine."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect, expect_dtype
from robust_moe_kernels.modules.experts import Experts, StackedConv2d
from robust_moe_kernels.modules.gates import Gate, build_gate, score_noise_scale
from robust_moe_kernels.modules.residual import ResidualExperts
from robust_moe_kernels.modules.routing_record import RoutingRecord
from robust_moe_kernels.ops.gate import top_k_route
from robust_moe_kernels.ops.routing import Route, sort_by_expert

if TYPE_CHECKING:
    from robust_moe_kernels.modules.route_control import Reroute

__all__ = ["FusedBlockMoE", "FusedConvMoE", "MoELayer"]

INITS = ("copy", "fresh")


class MoELayer(nn.Module):
    """F(x) = sum_i g_i(x) e_i(x) over the k experts the gate chooses for each sample (2509.05086 section 3).

    Every sample's whole map goes to its experts. State dict: ``gate.*`` as the gate names it and ``experts.*``, the
    replaced module's own names with a leading dimension E; nothing else.

    Whole networks are experts too: with a gate on the images and experts whose ``mix`` returns logits, the layer is the
    model. ``reroute``, which :func:`~robust_moe_kernels.modules.route_control.rerouted` sets, replaces what it decides.

    Args:
        gate: module, [B, C, H, W] -> logits [B, E].
        experts: E stacked experts, or any module with their ``num_experts``, ``in_channels``, ``one`` and ``mix``.
        top_k: k, 1 <= k <= E.
        renormalize: divide the k kept scores by their sum.
        straight_through: for k = 1, forward weight exactly 1 and the score's gradient.
        noise_std: standard deviation of the score noise in training, in units of each row's own spread; 0: none.

    forward: [B, C, H, W] -> what the replaced module returns, dtype and memory format as the experts leave them.
    With the grouped engine nothing waits for the gate. Elsewhere (see ``modules.experts``) the experts run by
    segments, whose sizes are read on the host once a forward.

    Raises:
        ValueError: an argument out of range; a forward on input of the wrong shape; non-finite gate scores (on a GPU
        when
            ``check_finite`` reads the flag).
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: Experts,
        top_k: int = 2,
        renormalize: bool = True,
        straight_through: bool = True,
        noise_std: float = 0.0,
    ) -> None:
        super().__init__()
        num_experts = experts.num_experts
        expect(type(top_k) is int, "top_k", "an integer", repr(top_k))
        expect(1 <= top_k <= num_experts, "top_k", f"1 <= k <= num_experts = {num_experts}", top_k)
        expect(noise_std >= 0, "noise_std", "a number >= 0", noise_std)
        if top_k == 1 < num_experts and renormalize and not straight_through:
            warnings.warn(
                "top_k=1 with renormalize=True and straight_through=False: the only weight is the constant 1, so the"
                " gate gets no gradient from the task; use straight_through=True or renormalize=False",
                stacklevel=2,
            )
        self.gate = gate
        self.experts = experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.straight_through = straight_through
        self.noise_std = noise_std
        self.routing: RoutingRecord | None = None
        self.reroute: Reroute | None = None
        self._fixed_expert: int | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.experts.num_experts

    @property
    def fixed_expert(self) -> int | None:
        """The expert that takes every sample with weight 1, gate unused; ``None``: the gate decides."""
        return self._fixed_expert

    @fixed_expert.setter
    def fixed_expert(self, expert: int | None) -> None:
        if expert is not None:
            self._expect_expert(expert, "fixed_expert")
        self._fixed_expert = expert

    def expert(self, index: int) -> nn.Module:
        """Expert ``index`` as an ordinary module of the replaced type, with its own copy of the parameters."""
        self._expect_expert(index, "index")
        return self.experts.extract(index)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.experts.in_channels
        ok = x.dim() == 4 and x.shape[1] == channels and min(x.shape[2:]) >= 1
        expect(ok, "x", f"shape [B, {channels}, H, W] with H, W >= 1", list(x.shape))
        self._expect_kind(x)
        if self._fixed_expert is not None:
            self.routing = RoutingRecord.fixed(x, self._fixed_expert, self.num_experts)
            return self.experts.one(self._fixed_expert, x)
        # Read from the local name: another thread's forward may replace self.routing meanwhile.
        record, route = self._decide(x)
        self.routing = record
        return self.experts.mix(x, route, record.weights)

    def _decide(self, x: Tensor) -> tuple[RoutingRecord, Route]:
        clean = self.gate(x)
        expect(
            clean.shape == (x.shape[0], self.num_experts),
            "gate(x)",
            f"logits of shape [{x.shape[0]}, {self.num_experts}]",
            list(clean.shape),
        )
        noise_scale = None
        logits = clean
        if self.training and self.noise_std > 0:
            noise_scale = score_noise_scale(clean, self.noise_std)
            logits = clean + noise_scale * torch.randn_like(clean)
        out, route = top_k_route(logits, self.top_k, self.renormalize, self.straight_through)
        record = RoutingRecord(logits=logits, clean_logits=clean, noise_scale=noise_scale, **out._asdict())
        if self.reroute is None:
            return record, route
        indices, weights = self.reroute(self, record)
        return replace(record, indices=indices, weights=weights), sort_by_expert(indices, self.num_experts)

    def _expect_kind(self, x: Tensor) -> None:
        weight = next(self.experts.parameters())
        expect(x.device == weight.device, "x", f"a tensor on {weight.device} (the device of the experts)", x.device)
        if not torch.is_autocast_enabled(x.device.type):
            expect_dtype(x, "x", (weight.dtype,))

    def _expect_expert(self, index: int, argument: str) -> None:
        ok = type(index) is int and 0 <= index < self.num_experts
        expect(ok, argument, f"an expert in 0..{self.num_experts - 1}", index)

    def __getstate__(self) -> dict[str, Any]:
        # The last forward's record hangs on its graph, imposed routes belong to a batch: neither copied nor pickled.
        return {**self.__dict__, "routing": None, "reroute": None}

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, renormalize={self.renormalize},"
            f" straight_through={self.straight_through}, noise_std={self.noise_std}"
        )

    @classmethod
    def _build(cls, experts: Experts, gate: Gate, like: Tensor, init: str, **options: Any) -> Self:
        expect(init in INITS, "init", f"one of {', '.join(INITS)}", repr(init))
        built = build_gate(gate, experts.in_channels, experts.num_experts)
        if init == "fresh":
            experts.reset()
        layer = cls(built, experts, **options).to(like.device, like.dtype)
        layer.experts.requires_grad_(like.requires_grad)
        return layer


def _expect_count(num_experts: int) -> None:
    expect(type(num_experts) is int and num_experts >= 1, "num_experts", "an integer E >= 1", repr(num_experts))


class FusedBlockMoE(MoELayer):
    """A residual block as a mixture of experts, each with its own weights, batch norm and skip (2509.05086,
    "BlockMoE")."""

    @classmethod
    def from_block(
        cls,
        block: nn.Module,
        num_experts: int = 4,
        top_k: int = 2,
        gate: Gate = "gap_fc",
        renormalize: bool = True,
        straight_through: bool = True,
        noise_std: float = 0.0,
        init: str = "copy",
    ) -> Self:
        """Replace a torchvision or timm BasicBlock or Bottleneck.

        With ``init="copy"`` every expert starts as the block, and with ``renormalize`` the layer computes what the
        block did: a trained network keeps its function. ``init="fresh"`` draws each expert's convolutions anew, to
        train from scratch.

        Args:
            block: the block; not changed. Its device, dtype and mode are taken over, and whether it is trained
                (its first convolution's ``requires_grad``); the gate is always trained.
            num_experts: E >= 1.
            top_k, renormalize, straight_through, noise_std: see :class:`MoELayer`.
            gate: a name in ``GATES`` ("gap_fc", "conv_gap"), a module, [B, C, H, W] -> logits [B, E], or a function
                that makes one from (C, E).
            init: "copy" or "fresh".

        Raises:
            ValueError: an argument out of range, or a block of another kind (see :class:`ResidualExperts`).
        """
        _expect_count(num_experts)
        layer = cls._build(
            ResidualExperts(block, num_experts),
            gate,
            block.conv1.weight,
            init,
            top_k=top_k,
            renormalize=renormalize,
            straight_through=straight_through,
            noise_std=noise_std,
        )
        return layer.train(block.training)


class FusedConvMoE(MoELayer):
    """A convolution as a mixture of experts; the normalisation after it stays shared (2509.05086, "ConvMoE")."""

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        num_experts: int = 4,
        top_k: int = 2,
        gate: Gate = "gap_fc",
        renormalize: bool = True,
        straight_through: bool = True,
        noise_std: float = 0.0,
        init: str = "copy",
    ) -> Self:
        """Replace a Conv2d; arguments and errors as :meth:`FusedBlockMoE.from_block`."""
        _expect_count(num_experts)
        layer = cls._build(
            StackedConv2d(conv, num_experts),
            gate,
            conv.weight,
            init,
            top_k=top_k,
            renormalize=renormalize,
            straight_through=straight_through,
            noise_std=noise_std,
        )
        return layer.train(conv.training)
