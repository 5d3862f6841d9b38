"""How many kernels a GPU is asked to launch, counted without one.

A launch costs the host some microseconds and the GPU about one, whatever it computes: where maps are small, launches
and not arithmetic are what a step waits for. The count needs no arithmetic either. Tensors are fake: they have shapes
and no values. The package's ops run what they would run on a GPU, their Triton implementations, with a launcher that
counts and launches nothing; so the package's ops are entered, never counted as one. Every operation of PyTorch that
does not merely look at memory or allocate it counts as the launches that ``LAUNCHES`` says, one where it says nothing.

What that leaves open, a profiler on a GPU decides: a library may split a product's sum and add the parts, convert
layouts around a convolution, or do a batch norm in fewer kernels. Those entries of ``LAUNCHES`` are PyTorch's own CUDA
code as it reads, not measurements. ``Profiled`` counts what a GPU has run, in the same cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from robust_moe.attacks import losses
from robust_moe_kernels import operands
from robust_moe_kernels.dispatch import Op
from robust_moe_kernels.modules import experts, folded_conv, gates, norm_folding, norm_learning
from robust_moe_kernels.ops import OPS

__all__ = ["LAUNCHES", "Counted", "Launches", "Profiled"]

Counted = Counter[str]  # launches of each kernel, or operation of PyTorch, by name
Rule = Callable[[Any, tuple[Any, ...], Any], int]  # launches of a call, from the operation, its arguments and result

_CHUNK = 65536  # elements of one tensor that a block of a multi-tensor kernel takes
_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # tensors that fit one launch's arguments, by lists of tensors
_BLOCKS = 320  # blocks of one launch


def _multi_tensor(lists: list[list[Tensor]]) -> int:
    """Launches of a ``foreach`` or fused optimiser kernel (ATen/native/cuda/MultiTensorApply.cuh): a launch is full
    when its arguments hold no further tensor, or no further block of ``_CHUNK`` elements."""
    most = _TENSORS[min(len(lists), 5)]
    launches = tensors = blocks = 0
    sizes = [tensor.numel() for tensor in lists[0] if tensor.numel()]
    for number, size in enumerate(sizes):
        tensors += 1
        chunks = -(-size // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == _BLOCKS or (tensors == most and last):
                launches, blocks = launches + 1, 0
                tensors = 0 if last else 1
        if number == len(sizes) - 1 and blocks:
            launches += 1
    return launches


def _foreach(func: Any, args: tuple[Any, ...], out: Any) -> int:
    lists = [value for value in args if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor)]
    written = isinstance(out, list | tuple) and bool(out) and out[0] is not lists[0][0]
    return _multi_tensor(lists + ([list(out)] if written else []))


def _convolution_backward(func: Any, args: tuple[Any, ...], out: Any) -> int:
    return sum(args[-1])  # a kernel each for the input's gradient, the filters' and the bias's


def _norm_forward(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """cuDNN's in one kernel, but not for bfloat16: there the sums, the running statistics and the map."""
    training = args[5] if len(args) > 7 else False  # without: the operation for evaluation
    return 3 if training and args[0].dtype == torch.bfloat16 else 1


def _norm_backward(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """As forward; in bfloat16, and for weights in evaluation, the sums and the map."""
    training, mask = args[7], args[9]
    sums = args[1].dtype == torch.bfloat16 if training else mask[1] or mask[2]
    return 2 if sums else 1


def _same(count: int) -> Rule:
    return lambda func, args, out: count


LAUNCHES: dict[str, Rule] = {
    "aten::convolution": lambda func, args, out: 1 + (args[2] is not None),  # cuDNN's path adds a bias afterwards
    "aten::convolution_backward": _convolution_backward,
    "aten::_native_batch_norm_legit": _norm_forward,
    "aten::_native_batch_norm_legit_no_training": _norm_forward,
    "aten::native_batch_norm": _norm_forward,
    "aten::native_batch_norm_backward": _norm_backward,
    "aten::nll_loss_backward": _same(2),  # the gradient is filled with zeros first
    "aten::_fused_sgd_": lambda func, args, out: _multi_tensor([lists for lists in args[:3] if lists]),
    "aten::_foreach_norm": lambda func, args, out: _multi_tensor([args[0]]) + 1,  # the chunks' norms, and their sum
    "aten::cat": lambda func, args, out: -(-len(args[0]) // 128),  # batched copies of up to 128 tensors
}
# Memory that is handed out, and looked at in another shape.
_NOTHING = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::as_strided_",
}  # fmt: skip


class _Operations(TorchDispatchMode):
    """Counts PyTorch's operations; the package's own and those that PyTorch composes of others are entered."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "robust_moe_kernels":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if func.namespace in ("prim", "profiler"):  # questions that the host answers, and its own marks
            return func(*args, **kwargs)
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        name = func.name().split(".")[0]
        if name == "aten::_local_scalar_dense":
            return 0  # a CPU op looks whether a gate or a route is valid; on a GPU none reads a value
        out = func(*args, **kwargs)
        if not (func.is_view or name in _NOTHING):
            rule = LAUNCHES.get(name) or (_foreach if name.startswith("aten::_foreach_") else _same(1))
            self.counted[name.removeprefix("aten::")] += rule(func, args, out)
        return out


class Launches:
    """``with Launches() as launches``: the ops run as on a GPU, on fake tensors, in what is called inside.

    ``take()`` returns the launches since it was last called.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.counted: Counted = Counter()

    def take(self) -> Counted:
        found = Counter(self.counted)
        self.counted.clear()
        return found

    def module(self, build: Callable[[torch.device], nn.Module]) -> nn.Module:
        """What ``build`` makes for a device, with parameters that have shapes and no values, channels-last."""
        with _disable_current_modes(), torch.device("meta"):
            module = build(torch.device("meta")).to(memory_format=torch.channels_last)
        return module.to_empty(device="cpu")

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of zeros."""
        return torch.zeros(shape, dtype=dtype)

    def __enter__(self) -> Launches:
        self._stack = ExitStack()
        self._stack.enter_context(_triton_everywhere(self.counted))
        self._stack.enter_context(mock.patch.object(operands, "readable", lambda tensor: False))  # as on a GPU
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(_Operations(self.counted))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


@contextmanager
def _triton_everywhere(counted: Counted) -> Iterator[None]:
    """On the CPU as on a GPU: every op by Triton (the routing sort, native there, is one kernel either way), launched
    by a driver that counts, and nothing that is done on a CPU only."""
    from triton.runtime.jit import KernelInterface

    from robust_moe_kernels.ops.expert_conv import triton_impl as conv
    from robust_moe_kernels.ops.expert_mlp import triton_impl as mlp

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        def count(*args: Any, **kwargs: Any) -> None:
            size = grid(kwargs) if callable(grid) else grid
            if all(size):
                counted[kernel.__name__] += 1

        return count

    why_not = Op.why_not
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(KernelInterface, "__getitem__", launch))
        enter(
            mock.patch.object(Op, "why_not", lambda op, impl, on: None if impl == "triton" else why_not(op, impl, on))
        )
        for op in OPS.values():
            enter(mock.patch.dict(op._order, cpu=("triton", "reference")))
        for products in (conv, mlp):
            enter(mock.patch.object(products, "why_not_case", _any_half_or_single))
        enter(mock.patch.object(folded_conv, "fuses", lambda *_: "kernel"))
        for module in (
            norm_folding,
            norm_learning,
        ):  # fake tensors are of a class of their own, and no other operations
            enter(mock.patch.object(module, "is_plain", lambda tensor: isinstance(tensor, Tensor)))
        for module in (gates, losses):
            enter(mock.patch.object(module, "FUSED", {*module.FUSED, "cpu"}))
        enter(mock.patch.dict(experts._ENGINE, cpu=("triton", experts._ENGINE["cuda"][1])))
        yield


def _any_half_or_single(*operands: Tensor) -> str | None:
    """bfloat16 too, which Triton's interpreter, alone of all, cannot multiply."""
    kinds = {tensor.dtype for tensor in operands}
    return None if len(kinds) == 1 and torch.float64 not in kinds else "float64, or two dtypes"


class Profiled:
    """``with Profiled(device) as launches``: as :class:`Launches`, but everything runs on that GPU, and what a profiler
    saw there is counted: kernels, and memory that was set or copied by the driver."""

    activity = torch.profiler.ProfilerActivity.CUDA
    where = torch.autograd.DeviceType.CUDA

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(self) -> Counted:
        torch.cuda.synchronize(self.device)
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        self._start()
        return Counter(event.name() for event in events if event.device_type() == self.where)

    def _start(self) -> None:
        self._profile = torch.profiler.profile(activities=[self.activity])
        self._profile.__enter__()

    def __enter__(self) -> Profiled:
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(None, None, None)

    def module(self, build: Callable[[torch.device], nn.Module]) -> nn.Module:
        """What ``build`` makes for a device, on the GPU, channels-last."""
        return build(self.device).to(self.device, memory_format=torch.channels_last)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor of zeros."""
        return torch.zeros(shape, dtype=dtype, device=self.device)
