"""Of part 9: a folded convolution of an attack with its shift, addition and ReLU. By a convolution and this package's
kernel; by one call of cuDNN (``robust_moe_kernels.modules.cudnn_relu``); by PyTorch's operations. Each is
compared with float64, values and gradients, before it is timed, and is then given a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_campaign.conv_cases import precision
from benchmarks.gpu_campaign.record import Record
from benchmarks.gpu_campaign.timing import compare_captured
from robust_moe.benchmarks.baselines import first_line
from robust_moe_kernels.modules import cudnn_relu
from robust_moe_kernels.modules.folded_conv import Call, FoldedConv, Norm

__all__ = ["KERNEL", "LIBRARY", "PLAIN", "epilogues"]

KERNEL, LIBRARY, PLAIN = "kernel", "cudnn", "plain"
SECONDS = 2.0  # that a case may take
CALL = Call((1, 1), (1, 1), (1, 1), 1)

Way = Callable[[Tensor, Tensor | None], Tensor]  # of x and what is added: relu(conv(x) + shift + other)


class _Operands(NamedTuple):
    """x and other [B, C, size, size], channels-last; the convolution and its filters and shift, C to C channels."""

    x: Tensor
    other: Tensor | None
    conv: FoldedConv

    @classmethod
    def of(
        cls, batch: int, channels: int, size: int, added: bool, dtype: torch.dtype, device: torch.device
    ) -> _Operands:
        torch.manual_seed(0)

        def maps() -> Tensor:
            tensor = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
            return tensor.to(memory_format=torch.channels_last)

        weight = torch.randn(channels, channels, 3, 3, device=device) / (9 * channels) ** 0.5
        numbers = [torch.rand(channels, device=device) + 0.5 for _ in range(3)]
        norm = Norm(torch.zeros(channels, device=device), *numbers, 1e-5)
        conv = FoldedConv(weight.to(memory_format=torch.channels_last), None, norm)
        return cls(maps(), maps() if added else None, conv)

    def ways(self) -> dict[str, Way]:
        dtype = self.x.dtype

        def folded(library: bool) -> Way:
            def run(x: Tensor, other: Tensor | None) -> Tensor:
                with mock.patch.object(cudnn_relu, "ENABLED", library):
                    return self.conv(x, other, True, CALL, dtype)

            return run

        def plain(x: Tensor, other: Tensor | None) -> Tensor:
            out = torch.conv2d(x, *self.conv.tensors(dtype), *CALL)
            return (out if other is None else out.add_(other)).relu_()

        ways = {KERNEL: folded(False), PLAIN: plain}
        with mock.patch.object(cudnn_relu, "ENABLED", True):
            takes = cudnn_relu.takes(self.x, self.conv.tensors(dtype)[0], CALL.groups)
        return ways | ({LIBRARY: folded(True)} if takes else {})


def epilogues(record: Record) -> str:
    """Times every way at the sizes of layer2 and layer4; what was found in a sentence."""
    ratios, lost = [], []
    sizes = ((4, 8, 4),) if record.dry else ((640, 128, 16), (640, 512, 4))
    for mode, (batch, channels, size), added in product(("bf16", "tf32"), sizes, (False, True)):
        case = {"op": "conv, shift, ReLU", "mode": mode, "B": batch, "C": channels, "size": size, "added": added}
        if record.out_of_time(SECONDS, str(case)):
            break
        with precision(mode) as dtype:
            operands = _Operands.of(batch, channels, size, added, dtype, record.device)
            ways = _right(record, case, operands)
            runs = {name: partial(_run, way, operands) for name, way in ways.items()}
            with torch.no_grad():
                rows = compare_captured(case, runs, record.device, 1 if record.dry else 7) if runs else []
        times = {}
        for row in rows:
            row["keeps_nan"] = _keeps_nan(operands, ways[row["variant"]])
            times[row["variant"]] = row["median_ms"]
            record.row(**row)
        if times.keys() >= {KERNEL, LIBRARY}:
            ratios.append(times[KERNEL] / times[LIBRARY])
            lost += [mode for row in rows if row["variant"] == LIBRARY and not row["keeps_nan"]]
    if not ratios:
        return "cuDNN's convolution with a ReLU was not timed"
    found = f"cuDNN's convolution with a ReLU {min(ratios):.2f} to {max(ratios):.2f}x the speed of conv + kernel"
    return found + (f", but it loses NaN ({', '.join(sorted(set(lost)))})" if lost else ", and it keeps NaN")


def _run(way: Way, operands: _Operands, _: int) -> Tensor:
    return way(operands.x, operands.other)


def _right(record: Record, case: dict[str, object], operands: _Operands) -> dict[str, Way]:
    """The ways whose values and gradients are as near to float64 as PyTorch's, by twice its largest error."""
    ways = operands.ways()
    others = None if operands.other is None else operands.other.double()
    weight, shift = operands.conv.tensors(operands.x.dtype)
    truth = _both(lambda x, other: _reference(x, other, weight.double(), shift.double()), operands.x.double(), others)
    found, bounds = {}, [0.0] * len(truth)
    for name in sorted(ways, key=lambda name: name != PLAIN):
        try:
            errors = [
                ((a.double() - b).abs().max() / b.abs().max()).item()
                for a, b in zip(_both(ways[name], operands.x, operands.other), truth, strict=True)
            ]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no engine for the pattern
            record.say(f"{case} {name}: left out, {first_line(error)}")
            continue
        if name == PLAIN:
            bounds = [2 * error + torch.finfo(operands.x.dtype).eps for error in errors]
        if all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
            found[name] = ways[name]
        else:
            record.say(f"{case} {name}: left out, errors of values and gradients {errors}, expected at most {bounds}")
    return found


def _reference(x: Tensor, other: Tensor | None, weight: Tensor, shift: Tensor) -> Tensor:
    out = torch.conv2d(x, weight, shift, *CALL)
    return (out if other is None else out + other).relu()


def _both(way: Way, x: Tensor, other: Tensor | None) -> tuple[Tensor, ...]:
    """Values, and the gradients of their sum weighted by position to x and other."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, other) if tensor is not None]
    out = way(inputs[0], inputs[1] if other is not None else None)
    weights = torch.arange(out.shape[1], device=out.device).sin().to(out.dtype)[:, None, None].expand_as(out)
    return out.detach(), *torch.autograd.grad(out, inputs, weights)


def _keeps_nan(operands: _Operands, way: Way) -> bool:
    """Whether a NaN among the inputs is in the output, in all channels of its pixel."""
    x = operands.x.clone()
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        return bool(way(x, operands.other)[0, :, 0, 0].isnan().all())
