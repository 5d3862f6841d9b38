"""What a block of any kind maps, found by running a copy of it on random maps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust_moe_kernels.modules.probe import drawn_state, first_line
from robust_moe_kernels.modules.routed_layer import MoELayer
from robust_moe_kernels.modules.walk import modules_of, parameters_of, tensors_of

__all__ = ["BlockForm", "block_form", "expect_ready"]

# Height and width of the maps. Most blocks take any; one that mixes positions by a table takes those of its own size.
_SIZES = (8, 7, 14, 16, 28, 32, 4, 56, 64)
# Of a map alone beside the same in a batch: libraries choose other algorithms for another number of maps, in TF32 too,
# and a block that divides by that number is off by half.
_ALONE = 1e-2
_CHANNELS = ("in_channels", "num_features", "num_channels", "in_features")  # of layers that say what they take


class BlockForm(NamedTuple):
    """What a block takes and does to it."""

    in_channels: int
    writes: bool  # into its input, as a first activation in place does


def expect_ready(block: nn.Module) -> None:
    """Raise ValueError for a module with lazy parameters that are not initialised yet, or with mixtures inside."""
    parts, kind = modules_of(block), type(block).__name__
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors_of(parts)):
        raise ValueError(
            f"block: expected parameters with numbers, got {kind} with lazy ones, which a first forward makes: run the"
            " model once before"
        )
    if any(isinstance(part, MoELayer) for part in parts):
        # An expert without rows would leave the layers inside of it without a record.
        raise ValueError(f"block: expected a module without mixture-of-experts layers of its own, got {kind}")


def block_form(block: nn.Module) -> BlockForm:
    """What a block [B, C, H, W] -> [B, C', H', W'] takes.

    A copy runs in evaluation, on the block's device, in its dtype or float32 if that has fewer bits; on numbers drawn
    for the purpose (a branch behind a norm that starts at zero would not be seen) or, where these give no finite map,
    on the block's own. Neither the block nor a random generator changes.

    Raises:
        ValueError: a module without parameters, or that cannot be copied; one that does not map a batch of maps to a
            tensor of as many maps; one whose output for a map depends on the others in its batch, or on chance;
            ``SyncBatchNorm``.
    """
    kind = type(block).__name__
    weight = next((p for p in parameters_of(modules_of(block)) if p.is_floating_point()), None)
    if weight is None:
        raise ValueError(
            f"block: expected a module with parameters, for experts that differ, got {kind} with"
            f" {', '.join(name for name, _ in block.named_children()) or 'no children'}"
        )
    if any(isinstance(part, nn.SyncBatchNorm) for part in modules_of(block)):
        raise ValueError(
            f"block: expected norms that wait for no other process, where an expert may have no rows, got {kind} with"
            " SyncBatchNorm"
        )
    failures: list[str] = []
    devices = [weight.device] if weight.device.type == "cuda" else []
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for drawn in (True, False):
            probe = _probe_of(block, weight.device, dtype, drawn)
            for channels in _candidates(probe):
                for size in _SIZES:
                    if channels == size:  # a layer of the last dimension would do too
                        continue
                    found = _found(probe, torch.Size((channels, size, size)), weight.device, dtype)
                    if isinstance(found, BlockForm):
                        return found
                    failures.append(found)
    raise _refusal(block, failures[0] if failures else "has no layer that says what it takes")


def _refusal(block: nn.Module, how: str) -> ValueError:
    expected = "a module that maps [B, C, H, W] to [B, C', H', W'], each map by itself in evaluation"
    return ValueError(f"block: expected {expected}, got {type(block).__name__} that {how}")


def _probe_of(block: nn.Module, device: torch.device, dtype: torch.dtype, drawn: bool) -> nn.Module:
    try:
        probe = copy.deepcopy(block).eval().to(dtype=dtype)
    except Exception as error:  # whatever copying such a module raises
        raise ValueError(
            f"block: expected a module that can be copied, got {type(block).__name__}: {first_line(error)}"
        ) from error
    if drawn:
        generator = torch.Generator("cpu").manual_seed(0)
        state = probe.state_dict()
        for name, value in drawn_state(probe, device, dtype, generator).items():
            state[name].copy_(value)
    return probe


def _candidates(block: nn.Module) -> list[int]:
    """Numbers of channels that the block may take: what its layers say that they take, in their order; then any
    dimension of a parameter."""

    def numbers() -> Iterator[Any]:
        parts = modules_of(block)
        for part in parts:
            yield from (getattr(part, name, None) for name in _CHANNELS)
            if isinstance(part, nn.LayerNorm):
                yield part.normalized_shape[-1]
        for parameter in parameters_of(parts):
            yield from parameter.shape

    return list(dict.fromkeys(number for number in numbers() if type(number) is int and number > 0))


def _found(probe: nn.Module, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> BlockForm | str:
    """What the block does with maps of that shape [C, H, W]; or how it fails, to follow "a block that". Raises
    ValueError where it does not treat each map by itself, which other numbers might hide."""
    generator = torch.Generator("cpu").manual_seed(1)
    maps = torch.randn(3, *shape, generator=generator, device="cpu").to(device, dtype)
    one, other, third = maps.split(1)
    outputs: list[Tensor] = []
    writes = False
    for x in (torch.cat([one, other]), torch.cat([one, third]), one):
        given = x.clone()
        try:
            out = probe(given)
        except Exception as error:  # whatever a module of another kind makes of this input
            return f"fails on {list(x.shape)}: {first_line(error)}"
        if not isinstance(out, Tensor):
            return f"returns {type(out).__name__}"
        if out.dim() != 4 or len(out) != len(x) or (outputs and out.shape[1:] != outputs[0].shape[1:]):
            return f"returns {list(out.shape)} for {list(x.shape)}"
        outputs.append(out)
        writes = writes or (device.type != "meta" and not torch.equal(given, x))
    if device.type != "meta":
        wanted, beside_third, alone = (out[:1] for out in outputs)
        if not bool(wanted.isfinite().all()):
            return "returns no finite numbers for random ones"
        for got, bound in ((beside_third, 1e3 * torch.finfo(wanted.dtype).eps), (alone, _ALONE)):
            if not bool(((got - wanted).abs() <= bound * wanted.abs().max().clamp_min(1.0)).all()):
                how = "returns for a map what depends on the others of its batch, or on chance, in evaluation too"
                raise _refusal(probe, how)
    return BlockForm(shape[0], writes)
