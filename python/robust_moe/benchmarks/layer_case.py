"""One routed layer, what it is compared with, and a pass through each: shared by the benchmarks of the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robust_moe.benchmarks.baselines import AllExperts, DenseBlock, MaskedLoop, SortedLoop
from robust_moe.benchmarks.cuda_graphs import captured
from robust_moe.benchmarks.harness import check_close, peak_bytes
from robust_moe.models.resnet import BasicBlock
from robust_moe.precision import full_precision
from robust_moe_kernels.modules import FusedBlockMoE

__all__ = [
    "BOUNDS",
    "INPUTS",
    "MODES",
    "Case",
    "captured_passes",
    "check",
    "check_same",
    "memory",
    "one_pass",
    "set_mode",
]

OURS, MASKED, SORTED, ALL, DENSE = "FusedBlockMoE", "masked loop", "sorted loop", "all experts", "dense block, kB rows"
BASELINES: dict[str, type[nn.Module]] = {MASKED: MaskedLoop, SORTED: SortedLoop, ALL: AllExperts, DENSE: DenseBlock}
MODES = {"forward": 1, "forward+dx": 2, "forward+backward": 3}  # convolutions' worth of work: forward, dgrad, wgrad
INPUTS = 4  # used in turn: at the paper's size 4 MiB each, together more than a core's share of the cache

# Relative errors allowed between two computations of one function, of (outputs, gradients); float32 without TF32. A sum
# of 9*512 products in another order moves about one float32 value in a million across the ReLU's threshold; its
# gradient comes or goes, and the gradient as a whole changes by a thousandth: measured 3e-7 without such a value,
# 1.1e-3 with one. bfloat16 keeps 8 bits; and two experts' scores may tie in it: the loop then chooses another one.
BOUNDS = {torch.float64: (1e-12, 1e-9), torch.float32: (1e-5, 5e-3), torch.bfloat16: (0.1, 0.3)}


@dataclass(frozen=True)
class Case:
    """A layer of ``experts`` BasicBlocks, each sample sent to ``top_k`` of them."""

    experts: int = 4  # E
    batch: int = 128  # B
    top_k: int = 2  # k
    channels: int = 512  # C, in and out
    size: int = 4  # H = W of the map

    def describe(self, mode: str) -> dict[str, Any]:
        """What a result row says about the case."""
        sizes = {"E": self.experts, "k": self.top_k, "B": self.batch, "C": self.channels}
        return {"mode": mode, **sizes, "map": f"{self.size}x{self.size}"}

    def gflop(self, mode: str) -> float:
        """Work of one pass by direct sums: both 3x3 convolutions of the k*B routed rows, without the products with
        padding. 2 FLOP a multiply-add; (3H-2)^2 of the 9*H^2 taps touch the map. Winograd's algorithm does less, and
        may come out above 100 % of a roofline."""
        taps = (3 * self.size - 2) ** 2
        return MODES[mode] * 2 * 2 * self.batch * self.top_k * self.channels**2 * taps / 1e9

    def layer(self, device: torch.device, dtype: torch.dtype = torch.float32) -> FusedBlockMoE:
        """The layer, drawn by its number of experts."""
        torch.manual_seed(self.experts)
        block = BasicBlock(self.channels, self.channels)
        return FusedBlockMoE.from_block(block, self.experts, self.top_k, init="fresh").to(device, dtype)

    def variants(self, layer: FusedBlockMoE, names: tuple[str, ...]) -> dict[str, nn.Module]:
        """The layer and the named baselines on copies of its parameters, each in its faster format: channels-last the
        layer, and on a GPU all of them."""
        found: dict[str, nn.Module] = {OURS: layer, **{name: BASELINES[name](layer) for name in names}}
        layer.to(memory_format=torch.channels_last)  # after the copies were made
        if next(layer.parameters()).is_cuda:
            found = {name: module.to(memory_format=torch.channels_last) for name, module in found.items()}
        return found

    def inputs(self, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Inputs used in turn."""
        torch.manual_seed(0)
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        shape = (self.batch, self.channels, self.size, self.size)
        return [torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout) for _ in range(INPUTS)]


def set_mode(variants: dict[str, nn.Module], mode: str) -> None:
    """Training with all weight gradients for "forward+backward"; else evaluation on frozen weights, as in an attack."""
    for module in variants.values():
        module.requires_grad_(mode == "forward+backward").train(mode == "forward+backward")


def _through(module: nn.Module, mode: str) -> Callable[[Tensor], object]:
    gradient: list[Tensor] = []

    def run(x: Tensor) -> object:
        if mode == "forward":
            with torch.no_grad():
                return module(x)
        x = x.detach().requires_grad_()
        y = module(x)
        if not gradient:
            gradient.append(torch.randn_like(y))
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # an expert without samples has no gradient in a loop
        return torch.autograd.grad(y, [x, *parameters], gradient, allow_unused=True)

    return run


def one_pass(module: nn.Module, inputs: list[Tensor], mode: str) -> Callable[[int], object]:
    """One forward, with the backward that ``mode`` asks for, from a random gradient of the output."""
    through = _through(module, mode)
    return lambda number: through(inputs[number % len(inputs)])


def _captured_pass(module: nn.Module, inputs: list[Tensor], mode: str) -> Callable[[int], object]:
    """As one_pass, replayed from one CUDA graph: no time is lost on launches. Only for modules that never wait for the
    device."""
    through, static = _through(module, mode), inputs[0].clone()
    replay = captured(lambda number: through(static))

    def run(number: int) -> None:
        static.copy_(inputs[number % len(inputs)])
        replay()

    return run


def captured_passes(
    variants: dict[str, nn.Module], inputs: list[Tensor], mode: str
) -> dict[str, Callable[[int], object]]:
    """On a GPU, the layer and the all-experts baseline from graphs; elsewhere nothing."""
    if not inputs[0].is_cuda:
        return {}
    return {f"{name}, graph": _captured_pass(variants[name], inputs, mode) for name in (OURS, ALL) if name in variants}


def memory(steps: dict[str, Callable[[int], object]], device: torch.device) -> dict[str, dict[str, float]]:
    """Peak memory of each variant's pass, for its result row."""
    for step in steps.values():
        step(0)  # what a first call allocates for good is not the pass's
    return {name: {"peak_mib": peak_bytes(partial(step, 0), device) / 2**20} for name, step in steps.items()}


def _filters(module: Any) -> list[list[nn.Parameter]]:
    """The convolutions' weights, each a list to be stacked along E."""
    names = ("conv1", "conv2")
    blocks: Any = module.experts if type(module) is FusedBlockMoE else module.blocks
    return [[getattr(block, name).weight for block in blocks] for name in names]


def _results(module: nn.Module, x: Tensor, gradient: Tensor, weights: bool) -> dict[str, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    stacks = _filters(module) if weights else []
    flat = [parameter for stack in stacks for parameter in stack]
    d_x, *rest = torch.autograd.grad(y, [leaf, *flat], gradient.to(y.dtype), allow_unused=True)
    found = {"output": y, "input gradient": d_x}
    gradients = iter(torch.zeros_like(p) if g is None else g for g, p in zip(rest, flat, strict=True))
    for number, stack in enumerate(stacks, start=1):
        found[f"conv{number} weight gradient"] = torch.stack([next(gradients) for _ in stack])
    return found


@full_precision()
def check(variants: dict[str, nn.Module], x: Tensor, modes: tuple[str, ...]) -> None:
    """Every variant against the sorted loop on one input: outputs and gradients in evaluation, and in training (with
    the filters' gradients) where ``modes`` trains. The dense block, another function, is compared with the layer's
    first expert; the all-experts variant, another function in training, in evaluation only. Compared without TF32
    (a thousandth, where convolutions have it by default); what is timed afterwards takes the precision that is set.

    Raises AssertionError: a result beyond ``BOUNDS``; nothing may be timed then.
    """
    layer: Any = variants[OURS]
    oracle = variants.get(SORTED) or SortedLoop(layer)
    generator = torch.Generator(x.device).manual_seed(1)
    gradient = torch.randn(x.shape, generator=generator, device=x.device)  # the block keeps its input's shape
    for training in (False, True) if "forward+backward" in modes else (False,):
        compared = {name: v for name, v in variants.items() if name != DENSE and not (training and name == ALL)}
        for module in (oracle, *variants.values()):
            module.requires_grad_(training).train(training)
        wanted = _results(oracle, x, gradient, weights=training)
        where = "in training" if training else "in evaluation"
        for name, module in compared.items():
            if module is oracle:
                continue
            got = _results(module, x, gradient, weights=training)
            for what, value in got.items():
                check_close(f"{name}: {what} {where}", value, wanted[what], BOUNDS[x.dtype]["gradient" in what])
        if DENSE in variants and not training:
            with torch.no_grad():
                rows = layer.experts.one(0, x).repeat(layer.top_k, 1, 1, 1)
                check_close(f"{DENSE}: output {where}", variants[DENSE](x), rows, BOUNDS[x.dtype][0])


@full_precision()
def check_same(name: str, module: nn.Module, wanted: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """Output and input gradient of a module against another's, both in the mode they are in, within the bound of
    ``dtype`` (None: of x). Raises AssertionError."""
    with torch.no_grad():
        gradient = torch.randn_like(wanted(x))
    got, bounds = _results(module, x, gradient, weights=False), BOUNDS[dtype or x.dtype]
    for what, value in _results(wanted, x, gradient, weights=False).items():
        check_close(f"{name}: {what}", got[what], value, bounds["gradient" in what])
