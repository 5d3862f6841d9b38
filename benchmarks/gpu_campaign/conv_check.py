"""Every candidate of some convolutions against float64: a process of part 2, of which several run side by side.

``python -m benchmarks.gpu_campaign.conv_check MODE OPERATIONS [--skip N] [--tiny]`` prints two lines of JSON a
candidate: {"next": which}, before anything of it runs, and the verdict. Running side by side also compiles all kernels
at once into Triton's cache, for the parts that follow. A kernel that cannot be compiled or launched is reported as not
ok. One that breaks the device ends the process: whoever started it goes on after that candidate with ``--skip``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.gpu_campaign.conv_cases import (
    MODES,
    OPERATIONS,
    ConvCase,
    Operands,
    choices,
    library,
    precision,
    row_counts,
    runner,
)
from robust_moe.benchmarks.baselines import first_line

__all__ = ["cases", "check", "verdict"]

REFUSED = (CompilationError, OutOfResources, PTXASError)  # of Triton: nothing of the kernel has run
PASSES = "PassManager::run failed"  # how Triton's compiler says, in a RuntimeError, that one of its passes gave up
# Relative errors that pass whatever the library's own is: a few units of the mode's rounding.
FLOORS = {"bf16": 4e-3, "fp16": 1e-3, "tf32": 1e-3, "ieee": 2e-6}


def cases(tiny: bool) -> Iterator[ConvCase]:
    """Uneven rows throughout, one expert without any: that is where kernels go wrong."""
    rows, experts = (7, 4) if tiny else (200, 8)
    uneven = row_counts(rows, experts, "uneven")
    for channels in (64,) if tiny else (512, 64):
        for kernel, stride in ((3, 1), (1, 2)) if tiny else ((3, 1), (3, 2), (1, 2)):
            size = 4 if stride == 1 or tiny else 8
            for gather in (False, True) if stride == 1 else (True,):
                yield ConvCase(uneven, channels, size, kernel, stride, gather)


def check(
    mode: str,
    operations: Sequence[str],
    tiny: bool,
    device: torch.device,
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
    begins: Callable[[dict[str, Any]], object] = lambda about: None,
) -> Iterator[dict[str, Any]]:
    """One dict an operation, case and candidate, in an order that never changes; the first ``skip`` are left out.

    ``share`` (i, n): every n-th candidate of a case alone, from the i-th on, always the same ones: each is compiled by
    one process. ``begins`` is told which candidate is next.
    """
    number = 0
    with precision(mode) as dtype:
        for operation, case in product(operations, cases(tiny)):
            if operation == "dgrad" and case.gather and case.stride == 1:
                continue  # gathers nothing: the case without is the same
            operands = Operands.of(case, dtype, device)
            truth = rival = None
            for label, choice in choices(operands, operation)[share[0] :: share[1]]:
                number += 1
                if number <= skip:
                    continue
                if truth is None:
                    truth = library(operands, operation, torch.float64)
                    rival = _error(library(operands, operation, dtype), truth)
                about = {"mode": mode, "operation": operation, "C": case.channels, "kernel": case.kernel}
                about |= {"stride": case.stride, "gather": case.gather, "candidate": label}
                begins(about)
                yield about | _judged(mode, operands, operation, choice, truth, rival)


def _judged(
    mode: str, operands: Operands, operation: str, choice: Any, truth: torch.Tensor, rival: float
) -> dict[str, Any]:
    """The verdict on a candidate, or why there is no result of it to judge."""
    try:
        return verdict(mode, _error(_poisoned(operands, operation, choice), truth), rival)
    except REFUSED as error:
        return {"error": first_line(error), "library_error": rival, "ok": False}
    except RuntimeError as error:  # an error of the device is one too, and must end the process
        if PASSES not in str(error):
            raise
        return {"error": first_line(error), "library_error": rival, "ok": False}


def _poisoned(operands: Operands, operation: str, choice: Any) -> torch.Tensor:
    """The result, in memory that held NaN: an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return runner(operands, operation, choice)()
    finally:
        torch.use_deterministic_algorithms(False)


def _error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def verdict(mode: str, error: float, rival: float) -> dict[str, Any]:
    """Right is at most twice the library's own error, or a few roundings; NaN is wrong."""
    return {"error": error, "library_error": rival, "ok": error <= max(2 * rival, FLOORS[mode])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("operations", help="separated by commas")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    device = torch.device("cpu" if asked.tiny else "cuda")
    operations = [name for name in OPERATIONS if name in asked.operations.split(",")]

    def begins(about: dict[str, Any]) -> None:
        print(json.dumps({"next": about}), flush=True)

    for row in check(asked.mode, operations, asked.tiny, device, asked.skip, tuple(asked.share), begins):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
