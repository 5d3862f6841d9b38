"""A network as a graph of affine maps, ReLUs, sums and routed layers, which is what bounds are propagated through."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from robust_moe.analysis.layers import CHAINS, LAYERS, Linear, expect_plain
from robust_moe.analysis.routed import Mix, Weights
from robust_moe_kernels.checks import expect
from robust_moe_kernels.modules import FusedBlockMoE, FusedConvMoE, MoELayer, attack_mode

__all__ = ["Add", "Affine", "Graph", "Input", "Node", "Relu", "lower"]


@dataclass(frozen=True)
class Input:
    """The image."""


@dataclass(frozen=True)
class Affine:
    """A x + b of an earlier node; float64."""

    source: int
    linear: Linear
    bias: Tensor | None  # broadcast to the output
    bias_size: Tensor | None  # what the bias was computed from, in magnitude: its rounding is relative to this
    exact: bool  # moves numbers and computes none

    def transposed(self, y: Tensor, shape: torch.Size, absolute: bool = False) -> Tensor:
        """Aᵀ y (or |A|ᵀ y) for y [B, S, *out] -> [B, S, *shape], the source's shape."""
        with torch.inference_mode(False), torch.enable_grad():
            rows = y.shape[0] * y.shape[1]
            x = torch.zeros(rows, *shape, dtype=y.dtype, device=y.device, requires_grad=True)
            (back,) = torch.autograd.grad(self.linear(x, absolute), x, y.reshape(rows, *y.shape[2:]).clone())
        return back.reshape(*y.shape[:2], *shape)


@dataclass(frozen=True)
class Relu:
    """max(x, 0) of an earlier node."""

    source: int


@dataclass(frozen=True)
class Add:
    """The sum of two earlier nodes of one shape."""

    first: int
    second: int


Node = Input | Affine | Relu | Add | Weights | Mix


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of computation; the first is the input, the last the output [B, outputs]."""

    nodes: tuple[Node, ...]
    shapes: tuple[torch.Size, ...]  # of each node, without the batch
    experts: dict[int, tuple[int, int]] = field(default_factory=dict)  # node inside an expert -> (its Weights, which)

    @property
    def routed(self) -> bool:
        """Whether a gate decides anything in it."""
        return any(isinstance(node, Mix) for node in self.nodes)

    @property
    def outputs(self) -> int:
        """Columns of the output."""
        return self.shapes[-1][0]

    def size(self, node: int) -> int:
        """Numbers in a node, a sample."""
        return self.shapes[node].numel()


def lower(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """The graph of ``model`` in *evaluation* mode, for inputs [B, *shape]; parameters as they are now, in float64.

    Layers: those in :data:`~robust_moe.analysis.layers.LAYERS`; between them ``+``, ``relu``, ``flatten(1)``, means
    over height and width, in place or not; and ``FusedBlockMoE`` and ``FusedConvMoE`` whose gates and experts are made
    of these. So Sequentials of them, the residual networks and routers of :mod:`robust_moe.models`, and what else
    ``torch.fx`` can trace into these. Mixtures of networks are not networks: :mod:`robust_moe.analysis.certify` puts
    their parts together. The model is left as found.

    Raises:
        ValueError: another layer, operation or argument, named; modules with hooks; an operation in place on the
            input, or on a value that is used again (also through a view of it); an output that is not [B, outputs].
    """
    for name, module in model.named_modules():
        expect_plain(module, _where(name))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    builder = _Builder(device)
    with attack_mode(model):
        last = builder.read(builder.module(model, builder.append(Input(), torch.Size(shape)), ""))
    ok = len(builder.shapes[last]) == 1
    expect(ok, "model", "an output of shape [B, outputs]", f"[B, {', '.join(map(str, builder.shapes[last]))}]")
    return Graph(tuple(builder.nodes[: last + 1]), tuple(builder.shapes[: last + 1]), builder.experts)


def _where(name: str) -> str:
    return f"model.{name}" if name else "model"


class _Builder:
    """The nodes so far, appended in the order in which the model computes.

    Where an operation writes in place, every earlier node in the same memory is stale from then on: the model would
    read the new value there, so that the node is not to be read again.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nodes: list[Node] = []
        self.shapes: list[torch.Size] = []
        self.memory: list[int] = []  # of each node: the first node that is, or may be, in the same memory
        self.stale: set[int] = set()
        self.experts: dict[int, tuple[int, int]] = {}

    def append(self, node: Node, out: torch.Size, view_of: int | None = None) -> int:
        """``view_of``: a node whose memory this one shares."""
        self.nodes.append(node)
        self.shapes.append(out)
        self.memory.append(len(self.memory) if view_of is None else self.memory[view_of])
        return len(self.nodes) - 1

    def write(self, node: Relu | Add, over: int) -> int:
        """A node that is computed in place of ``over``, of whose shape it is."""
        expect(self.memory[over] != 0, "model", "no operation in place on its input", type(node).__name__)
        self.stale.update(i for i, memory in enumerate(self.memory) if memory == self.memory[over])
        return self.append(node, self.shapes[over], view_of=over)

    def read(self, source: int) -> int:
        fresh = source not in self.stale
        expect(fresh, "model", "no value that is used after it, or a view of it, was written in place", "one")
        return source

    def affine(
        self,
        source: int,
        linear: Linear,
        bias: Tensor | None = None,
        bias_size: Tensor | None = None,
        exact: bool = False,
    ) -> int:
        self.read(source)
        with torch.no_grad():
            zero = torch.zeros(2, *self.shapes[source], dtype=torch.float64, device=self.device)
            out = linear(zero, False).shape
        expect(len(out) >= 2 and out[0] == 2, "model", "layers that keep the batch", f"[{', '.join(map(str, out))}]")
        size = bias.abs() if bias is not None and bias_size is None else bias_size
        return self.append(Affine(source, linear, bias, size, exact), out[1:], view_of=source if exact else None)

    def relu(self, source: int, inplace: bool = False) -> int:
        node = Relu(self.read(source))
        return self.write(node, source) if inplace else self.append(node, self.shapes[source])

    def module(self, module: nn.Module | None, source: int, name: str) -> int:
        """``module`` applied to a node: one layer, a chain of modules, or what its forward does with modules."""
        where, known = (
            _where(name),
            f"a layer among {', '.join(kind.__name__ for kind in (*LAYERS, FusedBlockMoE, FusedConvMoE))}",
        )
        expect(module is not None, where, known, "NoneType")
        assert module is not None
        if type(module) in LAYERS:
            try:
                made = LAYERS[type(module)](module, self.shapes[source])
                if made is None:
                    return source
                return self.relu(source, made == "relu_") if isinstance(made, str) else self.affine(source, *made)
            except RuntimeError as error:  # what PyTorch raises at shapes that do not fit
                shape = ", ".join(map(str, self.shapes[source]))
                message = f"{where}: expected an input that {type(module).__name__} takes, got [B, {shape}]: {error}"
                raise ValueError(message) from error
        if type(module) in CHAINS:
            for part in CHAINS[type(module)](module):
                source = self.module(module._modules[part], source, f"{name}.{part}" if name else part)
            return source
        if isinstance(module, MoELayer) and type(module) in (FusedBlockMoE, FusedConvMoE):
            return self.mixture(module, source, where, name)
        opaque = isinstance(module, MoELayer) or next(module.children(), None) is None
        expect(not opaque, where, known, type(module).__name__)
        try:
            traced = _Tracer().trace(module)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
            message = f"{where}: expected a forward that torch.fx can trace, got {type(module).__name__}: {error}"
            raise ValueError(message) from error
        place: dict[fx.Node, int] = {}
        for node in traced.nodes:
            if node.op == "placeholder":
                expect(not place, "model", "a forward of one argument", f"a second one, {node.name!r}")
                place[node] = source
            elif node.op == "call_module":
                ok = len(node.args) == 1 and node.args[0] in place and not node.kwargs
                expect(ok, where, "modules called with one map", node.format_node())
                inner = f"{name}.{node.target}" if name else node.target
                place[node] = self.module(module.get_submodule(node.target), place[node.args[0]], inner)
            elif node.op == "output":
                ok = isinstance(node.args[0], fx.Node) and node.args[0] in place
                expect(ok, where, "one map as output", repr(node.args[0]))
                return place[node.args[0]]
            else:
                place[node] = self.call(node, place)
        raise AssertionError("a traced forward ends in an output")

    def mixture(self, layer: MoELayer, source: int, where: str, name: str) -> int:
        """A routed layer: the gate's logits, the weights they give, every expert, and their sum."""
        free = layer.fixed_expert is None and layer.reroute is None and layer.inference is None
        got = "one with a fixed expert, an imposed route or a routing rule"
        expect(free, where, "a routed layer whose gate decides", got)
        logits = self.module(layer.gate, source, f"{name}.gate")
        count, shape = layer.num_experts, self.shapes[logits]
        expect(
            shape == (count,),
            f"{where}.gate",
            f"logits [B, {count}], one an expert",
            f"[B, {', '.join(map(str, shape))}]",
        )
        one_is_all = layer.top_k == 1 and layer.straight_through
        renormalize = layer.renormalize or one_is_all
        weights = self.append(Weights(self.read(logits), layer.top_k, renormalize), torch.Size((count,)))
        outputs = []
        for number in range(count):
            first, expert, inner = len(self.nodes), layer.expert(number), f"{name}.expert({number})"
            for part in expert.modules():
                expect_plain(part, _where(inner))
            outputs.append(self.module(expert, source, inner))
            self.experts |= dict.fromkeys(range(first, len(self.nodes)), (weights, number))
        mix = Mix(weights, tuple(map(self.read, outputs)), renormalize or layer.top_k == count)
        return self.append(mix, self.shapes[outputs[0]])

    def call(self, node: fx.Node, place: dict[fx.Node, int]) -> int:
        """A call that is no module's. Every argument is looked at: one that is not understood is refused."""
        kind = _CALLS.get(node.target) if node.op in ("call_function", "call_method") else None
        wanted = "layers, sums, relu, flatten(x, 1) and means over dimensions (2, 3)"
        inputs = [place[arg] for arg in node.args[:2] if isinstance(arg, fx.Node) and arg in place]
        expect(kind is not None and bool(inputs), "model", wanted, node.format_node())
        if kind in ("add", "add_"):
            ok = len(inputs) == len(node.args) == 2 and not node.kwargs
            ok = ok and self.shapes[inputs[0]] == self.shapes[inputs[1]]
            expect(ok, "model", wanted, node.format_node())
            made = Add(self.read(inputs[0]), self.read(inputs[1]))
            return self.write(made, inputs[0]) if kind == "add_" else self.append(made, self.shapes[inputs[0]])
        source, dims = inputs[0], len(self.shapes[inputs[0]]) + 1
        names = ("inplace",) if node.target is F.relu else _ARGUMENTS.get(kind or "", ())
        given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False))
        ok = len(node.args) <= 1 + len(names) and not set(node.kwargs) - (set(names) - set(given))
        given |= node.kwargs
        ok = ok and not any(isinstance(value, fx.Node) for value in given.values())
        if kind == "flatten":
            ok = ok and given.get("start_dim") == 1 and given.get("end_dim", -1) in (-1, dims - 1)
        elif kind == "mean":
            over: Any = given.get("dim")
            ok = ok and dims == 4 and isinstance(over, tuple | list) and all(type(d) is int for d in over)
            ok = ok and sorted(d % 4 for d in over) == [2, 3]
        expect(ok, "model", wanted, node.format_node())
        if kind == "flatten":
            return self.affine(source, lambda x, absolute: x.flatten(1), exact=True)
        if kind == "mean":
            keep = bool(given.get("keepdim", False))
            return self.affine(source, lambda x, absolute: x.mean((2, 3), keepdim=keep))
        return self.relu(source, kind == "relu_" or bool(given.get("inplace", False)))


# By what is called, not by its name: another function may be called relu.
_CALLS = {
    **dict.fromkeys([operator.add, torch.add, "add"], "add"),
    **dict.fromkeys([operator.iadd, "add_"], "add_"),
    **dict.fromkeys([torch.relu, F.relu, "relu"], "relu"),
    **dict.fromkeys([torch.relu_, F.relu_, "relu_"], "relu_"),
    **dict.fromkeys([torch.flatten, "flatten"], "flatten"),
    **dict.fromkeys([torch.mean, "mean"], "mean"),
}


_ARGUMENTS: dict[str, tuple[str, ...]] = {"flatten": ("start_dim", "end_dim"), "mean": ("dim", "keepdim")}


class _Value(fx.Proxy):
    """A traced value that knows ``+=``, which torch.fx would record as a sum that leaves its operands alone."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Stops at what :meth:`_Builder.module` takes by itself."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = type(module) in LAYERS or type(module) in CHAINS or isinstance(module, MoELayer)
        return known or super().is_leaf_module(module, name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)
