"""Routed MLP: every row through its expert's two linear layers, and each token's rows summed with its weights.

Two raw operations, ``expert_mlp_forward`` and ``expert_mlp_backward``, and ``expert_mlp``, the differentiable function
made of them. Rows are gathered from the tokens inside the products; the sums over a token's experts are part of the
operation. No operation waits for the device, except the reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from robust_moe_kernels.checks import FLOATS, expect, expect_dtype, expect_same_device, expect_shape, expect_tensor
from robust_moe_kernels.dispatch import AUTO, Op
from robust_moe_kernels.operands import Operands, expect_offsets, expect_order, readable
from robust_moe_kernels.ops.expert_mlp import reference_impl
from robust_moe_kernels.ops.expert_mlp.activation import activation_of
from robust_moe_kernels.ops.routing import Route, expect_route
from robust_moe_kernels.second_derivatives import another_follows, plain_gradients

__all__ = ["EXPERT_MLP", "expert_mlp"]

EXPERT_MLP = Op(__package__, cpu=("native", "reference"), cuda=("triton", "reference"))


def expert_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    route: Route,
    weights: Tensor,
    activation: str,
    rows: int | None = None,
    impl: str = AUTO,
) -> Tensor:
    """Send each token through its experts' MLPs (V-MoE, 2106.05974 equation 1).

    y[n] = sum_j weights[n, j] * (act(x[n] W1_e^T + b1_e) W2_e^T + b2_e), e the expert of token n's j-th pair, summed in
    slot order. Products have 16-bit operands where x has, and sums of float32 (float64 for float64).

    Args:
        x: tokens [N, C], any floating dtype.
        weight1: [E, H1, C], dtype of x, each expert's as ``nn.Linear`` has it.
        bias1: [E, H1], dtype of x, or None.
        weight2: [E, O, H], dtype of x.
        bias2: [E, O], dtype of x, or None.
        route: of the N tokens to E experts. Pairs behind ``offsets[E]`` are dropped: they add exactly 0, whatever
            their weights, and have gradient 0.
        weights: [N, k], any floating dtype; read in float32 (float64 for a float64 x).
        activation: "gelu" (by the error function), "gelu_tanh", "relu" or "silu", for which H1 = H; or gated, a =
            act(z[:, :H]) * z[:, H:] with H1 = 2H: "glu_gelu", "glu_gelu_tanh", "glu_relu", "glu_silu" or "glu_sigmoid".
        rows: an upper bound of ``offsets[E]`` known without asking the device, e.g. experts times capacity; what is
            kept for the backward is [rows, H1]. None: R = N*k.
        impl: "auto", "reference", "native" (CPU; float32, float16, bfloat16) or "triton".

    Returns:
        y [N, O], dtype of x. Differentiable in x, the layers' weights and biases, and ``weights``; an expert without
        rows has gradient 0. Kept for the backward are the inputs and the pre-activations [rows, H1].

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device, another activation; on the CPU also a
            route whose order and inverse are not each other's, or offsets that do not rise from 0 to at most ``rows``.
        ImplementationUnavailable: a named implementation cannot run here, or not on these operands.
    """
    expect_tensor(x, "x")
    expect_dtype(x, "x", FLOATS)
    expect(x.dim() == 2, "x", "shape [N, C]", list(x.shape))
    for name, tensor in (("weight1", weight1), ("weight2", weight2), ("weights", weights)):
        expect_tensor(tensor, name)
    for name, bias in (("bias1", bias1), ("bias2", bias2)):
        if bias is not None:
            expect_tensor(bias, name)
    expect_route(route, x, "x")
    expect_dtype(weights, "weights", FLOATS)
    expect_shape(weights, "weights", (x.shape[0], route.top_k), "[N, k]")
    expect_same_device(weights, "weights", x, "x")
    rows = route.order.shape[0] if rows is None else rows
    weights = weights.to(_accumulator(x))
    table = (route.order, route.inverse, route.offsets)
    return _OPS.expert_mlp_forward(x, weight1, bias1, weight2, bias2, weights, *table, rows, activation, impl)[0]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_OPS = torch.ops.robust_moe_kernels
_FORWARD = "robust_moe_kernels::expert_mlp_forward"
_BACKWARD = "robust_moe_kernels::expert_mlp_backward"
_ROUTE = "Tensor weights, Tensor order, Tensor inverse, Tensor offsets"
torch.library.define(
    _FORWARD,
    f"(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, {_ROUTE}, SymInt rows, str activation,"
    " str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD,
    f"(Tensor d_y, Tensor x, Tensor z, Tensor weight1, Tensor weight2, Tensor? bias2, {_ROUTE}, str activation,"
    " bool[] needs, str impl) -> Tensor[]",
)

_TABLES = "weights sum [N, k]; order int64 [R]; inverse int64 [R]; offsets int64 [E+1]"
_FORWARD_OPERANDS = Operands(
    "x float [N, C]; weight1 x [E, H1, C]; bias1? x [E, H1]; weight2 x [E, O, H]; bias2? x [E, O]; " + _TABLES
)
_BACKWARD_OPERANDS = Operands(
    "d_y float [N, O]; x d_y [N, C]; z d_y [rows, H1]; weight1 d_y [E, H1, C]; weight2 d_y [E, O, H];"
    f" bias2? d_y [E, O]; {_TABLES}"
)
_WANTED = ("x", "weight1", "bias1", "weight2", "bias2", "weights")  # the gradients that a backward may return, in order


def _checked(
    sizes: dict[str, Any], rows: int, activation: str, order: Tensor, inverse: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Order, inverse and offsets, contiguous; raises where sizes or numbers contradict one another."""
    widths = {name: sizes[name] for name in ("C", "H1", "H", "O")}
    expect(min(widths.values()) >= 1, "weight1", "widths C, H1, H and O of at least 1", widths)
    wanted = activation_of(activation).inputs(sizes["H"])
    expect(
        sizes["H1"] == wanted, "weight1", f"H1 = {wanted} outputs for {activation} and H = {sizes['H']}", sizes["H1"]
    )
    top_k, pairs = sizes["k"], sizes["R"]
    expect(top_k >= 1, "weights", "shape [N, k] with k >= 1", [sizes["N"], top_k])
    expect(pairs == sizes["N"] * top_k, "order", f"shape [N * k] = [{sizes['N'] * top_k}]", [pairs])
    expect(0 <= rows <= pairs, "rows", f"0 <= rows <= R = {pairs}", rows)
    offsets = expect_offsets(offsets, None)
    if readable(offsets):
        expect(int(offsets[-1]) <= rows, "offsets", f"at most rows = {rows} rows", int(offsets[-1]))
    return *expect_order(order, inverse), offsets


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.library.impl(_FORWARD, "default")
def _forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, rows: int, activation: str, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [N, O], pre-activations [rows, H1]: 0 behind ``offsets[E]``)."""
    sizes = _FORWARD_OPERANDS(x, weight1, bias1, weight2, bias2, weights, order, inverse, offsets)
    order, inverse, offsets = _checked(sizes, rows, activation, order, inverse, offsets)
    chosen = EXPERT_MLP.choose(impl, x, weight1, bias1, weight2, bias2)
    dense = _contiguous(x, weight1, bias1, weight2, bias2, weights)
    return chosen.forward(*dense, order, inverse, offsets, rows, activation_of(activation))


@torch.library.register_fake(_FORWARD)
def _forward_fake(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, rows: int, activation: str, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _FORWARD_OPERANDS.expect_kinds(x, weight1, bias1, weight2, bias2, weights, order, inverse, offsets)
    return x.new_empty((x.shape[0], weight2.shape[1])), x.new_empty((rows, weight1.shape[1]))


@torch.library.impl(_BACKWARD, "default")
def _backward(
    d_y: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, activation: str, needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, weight1, bias1, weight2, bias2 and weights that ``needs`` asks for, in this order; all
    contiguous, in the dtypes of what they are gradients of."""
    sizes = _BACKWARD_OPERANDS(d_y, x, z, weight1, weight2, bias2, weights, order, inverse, offsets)
    expect(len(needs) == len(_WANTED), "needs", f"{len(_WANTED)} flags, for {', '.join(_WANTED)}", len(needs))
    order, inverse, offsets = _checked(sizes, sizes["rows"], activation, order, inverse, offsets)
    chosen = EXPERT_MLP.choose(impl, d_y, x, z, weight1, weight2, bias2)
    dense = _contiguous(d_y, x, z, weight1, weight2, bias2, weights)
    found = chosen.backward(*dense, order, inverse, offsets, activation_of(activation), tuple(needs))
    return [gradient for gradient, wanted in zip(found, needs, strict=True) if wanted]


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    d_y: Tensor, x: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor, bias2: Tensor | None, weights: Tensor,
    order: Tensor, inverse: Tensor, offsets: Tensor, activation: str, needs: list[bool], impl: str,
) -> list[Tensor]:  # fmt: skip
    _BACKWARD_OPERANDS.expect_kinds(d_y, x, z, weight1, weight2, bias2, weights, order, inverse, offsets)
    shapes = (x.shape, weight1.shape, weight1.shape[:2], weight2.shape, weight2.shape[:2], weights.shape)
    kinds = (*[x.dtype] * 5, weights.dtype)
    made = zip(shapes, kinds, needs, strict=True)
    return [x.new_empty(shape, dtype=kind) for shape, kind, wanted in made if wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.rows, ctx.activation, ctx.impl = inputs
    z = output[1]
    ctx.save_for_backward(*tensors, z)
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 6  # the route's tables, rows, activation and impl
    if d_y is None:
        return *[None] * len(_WANTED), *rest
    x, weight1, bias1, weight2, bias2, weights, order, inverse, offsets, z = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: len(_WANTED)])
    if another_follows():
        table = {"order": order, "inverse": inverse, "offsets": offsets, "rows": ctx.rows}
        plain = partial(_plain, **table, activation=ctx.activation)
        return *plain_gradients(plain, (x, weight1, bias1, weight2, bias2, weights), d_y), *rest
    operands = (d_y, x, z, weight1, weight2, bias2, weights, order, inverse, offsets)
    found = iter(_OPS.expert_mlp_backward(*operands, ctx.activation, needs, ctx.impl))
    return *[next(found) if wanted else None for wanted in needs], *rest


def _plain(*operands: Any, activation: str, **table: Any) -> Tensor:
    table["activation"] = activation_of(activation)
    return reference_impl.forward(*operands, **table)[0]


def _twice(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
    raise RuntimeError("the operation expert_mlp_backward has no derivative; expert_mlp has any number of them")


torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
torch.library.register_autograd(_BACKWARD, _twice)  # without it PyTorch warns and returns a wrong number
