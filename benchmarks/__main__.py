"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory profiler's own messages; read when torch is imported

import torch

from benchmarks import attack_step, block_moe, routing_ops
from benchmarks.harness import Options, Row, save, show

BENCHMARKS: dict[str, Callable[[Options], list[Row]]] = {
    "block_moe": block_moe.run,
    "routing_ops": routing_ops.run,
    "attack_step": attack_step.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which to run: {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each variant (default: 9)")
    parser.add_argument("--quick", action="store_true", help="one small case each, to see that everything works")
    parser.add_argument("--out", type=Path, help="folder for NAME.json; without it nothing is written")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"names: expected one of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    if arguments.repeats < 1:
        parser.error(f"--repeats: expected a count >= 1, got {arguments.repeats}")
    options = Options(torch.device(arguments.device), arguments.repeats, arguments.quick)
    threads = torch.get_num_threads()
    for name in arguments.names or BENCHMARKS:
        print(f"\n== {name}", flush=True)
        rows = BENCHMARKS[name](options)
        torch.set_num_threads(threads)
        show(rows)
        if arguments.out:
            print(f"\nwritten: {save(name, rows, options.device, arguments.out)}")


if __name__ == "__main__":
    main()
