"""How many kernels a GPU is asked to launch, counted without one.

A launch costs the host some microseconds and the GPU about one, whatever it computes: where maps are small, launches
and not arithmetic are what a step waits for. The count needs no arithmetic either. Tensors are fake: they have shapes
and no values. The package's ops run what they would run on a GPU, their Triton implementations, with a launcher that
counts and launches nothing; so the package's ops are entered, never counted as one. Every operation of PyTorch that
does not merely look at memory or allocate it counts as the launches that ``LAUNCHES`` says, one where it says nothing.

What that leaves open, a profiler on a GPU decides: a library may split a product's sum and add the parts, convert
layouts around a convolution, or do a batch norm in fewer kernels. Those entries of ``LAUNCHES`` are PyTorch's own CUDA
code as it reads, not measurements.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.layer_case import Case
from robust_moe.attacks import attack_mode
from robust_moe.attacks.passes import Passes
from robust_moe.config import AttackConfig, MethodConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from robust_moe.data import Batch
from robust_moe.engine.optimizers import build_optimizer
from robust_moe.methods import PGDAdversarialTraining
from robust_moe.models import build_model
from robust_moe.provenance import provenance
from robust_moe_kernels.dispatch import Op
from robust_moe_kernels.modules import experts, folded_conv
from robust_moe_kernels.ops import OPS

__all__ = ["CASES", "Counted", "Launches", "count", "main"]

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

    ``counted`` holds the launches since it was last emptied; ``take()`` returns it and starts again.
    """

    def __init__(self) -> None:
        self.counted: Counted = Counter()

    def take(self) -> Counted:
        found = Counter(self.counted)
        self.counted.clear()
        return found

    def __enter__(self) -> Launches:
        self._stack = ExitStack()
        self._stack.enter_context(_triton_everywhere(self.counted))
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(_Operations(self.counted))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


@contextmanager
def _triton_everywhere(counted: Counted) -> Iterator[None]:
    """On the CPU as on a GPU: every op by Triton (the routing sort, native there, is one kernel either way), launched
    by a driver that counts."""
    from triton.runtime.jit import KernelInterface

    from robust_moe_kernels.ops.expert_conv import triton_impl

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
        enter(mock.patch.object(triton_impl, "why_not_case", _any_half_or_single))
        enter(mock.patch.object(folded_conv, "fuses", lambda *_: "kernel"))
        enter(mock.patch.dict(experts._ENGINE, cpu=("triton", experts._ENGINE["cuda"][1])))
        Op.choose.cache_clear()
        stack.callback(Op.choose.cache_clear)
        yield


def _any_half_or_single(x: Tensor, weight: Tensor) -> str | None:
    """bfloat16 too, which Triton's interpreter, alone of all, cannot multiply."""
    return None if x.dtype == weight.dtype != torch.float64 else "float64, or two dtypes"


def _made(build: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters have shapes and no values, in the memory format a GPU prefers."""
    with _disable_current_modes(), torch.device("meta"):
        module = build().to(memory_format=torch.channels_last)
    return module.to_empty(device="cpu")


def _images(*shape: int) -> Tensor:
    return torch.empty(shape, memory_format=torch.channels_last)


def layer_in_attack(launches: Launches, case: Case) -> dict[str, Counted]:
    """The second pass of an attack: what is done once an attack is done."""
    layer = _made(lambda: case.layer(torch.device("meta")))
    with attack_mode(layer):
        for _ in range(2):
            x = _images(case.batch, case.channels, case.size, case.size).requires_grad_()
            launches.take()
            y = layer(x)
            forward = launches.take()
            torch.autograd.grad(y, x, torch.empty_like(y))
    return {"layer in an attack, forward": forward, "layer in an attack, forward + dx": forward + launches.take()}


def layer_in_training(launches: Launches, case: Case) -> dict[str, Counted]:
    """Training mode, all gradients; without an optimiser and a balance loss."""
    layer = _made(lambda: case.layer(torch.device("meta"))).train()
    x = _images(case.batch, case.channels, case.size, case.size).requires_grad_()
    launches.take()
    y = layer(x)
    forward = launches.take()
    torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y))
    return {"layer in training, forward": forward, "layer in training, forward + backward": forward + launches.take()}


def whole_step(launches: Launches, case: Case) -> dict[str, Counted]:
    """ResNet-18 for 32x32 images whose layer4.1 is the routed layer, by the trainer's own method and optimiser."""
    moe = MoEConfig(layers=["layer4.1"], num_experts=case.experts, top_k=case.top_k, balance="none")
    attack = AttackConfig(eps="8/255", alpha="2/255", steps=1)
    config = TrainConfig(model=ModelConfig(name="resnet18", moe=moe), method=MethodConfig(attack=attack))
    model = _made(lambda: build_model(config.model, num_classes=10, channels=3, image_size=32)).train()
    method = PGDAdversarialTraining(config)
    images = _images(case.batch, 3, 32, 32)
    batch = Batch(images, torch.zeros(case.batch, dtype=torch.int64), torch.arange(case.batch))
    with attack_mode(model):
        passes, x = Passes(method.attack, model, batch.labels, -1), images
        for _ in range(2):
            launches.take()
            x = method.attack.step(x, passes.examine(x).grad, images)
    step = launches.take()
    optimizer = build_optimizer(model, OptimConfig())
    for _ in range(2):  # the first allocates the momentum
        launches.take()
        loss, _ = method.classify(model, model, images, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"PGD step": step, "training pass": launches.take()}


CASES = (layer_in_attack, layer_in_training, whole_step)


def count(autocast: bool = False, case: Case | None = None) -> dict[str, Counted]:
    """Launches of every case, by kernel. ``autocast``: with bfloat16 convolutions and products."""
    found = {}
    with Launches() as launches, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for run in CASES:
            found |= run(launches, case or Case())
    return found


def main(arguments: list[str]) -> None:
    """Counts and prints the launches of every case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=4, help="E (4)")
    parser.add_argument("--batch", type=int, default=128, help="images (128)")
    parser.add_argument("--autocast", action="store_true", help="with bfloat16 convolutions and products")
    parser.add_argument("--out", type=Path, help="folder for launches.json; without it nothing is written")
    options = parser.parse_args(arguments)
    case = Case(experts=options.experts, batch=options.batch)
    found = count(options.autocast, case)
    for name, counted in found.items():
        print(f"\n{name}: {counted.total()}")
        for kernel, launches in counted.most_common():
            print(f"  {launches:4}  {kernel}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "launches.json"
        about = {"benchmark": "launches", **provenance(torch.device("cpu")), "autocast": options.autocast}
        rows = [
            {"case": case.describe(name), "launches": counted.total(), "kernels": dict(counted.most_common())}
            for name, counted in found.items()
        ]
        path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {path}")
