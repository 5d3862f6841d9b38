"""The mixture-of-experts layer of transformers: MLPs as experts, each token to experts of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect, expect_dtype, expect_same_device, expect_shape, expect_tensor
from robust_moe_kernels.modules.gates import Gate
from robust_moe_kernels.modules.mlp_experts import MLPExperts
from robust_moe_kernels.modules.routed_layer import MoELayer, expect_count
from robust_moe_kernels.modules.token_gates import TOKEN_GATES, NoisyTopKGate
from robust_moe_kernels.modules.walk import modules_of
from robust_moe_kernels.ops.routing import Route

__all__ = ["FusedMLPMoE"]


class FusedMLPMoE(MoELayer):
    """A transformer's MLP as a mixture of experts: MoE(x) = sum_i g_i(x) e_i(x) for each token x (V-MoE, Riquelme et
    al., 2106.05974, section 2.1).

    Beside the options of :class:`MoELayer` there are those that limit an expert's buffer to
    B = round(capacity * k * N / E) of N tokens (at least 1): ``capacity`` (None: no limit) with ``priority``, who is
    served first where more choose an expert ("batch": the tokens with the largest scores, "vanilla": the first of the
    batch); and ``choice="expert"``, by which each expert takes its B best tokens (Zhou et al., 2202.09368). The MLP of
    a pair that is dropped is not computed: the token passes by the skip around the MLP. ``routing.dropped`` says which
    pairs that were. Layers that :func:`~robust_moe_kernels.modules.link_layers` has linked hand their outputs
    (``momentum``) or first choices from one to the next.

    forward: x [..., C] -> [..., O], dtype as the experts leave it. ``padding_mask``, bool [...], is true at tokens that
    are not routed: their output is 0, they take no place in a buffer, no statistic counts them and their numbers are
    not read (as ``key_padding_mask`` of :class:`torch.nn.MultiheadAttention`).

    Raises:
        ValueError: as :class:`MoELayer`; a mask of another shape than x without its last dimension.
    """

    gates: ClassVar[Mapping[str, type[nn.Module]]] = TOKEN_GATES
    limited: ClassVar[bool] = True
    linkable: ClassVar[bool] = True

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        num_experts: int = 8,
        top_k: int = 2,
        gate: Gate = "linear",
        renormalize: bool | None = None,
        straight_through: bool | None = None,
        noise_std: float | None = None,
        init: str = "copy",
        impl: str = "auto",
        capacity: float | None = None,
        priority: str = "batch",
        choice: str = "token",
    ) -> Self:
        """Replace an MLP of a transformer.

        With ``init="copy"`` every expert starts as the MLP, and with ``renormalize`` the layer computes what the MLP
        did: a trained network keeps its function ("upcycling"). ``init="fresh"`` draws each expert's layers anew (see
        :meth:`MLPExperts.draw`).

        Args:
            mlp: the MLP, see :class:`MLPExperts`; not changed. Its device, dtype and mode are taken over, and whether
                it is trained, but not by the gate.
            num_experts: E >= 1.
            top_k, impl: see :class:`MoELayer`.
            gate: a name in ``TOKEN_GATES`` ("linear", "noisy_top_k", and for layers that are linked then,
                "adaptive_clustering"), a module, [N, C] -> logits [N, E], or a function that makes one from (C, E).
            renormalize, straight_through: see :class:`MoELayer`; None: true, but false with "noisy_top_k", whose paper
                keeps the scores as they are.
            noise_std: None: 0, but 1, the paper's N(0, 1/E^2), with "noisy_top_k"; see :class:`RouteOptions`.
            init: "copy" or "fresh".
            capacity, priority, choice: see above.

        Raises:
            ValueError: an argument out of range, or an MLP of another form, which is named.
        """
        expect_count(num_experts)
        experts = MLPExperts.of(mlp, num_experts)
        like: nn.Linear = modules_of(mlp)[experts.form.first[0]]  # type: ignore[assignment]
        noisy = gate == "noisy_top_k" or isinstance(gate, NoisyTopKGate)
        layer = cls._build(
            experts,
            gate,
            like.weight,
            mlp.training,
            init,
            top_k=top_k,
            renormalize=not noisy if renormalize is None else renormalize,
            straight_through=not noisy if straight_through is None else straight_through,
            noise_std=float(noisy) if noise_std is None else noise_std,
            impl=impl,
        )
        layer.route_options = replace(
            layer.route_options,
            noise="vmoe" if noisy else "logits",
            capacity=capacity,
            priority=priority,
            choice=choice,
        )
        return layer

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return self._forward(x, padding_mask)

    def _mix(self, rows: Tensor, route: Route, weights: Tensor, computed: int | None) -> Tensor:
        if isinstance(self.experts, MLPExperts):
            return self.experts.mix(rows, route, weights, computed)
        return super()._mix(rows, route, weights, computed)

    def _rows(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
        channels = self.experts.in_channels
        expect(x.dim() >= 1 and x.shape[-1] == channels, "x", f"shape [..., {channels}]", list(x.shape))
        shape = tuple(x.shape[:-1])
        rows = x.reshape(-1, channels)
        if padding_mask is None:
            return rows, shape, None
        expect_tensor(padding_mask, "padding_mask")
        expect_dtype(padding_mask, "padding_mask", (torch.bool,))
        expect_shape(padding_mask, "padding_mask", shape, "that of x without its channels")
        expect_same_device(padding_mask, "padding_mask", x, "x")
        padding = padding_mask.reshape(-1)
        return rows.masked_fill(padding[:, None], 0.0), shape, padding
