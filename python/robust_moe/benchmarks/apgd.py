"""One step of Auto-PGD and what it remembers: the fused implementations against plain PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from robust_moe.benchmarks.harness import Options, Row, check_close, compare
from robust_moe.benchmarks.routing_ops import runnable
from robust_moe_kernels.ops.apgd import APGD, apgd_step, apgd_track
from robust_moe_kernels.ops.attack_step import NORMS

__all__ = ["run"]

EPS = 8 / 255


def _images(options: Options, batch: int) -> list[Tensor]:
    return [torch.rand(batch, 3, 32, 32, device=options.device) for _ in range(4)]


def _step(options: Options, batch: int, norm: str) -> list[Row]:
    impls = runnable(APGD, options.device)
    torch.manual_seed(0)
    x0 = _images(options, batch)
    x, previous = ([(value + EPS * (2 * torch.rand_like(value) - 1)).clamp(0, 1) for value in x0] for _ in range(2))
    grad = [torch.randn_like(value) for value in x0]
    eta = torch.full((batch,), 2 * EPS, device=options.device)

    def step(i: int, impl: str) -> Tensor:
        return apgd_step(x[i % 4], previous[i % 4], grad[i % 4], x0[i % 4], eta, EPS, 0.75, norm, impl)

    for impl in impls:
        check_close(f"apgd_step {norm} {impl}", step(0, impl), step(0, "reference"), 1e-6)
    case = {"op": "apgd_step", "B": batch, "images": "3x32x32", "norm": norm}
    return compare(case, {impl: partial(step, impl=impl) for impl in impls}, options)


def _track(options: Options, batch: int, share: float) -> list[Row]:
    """``share`` of the samples are improved, and others of the same number fooled."""
    impls = runnable(APGD, options.device)
    torch.manual_seed(0)
    x, grad = _images(options, batch), _images(options, batch)
    improved, fooled = (torch.rand(batch, device=options.device) < share for _ in range(2))
    kept = {impl: [torch.zeros_like(x[0]) for _ in range(3)] for impl in impls}

    def track(i: int, impl: str) -> None:
        x_best, grad_best, x_fooled = kept[impl]
        apgd_track(x[i % 4], grad[i % 4], improved, fooled, x_best, grad_best, x_fooled, impl=impl)

    for impl in impls:
        track(0, impl)
    for impl in impls:
        check_close(f"apgd_track {impl}", torch.stack(kept[impl]), torch.stack(kept["reference"]), 0.0)
    case = {"op": "apgd_track", "B": batch, "images": "3x32x32", "improved and fooled": share}
    return compare(case, {impl: partial(track, impl=impl) for impl in impls}, options)


def run(options: Options) -> list[Row]:
    """One Auto-PGD step and its tracking of iterates: every implementation that runs here."""
    torch.set_num_threads(1)
    rows = []
    for batch in (128,) if options.quick else (128, 512):
        rows += [row for norm in NORMS for row in _step(options, batch, norm)]
        rows += [row for share in (0.0, 0.3, 1.0) for row in _track(options, batch, share)]
    return rows
