"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from robust_moe.console import show_any_text

__all__ = ["BENCHMARKS", "Benchmark", "main"]

# A benchmark's module is imported when it is asked for by name. This file imports no PyTorch: the campaign of a clone
# starts without it, and every worker process of the speed-run imports this file again.


class Benchmark(NamedTuple):
    """One entry of the command line: ``run`` of the module of its name, with the options that all of them share."""

    repeats: int  # timed runs of each variant, unless --repeats says otherwise
    about: str


BENCHMARKS = {
    "expert_sweep": Benchmark(5, "the layer over E, B, k and map size; rates; CPU: ~12 minutes"),
    "scaling": Benchmark(7, "the layer beside the dense block over thread counts, and a model of more; CPU only"),
    "train_step": Benchmark(3, "a whole PGD-7 training step of a ResNet-18; CPU: minutes"),
    "ranks": Benchmark(5, "that step in one process and in two: strong and weak scaling; CPU only: minutes"),
    "rt_er_step": Benchmark(3, "a whole RT-ER step of four small ResNets; CPU: minutes"),
    "epoch": Benchmark(3, "a whole epoch of training a ResNet-18, beside a plain loop trainer; CPU: ~20 minutes"),
    "expert_mlp": Benchmark(
        5, "a ViT-S's routed MLP beside the dense one, loops and the grouped product; CPU: minutes"
    ),
    "routing_ops": Benchmark(9, "gate, sort, dispatch and combine: every implementation"),
    "attack_step": Benchmark(9, "one PGD step and its random start: every implementation"),
    "apgd": Benchmark(9, "one Auto-PGD step and its tracking: every implementation"),
    "loader": Benchmark(
        5, "the loader of streamed JPEGs alone beside torchvision's, its memory over 100,000; needs the extra train"
    ),
    "autoattack": Benchmark(
        3, "AutoAttack standard, whole, against pyautoattack; needs it and the extra train; CPU: ~10 minutes"
    ),
}
OURS = ("robust_moe", "robust_moe_kernels")


def main(prog: str = "python -m robust_moe.benchmarks", programs: Mapping[str, str] | None = None) -> None:
    """Time what the command line names, show it, and write it where ``--out`` says.

    Args:
        prog: what the command is called, for its help.
        programs: names and subjects of the caller's further programs, for its help.
    """
    show_any_text(sys.stdout)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the memory profiler's own messages; read when torch is imported
    import torch

    from robust_moe.benchmarks.harness import BusyMachine, Options, save, show
    from robust_moe.benchmarks.records import expect_records, folder_option

    listed = "benchmarks:\n" + "\n".join(f"  {name:14}{benchmark.about}" for name, benchmark in BENCHMARKS.items())
    if programs:
        listed += "\n\nprograms with options of their own (NAME --help):\n"
        listed += "\n".join(f"  {name:14}{about}" for name, about in programs.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Benchmarks: every number is timed after its result was found correct.",
        epilog=listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run, of those below (default: all)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: the GPU if there is one",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed runs of each variant (default: 9; expert_sweep and loader 5, whole steps and attacks 3)",
    )
    parser.add_argument("--seconds", type=float, help="a case starts no further round after so long (two at least)")
    parser.add_argument(
        "--batch", type=int, help="images of a step: train_step (128; on the CPU 32), rt_er_step (64), epoch (128)"
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 as Parquet files: autoattack's second network")
    parser.add_argument("--compile", action="store_true", help="expert_sweep: also torch.compile of (b) and (d)")
    parser.add_argument("--quick", action="store_true", help="one small case each, to see that everything works")
    parser.add_argument("--out", type=folder_option, help="folder for NAME.json; without it nothing is written")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"names: expected one of {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    for name in ("repeats", "batch", "seconds"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            parser.error(f"--{name}: expected a number > 0, got {value}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device for 'cuda', PyTorch sees none; use cpu")
    expect_records(parser, arguments.out, arguments.names or list(BENCHMARKS))
    device, threads = torch.device(arguments.device), torch.get_num_threads()
    refused, left_out = [], []
    for name in arguments.names or BENCHMARKS:
        print(f"\n== {name}", flush=True)
        options = Options(
            device,
            repeats=arguments.repeats or (1 if arguments.quick else BENCHMARKS[name].repeats),
            quick=arguments.quick,
            seconds=arguments.seconds,
            compile=arguments.compile,
            batch=arguments.batch,
            data=arguments.data,
        )
        try:
            rows = importlib.import_module(f"robust_moe.benchmarks.{name}").run(options)
        except ModuleNotFoundError as error:
            package = (error.name or OURS[0]).partition(".")[0]
            if package in OURS:  # a fault of ours, which no installation mends
                raise
            print(f"left out: {name} needs {package}, which is not installed")
            left_out.append(name)
            continue
        torch.set_num_threads(threads)
        show(rows)
        if arguments.out:
            try:
                print(f"\nwritten: {save(name, rows, device, arguments.out)}")
            except BusyMachine as error:
                print(f"\n{error}")
                refused.append(name)
    faults = [f"not written, for the machine was busy: {', '.join(refused)}"] if refused else []
    faults += [f"left out, for want of a package: {', '.join(left_out)}"] if left_out else []
    if faults:
        sys.exit("; ".join(faults))
