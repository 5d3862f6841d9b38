"""Models with engine layers: one graph under torch.compile, and nothing that the host reads from a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from robust_moe_kernels import FusedBlockMoE, FusedConvMoE
from robust_moe_kernels.modules import attack_mode, routed_block
from robust_moe_kernels.modules.casts import CastFilters
from robust_moe_kernels.modules.experts import _ENGINE, _runs, engine_computes
from robust_moe_kernels.ops import OPS
from robust_moe_kernels.ops.expert_conv import EXPERT_CONV


def network() -> nn.Sequential:
    """A convolution, a block, and a block with stride and downsample: every path through the engine."""
    skip = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    torch.manual_seed(0)
    return nn.Sequential(
        FusedConvMoE.from_conv(nn.Conv2d(3, 8, 3, padding=1), noise_std=0.0),
        FusedBlockMoE.from_block(BasicBlock(8, 8)),
        FusedBlockMoE.from_block(Bottleneck(8, 4, 2, skip)),
    )


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Loss, its gradients, and what the model's buffers became."""
    loss = model(x).square().mean()
    gradients = torch.autograd.grad(loss, (x, *model[-1].parameters()))
    return (loss.detach(), *gradients, *(buffer.detach().clone() for buffer in model.buffers()))


def test_what_runs_is_a_constant_to_the_compiler():
    """The mark that is put there by hand is what PyTorch's own decorator leaves."""
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(marked) and vars(marked).items() <= vars(_runs).items()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiles_into_one_graph(training):
    """The same step as without, traced once: aot_eager runs the same kernels, so the same bits."""
    assert EXPERT_CONV.why_not("native", "cpu") is None
    plain = network().train(training)
    compiled = copy.deepcopy(plain)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(6, 3, 8, 8)
        expected = step(plain, x.clone().requires_grad_())
        loss = function(x.requires_grad_()).square().mean()
        gradients = torch.autograd.grad(loss, (x, *compiled[-1].parameters()))
        actual = (loss.detach(), *gradients, *(buffer.detach() for buffer in compiled.buffers()))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    image = mode.from_tensor(value.detach())
    with mode:
        moved = image.to("cuda")
        return nn.Parameter(moved) if isinstance(value, nn.Parameter) else moved


def on_fake_gpu(mode: FakeTensorMode, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with tensors that have shapes and a device, and no values."""
    model = model.to(dtype)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            store.update({name: value if value is None else fake(mode, value) for name, value in store.items()})
    return model


@contextmanager
def cuda_autocast(enabled: bool) -> Iterator[None]:
    """bfloat16 autocast; ``torch.autocast`` refuses where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_the_host_reads_nothing_from_a_gpu(dtype, training, monkeypatch):
    """Forward from gate to combine, and the blocks' backward: whatever needs a value on the host raises."""
    pytest.importorskip("triton", reason="the engine on a GPU is Triton's")
    blocks = []  # (context, gradient of the output): autograd itself does not run on fake CUDA tensors

    def apply(*arguments: object) -> tuple[Tensor, ...]:
        ignored = dict.fromkeys(("mark_non_differentiable", "set_materialize_grads"), lambda *_: None)
        context = SimpleNamespace(saved_tensors=(), **ignored)
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        context.needs_input_grad = [isinstance(argument, Tensor) for argument in arguments]
        out, *rest = routed_block._RoutedBlock.forward(context, *arguments)
        blocks.append((context, torch.randn_like(out)))
        return out, *rest

    h100 = SimpleNamespace(shared_memory_per_block_optin=232448, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)  # asked of the driver, not of the GPU
    monkeypatch.setattr(routed_block._RoutedBlock, "apply", apply)
    autocast = dtype == "autocast"
    kind = torch.float32 if autocast else dtype
    mode = FakeTensorMode()
    model = on_fake_gpu(mode, network(), kind).train(training)
    with mode, torch.no_grad(), cuda_autocast(autocast):
        x = torch.randn(6, 3, 8, 8, device="cuda", dtype=kind)
        assert all(engine_computes(x, layer.experts.parameters()) for layer in model)
        out = model(x)
        assert (out.device.type, out.dtype) == ("cuda", torch.bfloat16 if autocast else dtype)
        with pytest.raises(DataDependentOutputException):
            out[0, 0, 0, 0].item()
    assert len(blocks) == 2
    for context, d_out in blocks:
        with mode, torch.no_grad():
            gradients = routed_block.Backward(context).run(d_out)
        wanted = {type(argument) for argument in gradients if argument is not None}
        assert wanted
        assert all(gradient.device.type == "cuda" for gradient in gradients if gradient is not None)


@pytest.fixture
def prefer(monkeypatch) -> Callable[[str], None]:
    """``prefer("triton")``: what "auto" means on the CPU, as it would be on a GPU."""

    def put_first(impl: str) -> None:
        for op in OPS.values():
            order = tuple(dict.fromkeys((impl, *op.order("cpu"))))
            monkeypatch.setitem(op._order, "cpu", tuple(name for name in order if op.why_not(name, "cpu") is None))

    return put_first


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are not in the interpreter")
def test_filters_are_cast_once_an_attack_unless_they_change(prefer, monkeypatch):
    """Under autocast, by Triton's kernels: what an attack on other numbers gives is what a new attack gives."""
    monkeypatch.setitem(_ENGINE, "cpu", ("triton", (torch.float32, torch.float16)))
    prefer("triton")
    layer = network()[1]
    casts = []
    monkeypatch.setattr(CastFilters, "is_of", counting(casts, CastFilters.is_of))
    x = torch.randn(4, 8, 4, 4)

    def change(weight: Tensor) -> None:
        with torch.no_grad():
            weight.mul_(1.5)

    def replace(weight: Tensor) -> None:
        layer.experts[1].conv1.weight = nn.Parameter(weight.detach() * 0.5, requires_grad=False)

    with torch.autocast("cpu", torch.float16):
        before = None
        for alter in (lambda _: None, change, replace):
            with attack_mode(layer):
                if before is not None:
                    assert torch.equal(layer(x), before)  # fills the attack's copies
                alter(layer.experts[1].conv1.weight)
                found = [layer(x) for _ in range(2)]
            with attack_mode(layer):
                anew = layer(x)
            assert anew.dtype == torch.float16
            assert torch.equal(found[0], anew)
            assert torch.equal(found[1], anew)
            assert before is None or not torch.equal(anew, before)
            before = anew
    # All filters, in every forward but an attack's first: found as they were, but once where one was altered.
    assert casts.count(False) == 2
    assert casts.count(True) == 1 + 1 + 1


def counting(answers: list[bool], method: Callable[..., bool]) -> Callable[..., bool]:
    def asked(*arguments: object) -> bool:
        answers.append(method(*arguments))
        return answers[-1]

    return asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are not in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_block_of_triton_kernels(dtype, prefer, monkeypatch):
    """All of a GPU's kernels together, in the interpreter: a step as accurate as that of PyTorch's own operations in
    the same dtype, against float64."""
    if dtype == torch.float16:
        monkeypatch.setitem(_ENGINE, "cpu", ("native", (torch.float32, torch.float16)))
    block = network()[2]
    for name, buffer in block.named_buffers():
        buffer.fill_(0.5 if name.endswith("running_mean") else 1.0) if buffer.is_floating_point() else None
    x = torch.randn(4, 8, 4, 4, dtype=torch.float64)

    def run(impl: str | None, kind: torch.dtype) -> list[Tensor]:
        model = copy.deepcopy(block).to(kind)
        model.gate.float()  # the same routes in every precision
        if impl is not None:
            prefer(impl)
        assert engine_computes(x.to(kind), model.experts.parameters()) == (kind != torch.float64)
        out = model(x.to(kind))
        return [tensor.double() for tensor in (out, *torch.autograd.grad(out.sum(), [*model.experts.parameters()]))]

    truth = run(None, torch.float64)
    errors = {
        impl: [(a - b).norm() / b.norm().clamp_min(1e-6) for a, b in zip(run(impl, dtype), truth, strict=True)]
        for impl in ("reference", "triton")
    }
    for own, theirs in zip(errors["triton"], errors["reference"], strict=True):
        assert own <= 2 * theirs + 4 * torch.finfo(dtype).eps
