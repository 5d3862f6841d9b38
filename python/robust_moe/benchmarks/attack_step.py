"""One step of PGD and its random start: the fused implementations against plain PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robust_moe.benchmarks.harness import Options, Row, check_close, compare
from robust_moe.benchmarks.routing_ops import runnable
from robust_moe_kernels.ops.attack_step import ATTACK_STEP, NORMS, pgd_step, random_start

__all__ = ["run"]

EPS, ALPHA = 8 / 255, 2 / 255


def _norm(options: Options, batch: int, norm: str) -> list[Row]:
    impls = runnable(ATTACK_STEP, options.device)
    torch.manual_seed(0)
    x0 = [torch.rand(batch, 3, 32, 32, device=options.device) for _ in range(4)]
    x = [(value + EPS * (2 * torch.rand_like(value) - 1)).clamp(0, 1) for value in x0]
    grad = [torch.randn_like(value) for value in x0]

    def step(i: int, impl: str) -> Tensor:
        return pgd_step(x[i % 4], grad[i % 4], x0[i % 4], EPS, ALPHA, norm, impl)

    def start(i: int, impl: str) -> Tensor:
        return random_start(x0[i % 4], EPS, seed=i, norm=norm, impl=impl)

    rows = []
    for name, function in (("pgd_step", step), ("random_start", start)):
        for impl in impls:
            check_close(f"{name} {norm} {impl}", function(0, impl), function(0, "reference"), 1e-6)
        case = {"op": name, "B": batch, "images": "3x32x32", "norm": norm}
        rows += compare(case, {impl: partial(function, impl=impl) for impl in impls}, options)
    return rows


def run(options: Options) -> list[Row]:
    """One PGD step and its random start: every implementation that runs here."""
    torch.set_num_threads(1)
    batches = (128,) if options.quick else (128, 512)
    return [row for batch in batches for norm in NORMS for row in _norm(options, batch, norm)]
