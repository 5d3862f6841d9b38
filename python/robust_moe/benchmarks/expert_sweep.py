"""The layer over experts, batch, k and map size, against every other way to write it, as rates of a measured ceiling.

Around two centres, E = 4 and E = 16 (k = 2, B = 128, 512 channels, 4x4 maps), one number varies at a time: E from 2 to
32, B from 32 to 1024, k of 1, 2 and 4, maps of 4x4, 8x8 and 16x16 with a ResNet-18's 512, 256 and 128 channels (equal
work). Rates count only the products that touch the map (:meth:`layer_case.Case.gflop`), the same for every variant;
Winograd's algorithm needs fewer (64 of 100 on 4x4 maps), so that a share may exceed one.
Their share is of the fastest large matrix product measured in the same run, before and after, best of all: torch.mm's,
the library's 1x1 convolution's or, on the CPU, the engine's.

The CPU runs a part of it, to stay within minutes: one thread at the centres only, B = 1024 around E = 4 only, and the
slow baselines where they are bearable: the masked loop up to B = 256, all experts up to E/k = 4 and B = 128. On the CPU
a case ends after 8 seconds (``--seconds``) with two timed rounds or more; each row says how many.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.benchmarks import layer_case
from robust_moe.benchmarks.baselines import first_line, why_no_compiler
from robust_moe.benchmarks.harness import Options, Row, check_close, compare
from robust_moe.benchmarks.layer_case import ALL, DENSE, MASKED, SORTED, Case, one_pass
from robust_moe_kernels.dispatch import AUTO
from robust_moe_kernels.layout import Geometry
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV, conv_forward

__all__ = ["run"]

PASSES = ("forward+backward", "forward+dx")
CENTRES = (Case(experts=4), Case(experts=16))
CPU_SECONDS = 8.0


def sweep(full: bool) -> Iterator[Case]:
    """The points, each once; ``full`` includes those that a CPU takes minutes for."""
    for experts in (2, 4, 8, 16, 32):
        yield Case(experts)
    for centre in CENTRES:
        for batch in (32, 64, 256, 512, 1024) if full or centre is CENTRES[0] else (32, 512):
            yield replace(centre, batch=batch)
        for top_k in (1, 4):
            yield replace(centre, top_k=top_k)
        for channels, size in ((256, 8), (128, 16)):
            yield replace(centre, channels=channels, size=size)


def baselines(case: Case, full: bool) -> tuple[str, ...]:
    """Which of them are timed beside the layer."""
    names = []
    if full or case.batch <= 256:
        names.append(MASKED)
    names.append(SORTED)
    if full or (case.experts <= 4 * case.top_k and case.batch <= 128):
        names.append(ALL)
    return (*names, DENSE)


def large_products(options: Options, threads: int, dtype: torch.dtype) -> list[Row]:
    """Rates of a large matrix product by all that can compute it: the best is the ceiling of the layer's rate."""
    device = options.device
    side = 8192 if device.type == "cuda" else 512 if options.quick else 1536
    pairs = [[torch.randn(side, side, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
    runs: dict[str, Callable[[int], Any]] = {"torch.mm": lambda i: torch.mm(*pairs[i % 2])}
    if EXPERT_CONV.why_not("native", device.type) is None and dtype == torch.float32:
        offsets = torch.tensor([0, side], device=device)
        geometry = Geometry((1, 1), (0, 0), (1, 1))
        runs["1x1 expert_conv"] = lambda i: conv_forward(
            pairs[i % 2][0][..., None, None], pairs[i % 2][1].t()[None, ..., None, None], offsets, None, [], geometry,
            AUTO,
        )  # fmt: skip
    torch.set_num_threads(threads)
    for name, run in runs.items():
        wanted = torch.mm(*(matrix.double() for matrix in pairs[0]))
        check_close(name, run(0).reshape(side, side), wanted, 1e-5 if dtype == torch.float32 else 1e-2)
    # the library's convolution may beat its matrix product: the same work, with the first matrix read as 8x8 maps
    images = [(a.view(side // 64, side, 8, 8), b[..., None, None]) for a, b in pairs]
    runs["1x1 convolution, 8x8 maps"] = lambda i: F.conv2d(*images[i % 2])
    case = {"op": "large matrix product", "side": side, "threads": threads, "dtype": _name(dtype)}
    rows = compare(case, runs, replace(options, repeats=max(options.repeats, 15), seconds=None))
    return [replace(row, extra={"gflops": 2 * side**3 / 1e6 / row.low_ms}) for row in rows]


def _with_share(rows: list[Row]) -> list[Row]:
    """Each row with its rate's share of the best large product of its threads and dtype; the products' own included."""
    ceilings: dict[Any, float] = defaultdict(float)
    for row in rows:
        if "op" in row.case:
            key = row.case["threads"], row.case["dtype"]
            ceilings[key] = max(ceilings[key], row.extra["gflops"])
    return [
        replace(
            row, extra={**row.extra, "share": row.extra["gflops"] / ceilings[row.case["threads"], row.case["dtype"]]}
        )
        for row in rows
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compiled(variants: dict[str, nn.Module], inputs: list[Tensor], mode: str) -> dict[str, Callable[[int], object]]:
    """Passes through the sorted loop and the dense block with torch.compile'd blocks, checked, and compiled for every
    input; what cannot be compiled is left out, and said.

    Blocks, not the whole loop: that compiles in seconds, for all experts at once; the whole in minutes, and with
    dynamic shapes not at all (Inductor of PyTorch 2.14: "cannot determine truth value of Relational").
    """
    found = {}
    for name in (SORTED, DENSE):
        torch.compiler.reset()
        module: Any = copy.deepcopy(variants[name])
        for block in module.blocks if name == SORTED else [module.block]:
            block.compile(dynamic=name == SORTED)  # segments change their sizes with every input
        step = one_pass(module, inputs, mode)
        try:
            for number in range(layer_case.INPUTS):
                step(number)
        except Exception as error:  # a compiler's failure is a result, not an end
            print(f"  left out: torch.compile of the {name}: {first_line(error)}")
            continue
        layer_case.check_same(f"{name}, compiled", module, variants[name], inputs[0])
        found[f"{name}, compiled"] = step
    return found


def _point(case: Case, dtype: torch.dtype, options: Options, threads_swept: tuple[int, ...]) -> list[Row]:
    full = options.device.type == "cuda"
    variants = case.variants(case.layer(options.device, dtype), baselines(case, full))
    inputs = case.inputs(options.device, dtype)
    layer_case.check(variants, inputs[0], PASSES)
    rows = []
    for mode in PASSES:
        layer_case.set_mode(variants, mode)
        steps = {name: one_pass(module, inputs, mode) for name, module in variants.items()}
        peaks = layer_case.memory(steps, options.device)
        for threads in threads_swept:
            torch.set_num_threads(threads)
            timed = steps | layer_case.captured_passes(variants, inputs, mode)
            if options.compile and (options.quick or case in CENTRES):
                timed |= _compiled(variants, inputs, mode)
            described = {**case.describe(mode), "threads": threads, "dtype": _name(dtype)}
            for row in compare(described, timed, options, peaks, warmup=1):
                rows.append(replace(row, extra={**row.extra, "gflops": case.gflop(mode) / row.median_ms * 1e3}))
    return rows


def run(options: Options) -> list[Row]:
    """The layer over E, B, k and map size, beside every other way to write it; rates, and their share of a ceiling."""
    cuda = options.device.type == "cuda"
    if options.seconds is None and not cuda:
        options = replace(options, seconds=CPU_SECONDS)
    if options.compile and (reason := why_no_compiler(options.device)) is not None:
        print(f"torch.compile's baselines are left out: {reason}")
        options = replace(options, compile=False)
    every = torch.get_num_threads()
    dtypes = (torch.float32, torch.bfloat16) if cuda else (torch.float32,)
    several = (every,) if cuda or options.quick else tuple(sorted({1, every}))
    points = [Case(experts=4, batch=16, channels=128)] if options.quick else sweep(full=cuda)

    def products() -> list[Row]:
        return [row for dtype in dtypes for threads in several for row in large_products(options, threads, dtype)]

    rows = products()
    torch.set_num_threads(every)
    for case in points:
        print(f"  {case}", flush=True)
        for dtype in dtypes:
            rows += _point(case, dtype, options, several if case in CENTRES else (every,))
    return _with_share(rows + products())  # once more: on a shared machine a first look may be too low
