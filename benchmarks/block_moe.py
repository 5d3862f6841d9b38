"""FusedBlockMoE against a masked loop with a dense merge, a sorted loop, all experts densely (up to four of them, on a
GPU also from a CUDA graph), and a dense block of the same work.

The layer of the papers: a ResNet-18 block of conv5_x on 32x32 images, 512 channels, 4x4 maps, k = 2.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Options, Row, compare
from benchmarks.layer_case import (
    ALL,
    DENSE,
    MASKED,
    MODES,
    SORTED,
    Case,
    captured_passes,
    check,
    memory,
    one_pass,
    set_mode,
)

__all__ = ["run"]


def run(options: Options) -> list[Row]:
    rows = []
    threads_swept = (1,) if options.quick or options.device.type == "cuda" else (1, 2)
    for experts in (4,) if options.quick else (2, 4, 8, 16, 32):
        case = Case(experts, batch=16 if options.quick else 128)
        inputs = case.inputs(options.device)
        names = (MASKED, SORTED, *((ALL,) if experts <= 4 else ()), DENSE)
        variants = case.variants(case.layer(options.device), names)
        check(variants, inputs[0], tuple(MODES))
        for mode in MODES:
            set_mode(variants, mode)
            steps = {name: one_pass(module, inputs, mode) for name, module in variants.items()}
            peaks = memory(steps, options.device)
            for threads in threads_swept:
                torch.set_num_threads(threads)
                timed = steps | captured_passes(variants, inputs, mode)
                rows += compare({**case.describe(mode), "threads": threads}, timed, options, peaks)
    return rows
