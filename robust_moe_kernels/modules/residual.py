"""Residual blocks as experts: what may be replaced, and how one expert computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robust_moe_kernels.layout import Geometry, dense_format
from robust_moe_kernels.modules.experts import (
    Experts,
    StackedBatchNorm2d,
    StackedConv2d,
    engine_computes,
    engine_dtype,
    keep_statistics,
)
from robust_moe_kernels.modules.routed_block import Layer, Plan, fold_norm, routed_block
from robust_moe_kernels.ops.routing import Route

__all__ = ["ResidualExperts"]

_PASSIVE = (nn.Identity, nn.ReLU)  # children that need no parameters: activations, and what timm leaves switched off


class FoldedNorm(NamedTuple):
    """A batch norm in evaluation as a scale and a shift, and the numbers that they were made of."""

    scale: Tensor  # [E, O]
    shift: Tensor  # [E, O]
    numbers: tuple[Tensor, ...]  # weight, bias, running mean, running variance, and the number of batches
    versions: tuple[int, ...]  # how often each had been changed in place; a norm in training counts the last alone

    @classmethod
    def of(cls, norm: StackedBatchNorm2d) -> Self:
        numbers = (*_numbers(norm), norm.num_batches_tracked)
        return cls(*fold_norm(*_numbers(norm), norm.eps), numbers, _versions(numbers))

    def is_of(self, norm: StackedBatchNorm2d) -> bool:
        numbers = (*_numbers(norm), norm.num_batches_tracked)
        same = all(a is b for a, b in zip(numbers, self.numbers, strict=True))
        return same and _versions(numbers) == self.versions


class CastFilters(NamedTuple):
    """Filters in another dtype, and those that they were made of."""

    value: Tensor
    weight: Tensor
    versions: tuple[int, ...]

    def is_of(self, weight: Tensor, dtype: torch.dtype) -> bool:
        same = self.weight is weight and self.value.dtype == dtype
        return same and _versions((weight,)) == self.versions


class FoldedNorms(list[FoldedNorm]):
    """A block's norms, layer by layer, and ``filters``: those that a forward has cast, by the number of their layer."""

    def __init__(self, norms: Iterable[FoldedNorm]) -> None:
        super().__init__(norms)
        self.filters: dict[int, CastFilters] = {}


class ResidualExperts(Experts):
    """E residual blocks in place of one: torchvision's and timm's BasicBlock and Bottleneck, any stride, with or
    without downsampling (convolution and normalisation, after an average pool in timm's "d" variants).

    State: the block's own names with a leading dimension E, e.g. ``conv1.weight`` [E, O, I, 3, 3],
    ``bn1.running_mean`` [E, O], ``downsample.0.weight``. Whether a block really computes
    relu(bn2(conv2(relu(bn1(conv1(x))))) + skip(x)) cannot be read off its attributes (pre-activation blocks have the
    same), so the constructor runs both on one random input and compares.

    Raises:
        ValueError: a block with other parts (squeeze-and-excitation, drop path, other activations or normalisations)
            or another order of computation.
    """

    conv1: StackedConv2d
    downsample: nn.Sequential | None

    def __init__(self, block: nn.Module, num_experts: int) -> None:
        super().__init__(block, num_experts)
        depth = 3 if hasattr(block, "conv3") else 2
        expected = {f"{kind}{i}" for kind in ("conv", "bn") for i in range(1, depth + 1)}
        children = dict(block.named_children())
        if not expected <= children.keys():
            raise ValueError(
                "block: expected a BasicBlock or Bottleneck (conv1, bn1, conv2, bn2, ...), got"
                f" {type(block).__name__} with {', '.join(children) or 'no children'}"
            )
        self.depth = depth
        for name, child in children.items():
            if name in expected:
                self.add_module(name, _stacked(child, num_experts, name))
            elif name == "downsample":
                self.downsample = _stacked_downsample(child, num_experts)
            elif not isinstance(child, _PASSIVE):
                raise ValueError(
                    f"block.{name}: expected a convolution, a batch norm, a downsample or a ReLU, got"
                    f" {type(child).__name__}"
                )
        if not hasattr(self, "downsample"):
            self.downsample = None
        self.in_channels = self.conv1.in_channels
        # During an attack, each engine layer's batch norm; see ``attack_mode``.
        self.folded: FoldedNorms | None = None
        _probe(block, self)

    def unbind(self) -> list[Any]:
        indices = range(1, self.depth + 1)
        layers = [(getattr(self, f"conv{i}").unbind(), getattr(self, f"bn{i}").unbind()) for i in indices]
        skips = [] if self.downsample is None else [module.unbind() for module in _stacks(self.downsample)]
        return [
            ([(convs[e], norms[e]) for convs, norms in layers], [skip[e] for skip in skips])
            for e in range(self.num_experts)
        ]

    def run(self, x: Tensor, parameters: Any) -> Tensor:
        layers, skips = parameters
        y = x
        for i, (conv, norm) in enumerate(layers, start=1):
            y = getattr(self, f"bn{i}").run(getattr(self, f"conv{i}").run(y, conv), norm)
            if i < self.depth:
                y = torch.relu(y)
        return torch.relu(y + self._skip(x, skips))

    def mix(self, x: Tensor, route: Route, weights: Tensor) -> Tensor:
        stages = self._stages()
        if stages is None or not engine_computes(x, self.parameters()) or x.shape[0] == 0:
            return super().mix(x, route, weights)
        pools, layers = stages
        fixed = [Layer(geometry, norm.eps, norm.momentum, norm.training) for _, norm, geometry in layers]
        plan = Plan(tuple(fixed), len(layers) > self.depth)
        dtype = engine_dtype(x)
        rows = x.to(dtype)
        x_skip = pools(rows) if len(pools) else None
        tensors: list[Tensor | None] = []
        for i, (conv, norm, _) in enumerate(layers):
            tensors += [self._filters(i, conv.weight, dtype), *_numbers(norm), norm.num_batches_tracked]
            tensors += self._tables(i, norm)
        weights = weights.to(torch.promote_types(dtype, torch.float32))  # a gate may compute in float64
        out, statistics = routed_block(rows, x_skip, weights, route, plan, tensors)
        if statistics:
            keep_statistics([norm for _, norm, _ in layers if norm.training], statistics)
            self.folded = None  # of other statistics
        return out.contiguous(memory_format=dense_format(x))

    def fold(self) -> FoldedNorms | None:
        """Every layer's batch norm in evaluation; ``None`` where the engine does not compute the block."""
        stages = self._stages()
        return None if stages is None else FoldedNorms(FoldedNorm.of(norm) for _, norm, _ in stages[1])

    def _filters(self, i: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Layer i's filters in the engine's dtype. While the norms are folded, frozen filters are cast once, and again
        only where they were replaced or changed."""
        if weight.dtype == dtype:
            return weight
        if self.folded is None or weight.requires_grad or torch.compiler.is_compiling():
            return weight.to(dtype)
        cast = self.folded.filters.get(i)
        if cast is None or not cast.is_of(weight, dtype):
            cast = self.folded.filters[i] = CastFilters(weight.to(dtype), weight, _versions((weight,)))
        return cast.value

    def _tables(self, i: int, norm: StackedBatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
        """Layer i's folded norm, unless the norm was set to training or unfrozen since, or its numbers were replaced
        or changed. A compiled graph folds by itself: it could not tell."""
        if self.folded is None or torch.compiler.is_compiling() or norm.training:
            return None, None
        folded = self.folded[i]
        frozen = not (norm.weight.requires_grad or norm.bias.requires_grad)
        return (folded.scale, folded.shift) if frozen and folded.is_of(norm) else (None, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.folded = None  # of the numbers as they were
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy leads its own life: what was folded for the attack on this one would not follow its numbers.
        return {**self.__dict__, "folded": None}

    def _stages(self) -> tuple[nn.Sequential, list[tuple[StackedConv2d, StackedBatchNorm2d, Geometry]]] | None:
        """(pooling before the skip's convolution, every convolution with its norm and geometry, the skip's last);
        ``None`` where the engine does not compute the block: biases, groups, a skip of another form."""
        pairs = [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in range(1, self.depth + 1)]
        pools = nn.Sequential()
        if self.downsample is not None:
            modules = list(self.downsample)
            stacked = _stacks(self.downsample)
            kinds = [type(module) for module in stacked]
            if kinds != [StackedConv2d, StackedBatchNorm2d] or modules[-2:] != stacked:
                return None
            pools = nn.Sequential(*modules[:-2])
            pairs.append((stacked[0], stacked[1]))
        layers = [(conv, norm, conv.geometry()) for conv, norm in pairs]
        if any(conv.bias is not None or geometry is None for conv, _, geometry in layers):
            return None
        return pools, layers

    def _skip(self, x: Tensor, skips: list[Any]) -> Tensor:
        if self.downsample is None:
            return x
        stacked = iter(skips)
        for module in self.downsample:
            x = module.run(x, next(stacked)) if isinstance(module, StackedConv2d | StackedBatchNorm2d) else module(x)
        return x


def _numbers(norm: StackedBatchNorm2d) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Counts of in-place changes; tensors made in inference mode have none."""
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


def _stacks(modules: nn.Sequential) -> list[Any]:
    return [module for module in modules if isinstance(module, StackedConv2d | StackedBatchNorm2d)]


def _stacked(module: nn.Module, num_experts: int, name: str) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        return StackedConv2d(module, num_experts)
    if isinstance(module, nn.BatchNorm2d):
        return StackedBatchNorm2d(module, num_experts)
    raise ValueError(f"block.{name}: expected Conv2d or BatchNorm2d, got {type(module).__name__}")


def _stacked_downsample(module: nn.Module, num_experts: int) -> nn.Sequential | None:
    if isinstance(module, nn.Identity):
        return None
    if not isinstance(module, nn.Sequential):
        raise ValueError(f"block.downsample: expected a Sequential, got {type(module).__name__}")
    passive = (nn.AvgPool2d, nn.Identity)
    stacked = nn.Sequential()  # under the same names: they are the state's keys
    for name, child in module.named_children():
        kept = isinstance(child, passive)
        stacked.add_module(name, copy.deepcopy(child) if kept else _stacked(child, num_experts, f"downsample.{name}"))
    return stacked


@torch.no_grad()
def _probe(block: nn.Module, experts: ResidualExperts) -> None:
    """Refuse a block that computes something else than its parts suggest.

    Both run on parameters drawn for the purpose, of at least single precision: a last normalisation that starts at zero
    would hide the whole branch, half precision most differences. Eval mode; nothing of the block changes.
    """
    weight = experts.conv1.weight
    device, kind = weight.device, torch.promote_types(weight.dtype, torch.float32)
    if device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        if like.dim() < 2:  # a normalisation's parameters and statistics, a bias
            value = torch.rand(like.shape, generator=generator) + 0.5
        else:
            value = torch.randn(like.shape, generator=generator) / like[0].numel() ** 0.5
        return value.to(device, kind)

    state = {name: draw(value) for name, value in block.state_dict().items() if value.is_floating_point()}
    names = experts.state_dict().keys() & state.keys()
    stacked = {name: state[name].expand(experts.num_experts, *state[name].shape) for name in names}
    x = torch.randn(2, experts.in_channels, 8, 8, generator=generator).to(device, kind)
    counts = [len(x)] + [0] * (experts.num_experts - 1)
    modes = [(module, module.training) for module in (*block.modules(), *experts.modules())]
    try:
        wanted = functional_call(block.eval(), state, (x.clone(),))
        got = functional_call(experts.eval(), stacked, (x, counts))
    finally:
        for module, mode in modes:
            module.training = mode
    # Same operations in the same order: equal up to the library's choice of algorithm.
    bound = 1e3 * torch.finfo(kind).eps * wanted.abs().max().clamp_min(1.0)
    if wanted.shape != got.shape or not bool(((wanted - got).abs() <= bound).all()):
        raise ValueError(
            f"block: expected {type(block).__name__} to compute relu(bn(conv(... x)) + skip(x)); on a random input it"
            " computes something else (a pre-activation block?)"
        )
