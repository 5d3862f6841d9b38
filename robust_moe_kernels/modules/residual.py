"""Residual blocks as experts: what may be replaced, and how the engine computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robust_moe_kernels.layout import Geometry, dense_format
from robust_moe_kernels.modules.expert_norms import ExpertBatchNorm2d, copies
from robust_moe_kernels.modules.experts import (
    Experts,
    engine_computes,
    engine_dtype,
    expect_plain_conv,
    geometry_of,
)
from robust_moe_kernels.modules.interception import Snapshot
from robust_moe_kernels.modules.probe import drawn_state, first_line, modes_kept
from robust_moe_kernels.modules.ranks import rank_count
from robust_moe_kernels.modules.reading import POOLING
from robust_moe_kernels.modules.routed_block import Layer, Plan, fold_norm, routed_block
from robust_moe_kernels.modules.stacks import Stack, guarded, overwrite, same, stacked, states, unchanged
from robust_moe_kernels.ops.routing import Route

__all__ = ["ResidualExperts"]

_PASSIVE = (nn.Identity, nn.ReLU)  # children that need no parameters: activations, and what timm leaves switched off
_POOLS = (nn.AvgPool2d, nn.Identity)
_NUMBERS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")  # of a norm


class FoldedNorm(NamedTuple):
    """The experts' batch norms of one layer, in evaluation, as a scale and a shift, and what they were made of."""

    scale: Tensor  # [E, O]
    shift: Tensor  # [E, O]
    numbers: list[Stack]  # weight, bias, running mean, running variance, and the number of batches
    states: list[Snapshot]  # of the numbers; a norm in training counts changes of the last alone
    eps: float

    @classmethod
    def of(cls, numbers: list[Stack], eps: float) -> Self:
        weight, bias, mean, variance, _ = (stack.whole() for stack in numbers)
        return cls(*fold_norm(weight, bias, mean, variance, eps), numbers, states(numbers), eps)

    def is_of(self, numbers: list[Stack], eps: float) -> bool:
        return eps == self.eps and same(numbers, self.numbers) and unchanged(numbers, self.states)


class Stages(NamedTuple):
    """A block as the engine reads it: for each layer, the skip's last if there is one, every expert's."""

    pools: nn.Module  # before the skip's convolution
    geometries: list[Geometry]
    norms: list[list[ExpertBatchNorm2d]]
    filters: list[Stack]
    numbers: list[list[Stack]]  # of each norm: weight, bias, running mean, running variance, number of batches
    trained: list[Stack]  # filters, then weight and bias of each norm

    def modes(self) -> list[bool] | None:
        """Whether each layer's norm is in training; None where the experts' are not in one mode."""
        found = [{norm.training for norm in norms} for norms in self.norms]
        return [mode.pop() for mode in found] if all(len(mode) == 1 for mode in found) else None


class ResidualExperts(Experts):
    """E residual blocks in place of one: torchvision's and timm's BasicBlock and Bottleneck, any stride, with or
    without downsampling (convolution and normalisation, after an average pool in timm's "d" variants).

    State: the blocks' own names after the expert's number, e.g. ``0.conv1.weight`` [O, I, 3, 3].

    Raises:
        ValueError: no blocks.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__(blocks)
        self.depth = _depth(self[0])
        # During an attack, each engine layer's batch norm; see ``attack_mode``.
        self.folded: list[FoldedNorm] | None = None

    @classmethod
    def of(cls, block: nn.Module, num_experts: int) -> Self:
        """Copies of a block.

        Whether a block really computes relu(bn2(conv2(relu(bn1(conv1(x))))) + skip(x)) cannot be read off its
        attributes (pre-activation blocks have the same), so both run on one random input and are compared.

        Raises:
            ValueError: a block that the engine does not compute: with other parts (squeeze-and-excitation, drop path,
                other activations or normalisations) or another order of computation.
        """
        _expect_block(block)
        _probe(block)
        return cls(copies(block, num_experts))

    @property
    def in_channels(self) -> int:
        first: Any = self[0]
        return first.conv1.in_channels

    def read(self, members: list[list[Any]]) -> Stages | None:
        """``None`` where the engine does not compute the blocks: biases, groups, a skip of another form, norms without
        parameters, statistics or a momentum."""
        layers: list[list[tuple[Any, Any]]] = []
        blocks = [block._modules for block, *_ in members]
        for number in range(1, self.depth + 1):
            layers.append([(block[f"conv{number}"], block[f"bn{number}"]) for block in blocks])
        skips: list[Any] = [block.get("downsample") for block in blocks]
        pools: nn.Module = nn.Identity()
        if isinstance(skips[0], nn.Sequential):
            *before, conv, norm = skips[0]
            kinds = [type(module) for module in before]
            if (type(conv), type(norm)) != (nn.Conv2d, ExpertBatchNorm2d) or any(kind not in _POOLS for kind in kinds):
                return None
            if any(len({_pooling(skip[i]) for skip in skips}) > 1 for i in range(len(before))):
                return None
            if before:
                pools = nn.Sequential(*before)
            layers.append([(skip[-2], skip[-1]) for skip in skips])
        convs = [[conv for conv, _ in layer] for layer in layers]
        norms = [[norm for _, norm in layer] for layer in layers]
        found = [geometry_of(layer) for layer in convs]
        geometries = [geometry for geometry in found if geometry is not None]
        if any(layer[0].bias is not None for layer in convs) or len(geometries) < len(found):
            return None
        if not all(map(_alike, norms)):
            return None
        filters = [Stack.of([conv.weight for conv in layer]) for layer in convs]
        numbers = [_numbers(layer) for layer in norms]
        if not all(stack.alike() for stack in (*filters, *(stack for layer in numbers for stack in layer))):
            return None
        trained = [*filters, *(stack for layer in numbers for stack in layer[:2])]
        return Stages(pools, geometries, norms, filters, numbers, trained)

    def on_engine(
        self, content: Stages, x: Tensor, route: Route, weights: Tensor, computed: Any = None
    ) -> Tensor | None:
        modes = content.modes()
        if modes is None or x.shape[0] == 0 or not engine_computes(x, (s.tensors[0] for s in content.trained)):
            return None
        fixed = []
        for geometry, (norm, *_), training in zip(content.geometries, content.norms, modes, strict=True):
            over_ranks = training and norm.over_ranks and rank_count() > 1
            fixed.append(Layer(geometry, norm.eps, float(norm.momentum or 0.0), training, over_ranks))
        count = len(fixed)
        plan = Plan(tuple(fixed), count > self.depth)
        dtype = engine_dtype(x)
        rows = guarded(x.to(dtype), content.filters)
        x_skip = None if type(content.pools) is nn.Identity else content.pools(rows)
        watched = [*content.filters, *(numbers[0] for numbers in content.numbers)]  # what a gradient is computed from
        stacks = stacked(content.trained, watched)
        filters = self.cast(content.filters, stacks[:count], dtype)
        tensors: list[Tensor | None] = []
        for i, (training, numbers) in enumerate(zip(modes, content.numbers, strict=True)):
            tables = (None, None) if training else self._tables(i, numbers, fixed[i].eps)
            moved = stacked(numbers[2:]) if tables[0] is None else [None] * 3
            tensors += [filters[i], *stacks[count + 2 * i : count + 2 * i + 2], *moved, *tables]
        weights = weights.to(torch.promote_types(dtype, torch.float32))  # a gate may compute in float64
        out, statistics = routed_block(rows, x_skip, weights, route, plan, tensors)
        if statistics:
            learning = [numbers[2:] for training, numbers in zip(modes, content.numbers, strict=True) if training]
            overwrite([s for each in learning for s in each], [value for moved in statistics for value in moved])
            self.folded = None  # of other statistics
        return out.contiguous(memory_format=dense_format(x))

    @torch.no_grad()
    def fold(self) -> list[FoldedNorm] | None:
        """Every layer's batch norm in evaluation; ``None`` where the engine does not compute the block."""
        content = self.content()
        if content is None or isinstance(content, str):
            return None
        pairs = zip(content.numbers, content.norms, strict=True)
        return [FoldedNorm.of(numbers, norms[0].eps) for numbers, norms in pairs]

    def _tables(self, i: int, numbers: list[Stack], eps: float) -> tuple[Tensor | None, Tensor | None]:
        """Layer i's folded norm, unless the norm was unfrozen since, or its numbers were replaced or changed. A
        compiled graph folds by itself: it could not tell."""
        if self.folded is None or torch.compiler.is_compiling():
            return None, None
        folded = self.folded[i]
        with torch._C.DisableTorchFunction():
            frozen = not any(stack.learns() for stack in numbers[:2])
            return (folded.scale, folded.shift) if frozen and folded.is_of(numbers, eps) else (None, None)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        self.folded = None  # of the numbers as they were
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        # A copy leads its own life: what was folded for the attack on this one would not follow its numbers.
        return {**super().__getstate__(), "folded": None}


def _alike(norms: list[nn.BatchNorm2d]) -> bool:
    """Whether the engine computes these norms, one of each expert, as one."""
    forms = {(norm.eps, norm.momentum) for norm in norms}
    whole = all(norm.track_running_stats and all(getattr(norm, n) is not None for n in _NUMBERS) for norm in norms)
    return len(forms) == 1 and norms[0].momentum is not None and whole


def _numbers(norms: Sequence[nn.BatchNorm2d]) -> list[Stack]:
    return [Stack.of([getattr(norm, name) for norm in norms]) for name in _NUMBERS]


def _pooling(module: nn.Module) -> tuple[Any, ...]:
    return tuple(getattr(module, name, None) for name in POOLING)


def _depth(block: nn.Module) -> int:
    """Convolutions of the main path: two in a BasicBlock, three in a Bottleneck."""
    return 3 if hasattr(block, "conv3") else 2


def _expect_block(block: nn.Module) -> None:
    expected = {f"{kind}{i}" for kind in ("conv", "bn") for i in range(1, _depth(block) + 1)}
    children = dict(block.named_children())
    if not expected <= children.keys():
        raise ValueError(
            "block: expected a BasicBlock or Bottleneck (conv1, bn1, conv2, bn2, ...), got"
            f" {type(block).__name__} with {', '.join(children) or 'no children'}"
        )
    for name, child in children.items():
        if name in expected:
            _expect_layer(child, name)
        elif name == "downsample":
            if not isinstance(child, nn.Identity | nn.Sequential):
                raise ValueError(f"block.downsample: expected a Sequential, got {type(child).__name__}")
            for part, module in child.named_children():
                if not isinstance(module, _POOLS):
                    _expect_layer(module, f"downsample.{part}")
        elif not isinstance(child, _PASSIVE):
            raise ValueError(
                f"block.{name}: expected a convolution, a batch norm, a downsample or a ReLU, got"
                f" {type(child).__name__}"
            )


def _expect_layer(module: nn.Module, name: str) -> None:
    if isinstance(module, nn.Conv2d):
        expect_plain_conv(module, f"block.{name}")
    elif isinstance(module, nn.BatchNorm2d):
        plain = type(module).forward is nn.BatchNorm2d.forward
        if not plain or not module.affine or not module.track_running_stats or module.momentum is None:
            raise ValueError(
                f"block.{name}: expected a BatchNorm2d with affine=True, track_running_stats=True and a numeric"
                f" momentum, got {type(module).__name__} with affine={module.affine},"
                f" track_running_stats={module.track_running_stats}, momentum={module.momentum}"
            )
    else:
        raise ValueError(f"block.{name}: expected Conv2d or BatchNorm2d, got {type(module).__name__}")


class _AsRead(nn.Module):
    """A block as the engine reads it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        children: dict[str, Any] = self.block._modules
        y = x
        for number in range(1, _depth(self.block) + 1):
            y = children[f"bn{number}"](children[f"conv{number}"](y if number == 1 else torch.relu(y)))
        skip = children.get("downsample")
        return torch.relu(y + (x if skip is None else skip(x)))


@torch.no_grad()
def _probe(block: nn.Module) -> None:
    """Refuse a block that computes something else than its parts suggest.

    Both run on parameters drawn for the purpose, of at least single precision: half precision would hide most
    differences. Eval mode; nothing of the block changes.
    """
    weight = block.get_parameter("conv1.weight")
    device, kind = weight.device, torch.promote_types(weight.dtype, torch.float32)
    if device.type == "meta":
        return
    generator = torch.Generator("cpu").manual_seed(0)
    state = drawn_state(block, device, kind, generator)
    first: Any = block.get_submodule("conv1")
    x = torch.randn(2, first.in_channels, 8, 8, generator=generator, device="cpu").to(device, kind)
    with modes_kept(block):
        try:
            wanted = functional_call(block.eval(), state, (x.clone(),))
            as_read = {f"block.{name}": value for name, value in state.items()}
            got = functional_call(_AsRead(block), as_read, (x.clone(),))
        except Exception as error:  # whatever a module of another kind makes of this input
            raise ValueError(f"block: {type(block).__name__} fails on a random input: {first_line(error)}") from error
    # Same operations in the same order: equal up to the library's choice of algorithm.
    bound = 1e3 * torch.finfo(kind).eps * got.abs().max().clamp_min(1.0)
    if not isinstance(wanted, Tensor) or wanted.shape != got.shape or not bool(((wanted - got).abs() <= bound).all()):
        raise ValueError(
            f"block: expected {type(block).__name__} to compute relu(bn(conv(... x)) + skip(x)); on a random input it"
            " computes something else (a pre-activation block?)"
        )
