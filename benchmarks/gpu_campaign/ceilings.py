"""Part 1: what nothing on this GPU is faster than: a large bf16 product, a copy, and what a launch costs."""

from __future__ import annotations

import torch

from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.timing import compare_captured

__all__ = ["run"]

LAUNCHES = 100


def run(record: Record) -> str:
    device = record.device
    side, bytes_moved, repeats = (64, 2**16, 2) if record.dry else (8192, 2**32, 9)
    torch.manual_seed(0)
    rates = {}
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True)):
        pairs = [[torch.randn(side, side, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else before
        name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        case = {"op": "product", "side": side, "dtype": name}
        (row,) = compare_captured(case, {"mm": lambda i, p=pairs: torch.mm(*p[i % 2])}, device, repeats, calls=2)
        torch.backends.cuda.matmul.fp32_precision = before
        rates[name] = 2 * side**3 / 1e9 / row["median_ms"]
        record.row(**row, tflops=rates[name])
        del pairs
    buffers = [torch.rand(bytes_moved // 4, device=device) for _ in range(2)]
    (row,) = compare_captured({"op": "copy"}, {"copy": lambda i: buffers[1].copy_(buffers[0])}, device, repeats, 2)
    rate = 2 * bytes_moved / 1e9 / row["median_ms"]
    record.row(**row, tb_per_s=rate)
    small = torch.ones(256, device=device)
    (row,) = compare_captured({"op": "launch"}, {"graph": lambda i: small.add_(1)}, device, repeats, LAUNCHES)
    record.row(**row)
    graph_us = 1e3 * row["median_ms"]
    return (
        f"bf16 product {rates['bfloat16']:.0f} TFLOP/s, tf32 {rates['tf32']:.0f}; copy {rate:.2f} TB/s read and "
        f"written; a small kernel in a graph {graph_us:.1f} us"
    )
