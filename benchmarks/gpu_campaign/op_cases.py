"""The small ops between the convolutions, as functions of an input's number and an implementation's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from robust_moe_kernels.dispatch import IMPLEMENTATIONS, Op
from robust_moe_kernels.ops.apgd import APGD, apgd_step
from robust_moe_kernels.ops.attack_step import ATTACK_STEP, pgd_step, random_start
from robust_moe_kernels.ops.expert_block import EXPERT_BLOCK
from robust_moe_kernels.ops.expert_block.op import head_backward, head_forward, scale_shift
from robust_moe_kernels.ops.gate import GATE, top_k_gate
from robust_moe_kernels.ops.permute import PERMUTE, combine, dispatch
from robust_moe_kernels.ops.routing import ROUTING, sort_by_expert

__all__ = ["INPUTS", "OpCase", "op_cases", "runnable"]

INPUTS = 4  # used in turn
EPS, ALPHA = 8 / 255, 2 / 255


class OpCase(NamedTuple):
    """One op on inputs of one size."""

    name: str
    op: Op
    run: Callable[[int, str], Tensor]  # (number of the input, implementation) -> a result to compare
    bound: float  # relative error against the reference; 0: the same bits
    moved: int  # bytes that must be read and written


def runnable(op: Op, device: torch.device) -> list[str]:
    """Every implementation that can run on the device, whether it would be chosen there or not."""
    return [impl for impl in IMPLEMENTATIONS if op.why_not(impl, device.type) is None]


def op_cases(device: torch.device, batch: int, experts: int, channels: int, size: int, side: int) -> list[OpCase]:
    """A layer's ops (k = 2, maps [C, size, size] in float32) and an attack's (images [3, side, side])."""
    torch.manual_seed(0)
    logits = [torch.randn(batch, experts, device=device) for _ in range(INPUTS)]
    layout = torch.channels_last
    x = [torch.randn(batch, channels, size, size, device=device).to(memory_format=layout) for _ in range(INPUTS)]
    gates = [top_k_gate(value, 2, impl="reference") for value in logits]
    routes = [sort_by_expert(gate.indices, experts, impl="reference") for gate in gates]
    y = [dispatch(value, route, impl="reference") for value, route in zip(x, routes, strict=True)]
    scale, shift = (torch.rand(experts, channels, device=device) + 0.5 for _ in range(2))
    maps, element = batch * channels * size**2, 4
    cases = [
        OpCase("top_k_gate", GATE, lambda i, impl: top_k_gate(logits[i], 2, impl=impl).weights, 1e-6, 0),
        OpCase("sort_by_expert", ROUTING, lambda i, impl: sort_by_expert(gates[i].indices, experts, impl).order, 0, 0),
        OpCase("dispatch", PERMUTE, lambda i, impl: dispatch(x[i], routes[i], impl), 0, 3 * maps * element),
        OpCase(
            "combine",
            PERMUTE,
            lambda i, impl: combine(y[i], routes[i], gates[i].weights, impl),
            1e-6,
            3 * maps * element,
        ),
        OpCase(
            "scale_shift",
            EXPERT_BLOCK,
            lambda i, impl: scale_shift(y[i], routes[i].offsets, scale, shift, True, impl),
            1e-6,
            4 * maps * element,
        ),
    ]

    def head(i: int) -> tuple[Tensor | None, ...]:
        route = routes[i]
        return (y[i], scale, shift, x[i], None, None, route.order, route.inverse, route.offsets, gates[i].weights)

    cases.append(
        OpCase("head_forward", EXPERT_BLOCK, lambda i, impl: head_forward(*head(i), impl), 1e-6, 4 * maps * element)
    )
    cases.append(
        OpCase(
            "head_backward",
            EXPERT_BLOCK,
            lambda i, impl: head_backward(x[i], *head(i), impl)[0],
            1e-6,
            6 * maps * element,
        )
    )
    return cases + _attack_cases(device, batch, side)


def _attack_cases(device: torch.device, batch: int, side: int) -> list[OpCase]:
    x0 = [torch.rand(batch, 3, side, side, device=device) for _ in range(INPUTS)]
    x, previous = ([(value + EPS * (2 * torch.rand_like(value) - 1)).clamp(0, 1) for value in x0] for _ in range(2))
    grad = [torch.randn_like(value) for value in x0]
    eta = torch.full((batch,), 2 * EPS, device=device)
    pixels = 4 * x0[0].numel()
    cases = []
    for norm in ("Linf", "L2"):
        cases += [
            OpCase(
                f"pgd_step {norm}",
                ATTACK_STEP,
                lambda i, impl, norm=norm: pgd_step(x[i], grad[i], x0[i], EPS, ALPHA, norm, impl),
                1e-6,
                4 * pixels,
            ),
            OpCase(
                f"random_start {norm}",
                ATTACK_STEP,
                lambda i, impl, norm=norm: random_start(x0[i], EPS, seed=1, norm=norm, impl=impl),
                1e-6,
                2 * pixels,
            ),
            OpCase(
                f"apgd_step {norm}",
                APGD,
                lambda i, impl, norm=norm: apgd_step(x[i], previous[i], grad[i], x0[i], eta, EPS, 0.75, norm, impl),
                1e-6,
                5 * pixels,
            ),
        ]
    return cases
