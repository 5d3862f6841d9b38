"""FusedBlockMoE against a masked loop with a dense merge, and against a dense block of the same work.

The layer of the papers: a ResNet-18 block of conv5_x on 32x32 images, 512 channels, 4x4 maps, k = 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.baselines import DenseBlock, MaskedLoop
from benchmarks.harness import Options, Row, check_close, compare, peak_bytes
from robust_moe.models.resnet import BasicBlock
from robust_moe_kernels.modules import FusedBlockMoE

__all__ = ["run"]

BATCH, CHANNELS, SIZE, TOP_K = 128, 512, 4, 2
INPUTS = 4  # tensors of 4 MiB, used in turn: together more than a core's share of the cache


def _layer(experts: int, device: torch.device) -> FusedBlockMoE:
    torch.manual_seed(experts)
    block = BasicBlock(CHANNELS, CHANNELS)
    return FusedBlockMoE.from_block(block, experts, TOP_K, init="fresh").to(device)


def _pass(module: nn.Module, inputs: list[Tensor], mode: str) -> Callable[[int], object]:
    """One forward, with the backward that ``mode`` asks for."""

    def step(number: int) -> object:
        x = inputs[number % len(inputs)]
        if mode == "forward":
            with torch.no_grad():
                return module(x)
        x = x.detach().requires_grad_()
        y = module(x)
        if mode == "forward+dx":  # what an attack needs
            return torch.autograd.grad(y.sum(), x)[0]
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return torch.autograd.grad(y.sum(), [x, *parameters], allow_unused=True)

    return step


def _gate_of_correctness(layer: FusedBlockMoE, masked: MaskedLoop, x: Tensor) -> None:
    """Same output and input gradient in eval mode, and the sum-of-squares bound of float32 convolutions."""
    layer.eval(), masked.eval()
    results = []
    for module in (layer, masked):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        # Not y.sum(): with softmax weights that sum to 1 a sum hides a wrong weight.
        results.append((y, torch.autograd.grad((y * torch.sin(y.detach())).sum(), leaf)[0]))
    for name, got, wanted in zip(("output", "input gradient"), *results, strict=True):
        check_close(f"FusedBlockMoE {name}", got, wanted, 1e-5)
    layer.train(), masked.train()


def run(options: Options) -> list[Row]:
    rows = []
    batch = 16 if options.quick else BATCH
    experts_swept = (4,) if options.quick else (2, 4, 8, 16, 32)
    threads_swept = (1,) if options.quick or options.device.type == "cuda" else (1, 2)
    inputs = [torch.randn(batch, CHANNELS, SIZE, SIZE, device=options.device) for _ in range(INPUTS)]
    for experts in experts_swept:
        layer = _layer(experts, options.device)
        masked, dense = MaskedLoop(layer), DenseBlock(layer)
        _gate_of_correctness(layer, masked, inputs[0])
        variants: dict[str, nn.Module] = {"FusedBlockMoE": layer, "masked loop": masked, "dense block, 2B rows": dense}
        for mode in ("forward", "forward+backward", "forward+dx"):
            for module in variants.values():
                module.requires_grad_(mode == "forward+backward").train(mode == "forward+backward")
            steps = {name: _pass(module, inputs, mode) for name, module in variants.items()}
            memory = {
                name: {"peak_mib": peak_bytes(lambda step=step: step(0), options.device) / 2**20}
                for name, step in steps.items()
            }
            for threads in threads_swept:
                torch.set_num_threads(threads)
                case = {"mode": mode, "E": experts, "k": TOP_K, "B": batch, "C": CHANNELS, "map": f"{SIZE}x{SIZE}"}
                rows += compare({**case, "threads": threads}, steps, options, memory)
    return rows
