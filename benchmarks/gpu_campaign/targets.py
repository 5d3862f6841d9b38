"""Small programs for the tools that look into a process: ``python -m benchmarks.gpu_campaign.targets WHAT [--tiny]``.

``memcheck`` launches every kernel of a training step and of an attack once, on a few rows, for compute-sanitizer.
``product LABEL`` launches one candidate of a large forward product a few times, for ncu; without a label, the first.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu_campaign.conv_cases import ConvCase, Operands, choices, precision, row_counts, runner
from robust_moe.attacks import APGD, PGD
from robust_moe.benchmarks.layer_case import Case, one_pass, set_mode

__all__ = ["LAUNCHES", "product", "small_layer"]

LAUNCHES = 3  # of a product; ncu looks at the last


def small_layer(tiny: bool) -> None:
    """A layer's passes in training and in an attack, and the attacks' own kernels."""
    device = torch.device("cpu" if tiny else "cuda")
    dtype = torch.float32 if tiny else torch.bfloat16
    case = Case(experts=3, batch=7, channels=16 if tiny else 64)
    layer, inputs = case.layer(device, dtype), case.inputs(device, dtype)
    for mode in ("forward+backward", "forward+dx"):
        set_mode({"": layer}, mode)
        one_pass(layer, inputs, mode)(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10)).to(device)
    images, labels = torch.rand(7, 3, 4, 4, device=device), torch.arange(7, device=device)
    for norm in ("Linf", "L2"):
        PGD(eps=8 / 255, steps=2, norm=norm, graph=False)(model, images, labels)
        APGD(eps=8 / 255, steps=4, norm=norm)(model, images, labels)


def product(label: str | None, tiny: bool) -> str:
    """The candidate of that label of a forward product, B = 512, k = 2, E = 4; returns its label."""
    device = torch.device("cpu" if tiny else "cuda")
    rows, channels, mode = (6, 64, "fp16") if tiny else (1024, 512, "bf16")
    with precision(mode) as dtype:
        operands = Operands.of(ConvCase(row_counts(rows, 4, "even"), channels), dtype, device)
        found = dict(choices(operands, "forward"))
        label = label or next(iter(found))
        run = runner(operands, "forward", found[label])
        for _ in range(LAUNCHES):
            run()
    return label


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("memcheck", "product"))
    parser.add_argument("label", nargs="?")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    if asked.what == "memcheck":
        small_layer(asked.tiny)
    else:
        print(product(asked.label, asked.tiny))
    if not asked.tiny:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
