"""The mixture-of-experts layer: gate, sort, dispatch, experts, combine. What a row is, the kinds of layers say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from robust_moe_kernels.checks import expect, expect_dtype
from robust_moe_kernels.modules.assignment import route_of, sorted_indices
from robust_moe_kernels.modules.chain import Place
from robust_moe_kernels.modules.deciding import Decision, decide
from robust_moe_kernels.modules.expert_module import ExpertModule
from robust_moe_kernels.modules.experts import Experts
from robust_moe_kernels.modules.gates import GATES, Gate, build_gate
from robust_moe_kernels.modules.general_path import general_path, mix_plainly, wanted
from robust_moe_kernels.modules.interception import has_ended
from robust_moe_kernels.modules.momentum import Momentum
from robust_moe_kernels.modules.ranks import rank_count
from robust_moe_kernels.modules.route_options import Option, Reroute, RouteOptions, expect_expert
from robust_moe_kernels.modules.routing_record import RoutingRecord
from robust_moe_kernels.modules.token_gates import AdaptiveClusteringGate
from robust_moe_kernels.modules.walk import modules_of
from robust_moe_kernels.ops.routing import Route

__all__ = ["MoELayer", "expect_count"]

INITS = ("copy", "fresh")

_IMPOSED = ("fixed_expert", "reroute")  # options that are set for a while, and not printed
# Printed if they differ from these.
_PRINTED_IF_SET = {
    "inference": None,
    "impl": "auto",
    "capacity": None,
    "priority": "batch",
    "choice": "token",
    "momentum": None,
}


class MoELayer(nn.Module):
    """F(x) = sum_i g_i(x) e_i(x) over the k experts the gate chooses for each row (2509.05086 section 3).

    A row is a sample's whole map here, and a token in :class:`~robust_moe_kernels.modules.FusedMLPMoE`. State dict:
    ``gate.*`` as the gate names it and ``experts.{e}.*``, the replaced module's own names for each expert; nothing
    else.

    Whole networks are experts too: with a gate on the images and experts whose ``mix`` returns logits, the layer is the
    model.

    ``route_options`` (:class:`RouteOptions`) holds what the layer does with its gate's logits; each option is an
    attribute of the layer too. Beside the arguments these are ``noise``, what kind of score noise there is ("logits";
    "vmoe", whose standard deviation is ``noise_std``/E for every row; or "released":
    :func:`~robust_moe_kernels.modules.gates.noisy_choice`, which leaves scores, weights and statistics without noise),
    ``inference``, the routing rule in eval mode (None: that of training), ``fixed_expert``, the expert that takes every
    row with weight 1, gate unused, and ``reroute``, which replaces what the gate, or the rule, decides
    (:func:`~robust_moe_kernels.modules.route_control.rerouted` sets it).

    Args:
        gate: module, [B, C, H, W] -> logits [B, E].
        experts: E experts, or any :class:`~robust_moe_kernels.modules.expert_module.ExpertModule`.
        top_k: k, 1 <= k <= E.
        renormalize: divide the k kept scores by their sum.
        straight_through: for k = 1, forward weight exactly 1 and the score's gradient.
        noise_std: standard deviation of the score noise in training, in units of each row's own spread (of the whole
            batch's with ``noise="released"``); 0: none.
        impl: "auto", or "reference": the layer in plain PyTorch, see
            :func:`~robust_moe_kernels.modules.general_path`.

    forward: [B, C, H, W] -> what the replaced module returns, dtype and memory format as the experts leave them.
    With the grouped engine nothing waits for the gate. Elsewhere (see ``modules.experts``) the experts run by
    segments, whose sizes are read on the host once a forward.

    Raises:
        ValueError: an argument or option out of range; a forward on input of the wrong shape; non-finite gate scores
            (on a GPU when ``check_finite`` reads the flag).
    """

    top_k = Option[int]()
    renormalize = Option[bool]()
    straight_through = Option[bool]()
    noise_std = Option[float]()
    noise = Option[str]()
    capacity = Option[float | None]()
    priority = Option[str]()
    choice = Option[str]()
    fixed_expert = Option[int | None]()
    reroute = Option[Reroute | None]()
    inference = Option[Reroute | None]()
    momentum = Option[Momentum | None]()
    impl = Option[str]()

    gates: ClassVar[Mapping[str, type[nn.Module]]] = GATES  # that a name stands for
    limited: ClassVar[bool] = False  # whether ``capacity`` and ``choice`` can limit an expert's rows
    linkable: ClassVar[bool] = False  # whether a skip stands around it alone, so that momentum means something
    output_place: Place | None = None  # in the chain of outputs that momentum goes along (``link_layers``)
    over_ranks = False  # whether a batch in training is that of all ranks (``batch_over_ranks``)
    choice_place: Place | None = None  # in the chain of first choices, for gates that ask for them

    def __init__(
        self,
        gate: nn.Module,
        experts: ExpertModule,
        top_k: int = 2,
        renormalize: bool = True,
        straight_through: bool = True,
        noise_std: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        options = RouteOptions(top_k, renormalize, straight_through, noise_std, impl=impl)
        options.expect_fits(experts.num_experts)
        trained = any(parameter.requires_grad for parameter in gate.parameters())
        if trained and top_k == 1 < experts.num_experts and renormalize and not straight_through:
            warnings.warn(
                "top_k=1 with renormalize=True and straight_through=False: the only weight is the constant 1, so the"
                " gate gets no gradient from the task; use straight_through=True or renormalize=False",
                stacklevel=2,
            )
        self.gate = gate
        self.experts = experts
        self._routing: RoutingRecord | None = None
        self._route_options = options

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), Option):  # a reroute may be a module, but is no part of this one
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.experts.num_experts

    @property
    def routing(self) -> RoutingRecord | None:
        """The last forward's record; None before a forward and once a ``torch.vmap`` over it has returned, whose
        tensors end with it (inside of the mapped function the record can be read)."""
        record = self._routing
        return None if record is None or has_ended(record.scores) else record

    @routing.setter
    def routing(self, record: RoutingRecord | None) -> None:
        self._routing = record

    def last_routing(self) -> RoutingRecord:
        """``routing`` after a forward. Raises RuntimeError where there was none."""
        if (record := self.routing) is None:
            raise RuntimeError("layer: expected a forward first, got none")
        return record

    @property
    def route_options(self) -> RouteOptions:
        """What the layer does with its gate's logits. To change an option, assign to the layer's attribute of its
        name, or another object here."""
        return self._route_options

    @route_options.setter
    def route_options(self, options: RouteOptions) -> None:
        options.expect_fits(self.num_experts)
        if options.limits and not self.limited:
            kind, got = type(self).__name__, f"capacity={options.capacity}, choice={options.choice!r}"
            expect(False, "capacity", f"None, with choice 'token', for {kind}: a dropped map would have no output", got)
        linked = options.momentum is None or self.output_place is not None
        expect(linked, "momentum", "None for a layer that is not linked (see link_layers)", options.momentum)
        self._route_options = options

    @property
    def batch_independent(self) -> bool:
        """Whether a row's output depends on that row alone: no buffer is limited, and in the present modes neither
        score noise nor dropout is drawn for the batch nor a norm or gate takes its statistics from it. By the native
        engine of the CPU the output is then the same bit for bit whatever the batch. What a linked layer before has
        left for the row (``link_layers``) counts as part of it, as x does: that layer answers for its own. False in
        training for experts of other kinds than the engine's, whose parts may draw anything."""
        options = self._route_options
        drawn = self.training and options.noise_std > 0
        return not (options.limits or drawn or any(map(_mixes_rows, modules_of(self))))

    def expert(self, index: int) -> nn.Module:
        """Expert ``index`` as an ordinary module of the replaced type, with its own copy of the parameters."""
        expect_expert(index, self.num_experts, "index")
        return self.experts.extract(index)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # to a symbolic trace the layer is one operation
            given = (x,) if padding_mask is None else (x, padding_mask)
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), given, {})
        rows, shape, padding = self._rows(x, padding_mask)
        self._expect_kind(rows)
        options = self._route_options
        place = None if options.momentum is None else self.output_place
        before = None if place is None else place.take(shape, trained=x.requires_grad)
        fixed = options.fixed_expert
        # Read from the local name: another thread's forward may replace the record meanwhile.
        if fixed is not None:
            self._routing = record = RoutingRecord.fixed(rows, fixed, self.num_experts, shape)
            self._follow(shape)
            self._hand_on(record)
            out = self.experts.one(fixed, rows)
            if padding is not None:
                routed = record.with_padding(padding).dropping(padding[:, None])
                self._routing = replace(routed, mean_square_lse=record.mean_square_lse)  # of no logits
                out = out.masked_fill(padding[:, None], 0.0)
        elif wanted(options.impl):
            with general_path():
                self._routing = record = self._decide(rows, shape, padding, plainly=True).record
                out = mix_plainly(self.experts, rows, sorted_indices(record), record.weights)
        else:
            record, route, computed = self._decide(rows, shape, padding)
            self._routing = record  # not by the property, whose setter torch.compile would have to trace
            out = self._mix(rows, route_of(record) if route is None else route, record.weights, computed)
        if options.momentum is not None and place is not None:
            if before is not None:
                width = f"outputs of {list(before.shape[1:])} channels, as in the linked layer before"
                expect(before.shape == out.shape, "momentum", width, list(out.shape[1:]))
            out = options.momentum.step(out, before)
            if padding is not None:  # the layer before may have computed what is padding here
                out = out.masked_fill(padding[:, None], 0.0)
            place.leave(out, shape)
        return out if len(shape) == 1 else out.reshape(*shape, *out.shape[1:])

    def decide(self, x: Tensor) -> tuple[RoutingRecord, Route]:
        """What the layer's gate and options, the fixed expert apart, make of ``x``, as a forward takes it, without
        running an expert: the record that a forward would leave in ``routing``, and where it would send each row.
        Layers with linked gates decide in their order."""
        record, route, _ = self._decide(*self._rows(x, None))
        return record, route_of(record) if route is None else route

    def _rows(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
        """What is routed, each row [N, ...] by itself; how rows belong to samples (``RoutingRecord.shape``); and which
        of them [N] are padding. Raises for another input than the layer takes."""
        channels = self.experts.in_channels
        ok = x.dim() == 4 and x.shape[1] == channels and min(x.shape[2:]) >= 1
        expect(ok, "x", f"shape [B, {channels}, H, W] with H, W >= 1", list(x.shape))
        return x, (x.shape[0],), None

    def _mix(self, rows: Tensor, route: Route, weights: Tensor, computed: int | None) -> Tensor:
        """Rows through their experts; ``computed``: see :class:`Decision`."""
        return self.experts.mix(rows, route, weights)

    def _decide(self, rows: Tensor, shape: tuple[int, ...], padding: Tensor | None, plainly: bool = False) -> Decision:
        options, training = self._route_options, self.training
        gate: Callable[[Tensor], Tensor] = self.gate
        clusters = self._follow(shape)
        if isinstance(gate, AdaptiveClusteringGate):
            linked = self.choice_place is not None
            expect(linked, "gate", "a layer that is linked (see link_layers) for AdaptiveClusteringGate", "one alone")
            gate = partial(gate, clusters=clusters, padding=padding)
        over_ranks = self.over_ranks and training and rank_count() > 1
        decision = decide(
            *(gate, rows, self.num_experts, options, training),
            shape=shape,
            padding=padding,
            plainly=plainly,
            over_ranks=over_ranks,
        )
        self._hand_on(decision.record)
        return decision

    def _follow(self, shape: tuple[int, ...]) -> Tensor | None:
        """First choices [N] of the linked layer before; None where there is none."""
        return None if self.choice_place is None else self.choice_place.take(shape)

    def _hand_on(self, record: RoutingRecord) -> None:
        """First choices to the linked layer behind."""
        if self.choice_place is not None:
            self.choice_place.leave(record.indices[:, 0], record.shape)

    def _expect_kind(self, x: Tensor) -> None:
        weight = next(self.experts.parameters(), None)
        if weight is None:  # quantised experts keep their numbers elsewhere
            return
        expect(x.device == weight.device, "x", f"a tensor on {weight.device} (the device of the experts)", x.device)
        if not torch.is_autocast_enabled(x.device.type):
            expect_dtype(x, "x", (weight.dtype,))

    def __getstate__(self) -> dict[str, Any]:
        # The last forward's record hangs on its graph, imposed routes belong to a batch: neither copied nor pickled.
        return {**self.__dict__, "_routing": None, "_route_options": replace(self._route_options, reroute=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Layers that earlier versions pickled have their record under another name.
        super().__setstate__({"_routing": None, **{key: value for key, value in state.items() if key != "routing"}})

    def extra_repr(self) -> str:
        options = self._route_options
        names = [field.name for field in fields(options) if field.name not in _IMPOSED]
        names = [n for n in names if n not in _PRINTED_IF_SET or getattr(options, n) != _PRINTED_IF_SET[n]]
        return ", ".join([f"num_experts={self.num_experts}", *(f"{name}={getattr(options, name)}" for name in names)])

    @classmethod
    def _build(cls, experts: Experts, gate: Gate, like: Tensor, training: bool, init: str, **options: Any) -> Self:
        expect(init in INITS, "init", f"one of {', '.join(INITS)}", repr(init))
        with like.device:  # whatever the default is
            built = build_gate(gate, experts.in_channels, experts.num_experts, cls.gates)
        if init == "fresh":
            experts.reset()
        layer = cls(built.to(like.device, like.dtype), experts, **options)
        built.train(training)
        layer.training = experts.training = training  # each expert's parts keep the modes that they had
        return layer


def _mixes_rows(module: nn.Module) -> bool:
    """Whether a module's output for a row depends on the others, or on its place among them."""
    if isinstance(module, Experts) and module.training and not module.known:
        return True
    if isinstance(module, AdaptiveClusteringGate):
        return module.training and module.clusters is not None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def expect_count(num_experts: int) -> None:
    """Raise :class:`ValueError` unless this is a number of experts."""
    expect(type(num_experts) is int and num_experts >= 1, "num_experts", "an integer E >= 1", repr(num_experts))
