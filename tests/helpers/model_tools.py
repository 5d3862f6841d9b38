"""Tools that transform, trace, copy or distribute a model. Each takes a network of ``tool_models`` and returns what is
to be equal for the dense and the routed one."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from tool_models import EXPERTS, dense, images, trained
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from robust_moe_kernels import replace_blocks


def quantising(model: nn.Sequential) -> Tensor:
    # A gate's logits are rounded too: the route may differ, experts that are copies do not.
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)(images()[0])


def extracting_features(model: nn.Sequential) -> Tensor:
    return create_feature_extractor(model, {"4" if hasattr(model[4], "experts") else "4.relu_1": "out"})(images()[0])[
        "out"
    ]


def symbolic_tracing(model: nn.Sequential) -> Tensor:
    graph = torch.fx.symbolic_trace(model)
    return pickle.loads(pickle.dumps(graph))(images()[0])


def gradient_of(model: nn.Sequential, of_samples: bool) -> Tensor:
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    x, y = images()

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (parameters, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    gradient = torch.func.grad(loss)
    if of_samples:
        return torch.vmap(gradient, (None, 0, 0))(parameters, x, y)["0.weight"]
    return gradient(parameters, x[0], y[0])["0.weight"]


def jacobian(model: nn.Sequential) -> Tensor:
    return torch.func.jacrev(model)(images(2)[0])


def tangent(model: nn.Sequential) -> Tensor:
    x = images()[0]
    return torch.func.jvp(model, (x,), (x.flip(0),))[1]


def mapping(model: nn.Sequential) -> Tensor:
    return torch.vmap(lambda image: model(image[None])[0])(images()[0])


def hessian(model: nn.Sequential) -> Tensor:
    x, y = images(1)
    small = x[:, :, :2, :2].contiguous()
    return torch.func.hessian(lambda z: F.cross_entropy(model(F.interpolate(z, (8, 8))), y))(small)


def second_derivatives(model: nn.Sequential, training: bool) -> Tensor:
    x, y = images()
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.train(training)(x), y), x, create_graph=True)
    penalty = gradient.square().sum() * 100
    return torch.autograd.grad(penalty, x)[0]


def gradient_penalty(model: nn.Sequential) -> Tensor:
    x, y = images()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x.requires_grad_()), y), x, create_graph=True)
    (gradient.square().sum() * 100).backward()
    return model[0].weight.grad


def exporting(model: nn.Sequential) -> Tensor:
    return torch.export.export(model, (images()[0],)).module()(images()[0])


def onnx(model: nn.Sequential) -> Tensor:
    x, _ = images()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = ReferenceEvaluator(program.model_proto)
    return torch.from_numpy(session.run(None, {session.input_names[0]: x.numpy()})[0])


def scripting_by_trace(model: nn.Sequential) -> Tensor:
    x, _ = images()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    return traced(x.flip(0)).flip(0)


def compiling(model: nn.Sequential) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)(images()[0])


def checkpointing(model: nn.Sequential, reentrant: bool) -> Tensor:
    x, y = images()
    loss = F.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=reentrant), y)
    loss.backward()
    return x.grad


def copying(model: nn.Sequential, copied: Callable[[nn.Module], nn.Module]) -> Tensor:
    return copied(model)(images()[0])


def through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def another_default_device(model: nn.Sequential) -> Tensor:
    if hasattr(model[3], "experts"):
        model = dense()
        torch.set_default_device("meta")
        try:
            replace_blocks(model, ["3", "4"], num_experts=EXPERTS, top_k=2)
            model.double().float()
        finally:
            torch.set_default_device(None)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    return model(images()[0])


def sharing_memory(model: nn.Sequential) -> Tensor:
    model.share_memory()
    assert all(tensor.is_shared() for tensor in (*model.parameters(), *model.buffers()))
    return model(images()[0])


def sharding(model: nn.Sequential) -> Tensor:
    """FSDP2 over one process; every expert may be wrapped on its own too."""
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            for layer in (model[3], model[4]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            out = model(images()[0]).detach()
            trained(model)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            return out
        finally:
            torch.distributed.destroy_process_group()
