"""Gate, sort, dispatch and combine: the compiled implementations against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from robust_moe.benchmarks.harness import Options, Row, check_close, compare
from robust_moe_kernels.dispatch import Op
from robust_moe_kernels.ops.gate import GATE, top_k_gate
from robust_moe_kernels.ops.permute import PERMUTE, combine, dispatch
from robust_moe_kernels.ops.routing import ROUTING, sort_by_expert

__all__ = ["run", "runnable"]


def runnable(op: Op, device: torch.device) -> list[str]:
    """The implementations that can run, the default first, PyTorch's last."""
    order = [impl for impl in op.order(device.type) if op.why_not(impl, device.type) is None]
    return [impl for impl in order if impl != "reference"] + ["reference"]


def _sizes(options: Options, batch: int, experts: int) -> list[Row]:
    torch.manual_seed(0)
    logits = [torch.randn(batch, experts, device=options.device) for _ in range(8)]
    x = [torch.randn(batch, 512, 4, 4, device=options.device) for _ in range(4)]
    gates = [top_k_gate(value, 2, impl="reference") for value in logits]
    routes = [sort_by_expert(gate.indices, experts, impl="reference") for gate in gates]
    y = [dispatch(value, route, impl="reference") for value, route in zip(x, routes, strict=False)]

    ops: dict[str, tuple[Op, Callable[..., Tensor]]] = {
        "top_k_gate": (GATE, lambda i, impl: top_k_gate(logits[i % 8], 2, impl=impl).weights),
        "sort_by_expert": (ROUTING, lambda i, impl: sort_by_expert(gates[i % 8].indices, experts, impl).order),
        "dispatch": (PERMUTE, lambda i, impl: dispatch(x[i % 4], routes[i % 4], impl)),
        "combine": (PERMUTE, lambda i, impl: combine(y[i % 4], routes[i % 4], gates[i % 4].weights, impl)),
    }
    rows = []
    for name, (op, function) in ops.items():
        impls = runnable(op, options.device)
        for impl in impls:
            # Sorting and copying are exact; softmax and weighted sums agree to float32 rounding.
            bound = 0.0 if name in ("sort_by_expert", "dispatch") else 1e-6
            check_close(f"{name} {impl}", function(0, impl), function(0, "reference"), bound)
        case = {"op": name, "B": batch, "E": experts, "k": 2, "map": "512x4x4"}
        rows += compare(case, {impl: partial(function, impl=impl) for impl in impls}, options)
    return rows


def run(options: Options) -> list[Row]:
    """Gate, sort, dispatch and combine: every implementation that runs here."""
    torch.set_num_threads(1)
    sizes = ((128, 4),) if options.quick else ((128, 4), (128, 16), (512, 16))
    return [row for batch, experts in sizes for row in _sizes(options, batch, experts)]
