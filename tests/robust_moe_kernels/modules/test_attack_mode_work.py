"""What an attack computes, reads on the host and saves: input gradients alone."""

from __future__ import annotations

import pytest
import torch
from attack_models import images, network, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robust_moe_kernels.modules import attack_mode
from robust_moe_kernels.modules.experts import Experts

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Operations(TorchDispatchMode):
    """What ran: names, outputs that are new memory of a weight's shape, and weight gradients asked of a library."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.weight_shaped: list[str] = []
        self.asked: list[str] = []
        weights = [weight for weight in model.parameters() if weight.dim() >= 2]
        self.shapes = {shape for weight in weights for shape in (weight.shape, weight.shape[::-1])}
        count = {len(module) for module in model.modules() if isinstance(module, Experts)}
        self.shapes |= {torch.Size((e, *weight.shape)) for e in count for weight in weights if weight.dim() == 4}
        own = (*model.parameters(), *model.buffers())
        self.storages = {tensor.untyped_storage().data_ptr() for tensor in own}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.names.add(name)
        if name.endswith("_backward") and args and isinstance(args[-1], list) and len(args[-1]) == 3:
            mask = args[-1]  # input, weight, bias: of convolutions and batch norms alike
            if mask[1] or mask[2]:
                self.asked.append(name)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            fresh = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.storages
            if fresh and tensor.shape in self.shapes:
                self.weight_shaped.append(name)
        return out


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_whole_model_computes_input_gradients_only(mode):
    model = network().to(memory_format=torch.channels_last)  # the format of folded filters: none is converted
    engine = {f"robust_moe_kernels::expert_conv_{kind}" for kind in ("forward", "dgrad")}
    x = images(7)  # no logits of the shape of a gate's weights
    with attack_mode(model, mode):
        step(model, x)  # the attack's first: norms are folded
        with Operations(model) as ran:
            step(model, x)
    assert engine | {"aten::convolution_backward", "aten::mm"} <= ran.names
    assert "robust_moe_kernels::expert_conv_wgrad" not in ran.names
    assert not ran.asked
    if mode == "eval":  # in training the norms' statistics have the shape of a gate's weights
        assert not ran.weight_shaped
    assert ("robust_moe_kernels::column_sums" in ran.names) == (mode == "train")  # statistics, and gradients of norms

    with Operations(model) as ran:  # the same watch sees an ordinary training step's weight gradients
        model(x.requires_grad_()).sum().backward()
    assert "robust_moe_kernels::expert_conv_wgrad" in ran.names
    assert {"aten::convolution_backward", "aten::native_batch_norm_backward"} <= set(ran.asked)
    assert {"aten::mm", "robust_moe_kernels::expert_conv_wgrad"} <= set(ran.weight_shaped)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_nothing_is_read_on_the_host_from_entering_to_leaving(mode):
    blocks = network()[4:6]  # expert_conv alone checks its arguments' values on a CPU
    x = torch.rand(6, 12, 8, 8, requires_grad=True)
    with Operations(blocks) as ran, attack_mode(blocks, mode):
        torch.autograd.grad(blocks(x).sum(), x)
    assert "robust_moe_kernels::head_forward" in ran.names
    assert not ran.names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select"}


def saved(layer: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """What autograd keeps of one forward, by address, the layer's own memory left out."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    return {address: tensor for address, tensor in found.items() if address not in own}


@pytest.mark.parametrize(("index", "norms"), [(4, 2), (5, 4)], ids=["BasicBlock", "Bottleneck with downsampling"])
def test_saves_only_what_the_input_gradient_needs(index, norms):
    layer = network()[index].train()
    x = torch.rand(6, 12, 8, 8, requires_grad=True).contiguous(memory_format=torch.channels_last) * 1
    x = x.detach().requires_grad_()
    address = x.untyped_storage().data_ptr()
    training = saved(layer, x)
    with attack_mode(layer):
        attack = saved(layer, x)
        tables = {table.untyped_storage().data_ptr() for folded in layer.experts.folded for table in folded[:2]}

    def maps(found: dict[int, Tensor]) -> list[Tensor]:
        return [tensor for key, tensor in found.items() if tensor.dim() == 4 and key != address]

    def per_channel(found: dict[int, Tensor]) -> set[int]:
        return {
            key for key, tensor in found.items() if tensor.dim() == 2 and tensor.shape[0] == 4 and tensor.shape[1] > 4
        }

    assert len(maps(training)) == len(maps(attack)) == norms  # each convolution's output and no more
    assert len(per_channel(training)) == 4 * norms  # scale, shift, mean, deviation
    assert per_channel(attack) == tables  # the attack's own tables: a forward adds none
    assert len(tables) == 2 * norms
    assert address in training
    assert (address in attack) == (index == 4)  # the identity skip's ReLU reads the input, a downsampling skip's not

    def size(found: dict[int, Tensor]) -> int:
        return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in tables)

    spared = sum(training[key].untyped_storage().nbytes() for key in per_channel(training))
    spared += x.untyped_storage().nbytes() if index == 5 else 0
    assert size(training) - size(attack) >= spared
    frozen = saved(layer.eval().requires_grad_(False), x)  # outside of attack_mode the same, with tables of its own
    assert len(per_channel(frozen)) == 2 * norms
    assert (address in frozen) == (address in attack)


@CUDA
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_host_never_waits_for_the_gpu(autocast):
    model, x = network().cuda(), images(device="cuda")
    with attack_mode(model), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = step(model, x)  # compiles and loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with attack_mode(model), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            got = step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, expected)
