"""Common utilities treat a routed network as they treat the dense one.

The routed twin has copies of the dense network's block as experts and weights that add up to 1, so in evaluation both
compute the same function: what a tool makes of the one can be compared with what it makes of the other. ``TOOLS`` is
the table; docs/tools.md shows it to users, and must say the same.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load, save
from timm.optim import param_groups_weight_decay
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock
from torchvision.ops._utils import split_normalization_params

from robust_moe_kernels import replace_blocks

DOCS = Path(__file__).parents[3] / "docs" / "tools.md"
EXPERTS = 3


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    skip = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), BasicBlock(8, 12, 2, skip)]
    model = nn.Sequential(*layers, BasicBlock(12, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def routed(**options) -> nn.Sequential:
    return replace_blocks(dense(), ["3", "4"], num_experts=EXPERTS, top_k=2, **options)


def images(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator), torch.arange(count) % 5


def blocks(model: nn.Sequential) -> list[nn.Module]:
    """The blocks of a dense network; every expert of a routed one."""
    return [
        block for layer in (model[3], model[4]) for block in (layer.experts if hasattr(layer, "experts") else [layer])
    ]


def convs(model: nn.Sequential) -> list[nn.Conv2d]:
    return [block.conv1 for block in blocks(model)]


def norms(model: nn.Sequential) -> list[nn.BatchNorm2d]:
    return [module for block in blocks(model) for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def trained(model: nn.Module, steps: int = 2) -> float:
    x, y = images()
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


# --- the tools: each takes a network and returns what is to be equal for both -------------------------------------


def freezing_by_class(model: nn.Sequential) -> Tensor:
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    before = [norm.running_mean.clone() for norm in norms(model)]
    loss = F.cross_entropy(model(images()[0]), images()[1])
    loss.backward()
    assert all(torch.equal(norm.running_mean, value) for norm, value in zip(norms(model), before, strict=True))
    assert all(norm.weight.grad is None for norm in norms(model))
    assert all(conv.weight.grad is not None for conv in convs(model))
    return loss.detach()


def sync_batch_norm(model: nn.Sequential) -> Tensor:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 1 + len(norms_of(converted))
    return converted.eval()(images()[0])


def norms_of(model: nn.Sequential) -> list[nn.Module]:
    kind = nn.modules.batchnorm._BatchNorm
    return [module for block in blocks(model) for module in block.modules() if isinstance(module, kind)]


def statistics_of_an_average(model: nn.Sequential) -> None:
    swa = AveragedModel(model)
    for name, buffer in swa.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(100.0)  # of other weights
    update_bn([images(40)[0], images(40)[0] * 0.5], swa)
    assert all(buffer.abs().mean() < 30 for name, buffer in swa.named_buffers() if name.endswith("running_mean"))
    assert all(norm.momentum == 0.1 for norm in norms(swa.module))


def moving_average(model: nn.Sequential) -> Tensor:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    average.update_parameters(model)
    return average.eval()(images()[0])


def decayed_by_timm(model: nn.Sequential) -> None:
    decayed = {id(p) for p in param_groups_weight_decay(model, 1e-4)[1]["params"]}
    assert not any(id(p) in decayed for norm in norms(model) for p in norm.parameters())
    assert all(id(conv.weight) in decayed for conv in convs(model))


def decayed_by_torchvision(model: nn.Sequential) -> None:
    found, others = split_normalization_params(model)
    assert {id(p) for norm in norms(model) for p in norm.parameters()} <= {id(p) for p in found}
    assert {id(conv.weight) for conv in convs(model)} <= {id(p) for p in others}


def initialising(model: nn.Sequential) -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.25)

    before = model.eval()(images()[0])
    model.apply(init)
    for conv in convs(model):
        std = (2 / (12 * 9)) ** 0.5  # of 12 output channels and 9 taps, whatever the number of experts
        assert abs(conv.weight.std() - std) < 5 * std / (2 * conv.weight.numel()) ** 0.5
    assert all((norm.weight == 0.25).all() for norm in norms(model))
    assert not torch.allclose(model(images()[0]), before)


def weight_normalising(model: nn.Sequential, normalise: Callable[[nn.Module], object], scale: str) -> Tensor:
    for conv in convs(model):
        normalise(conv)
    x, _ = images()
    before = model.eval()(x)
    model.load_state_dict({k: v * 2 if k.endswith(scale) else v for k, v in model.state_dict().items()})
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    trained(model)
    return after.detach()


def spectral_normalising(model: nn.Sequential, normalise: Callable[[nn.Module], object]) -> None:
    for conv in convs(model):
        normalise(conv)
    trained(model, steps=3)
    model.eval()(images()[0])
    for conv in convs(model):
        sigma = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert abs(sigma.item() - 1) < 1e-2


def pruning(model: nn.Sequential, prunes: Callable[[nn.Module], object]) -> None:
    for conv in convs(model):
        prunes(conv)
    before = model.eval()(images()[0])
    with torch.no_grad():
        for conv in convs(model):
            conv.weight_orig.mul_(2)
    assert not torch.allclose(model(images()[0]), before)
    trained(model)
    for conv in convs(model):
        assert not conv.weight[conv.weight_mask == 0].any()
        prune.remove(conv, "weight")
    trained(model)


def pruning_globally(model: nn.Sequential) -> None:
    together = [(conv, "weight") for conv in convs(model)]
    prune.global_unstructured(together, prune.L1Unstructured, amount=0.5)
    model.eval()(images()[0])
    kept = sum(int(conv.weight_mask.sum()) for conv in convs(model))
    assert kept == sum(conv.weight_mask.numel() for conv in convs(model)) // 2


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrising(model: nn.Sequential) -> Tensor:
    for conv in convs(model):
        parametrize.register_parametrization(conv, "weight", Halved())
    trained(copy.deepcopy(model))
    return model.eval()(images()[0])


def hooks(model: nn.Sequential) -> None:
    seen: list[str] = []
    for conv in convs(model):
        conv.register_forward_pre_hook(lambda *_: seen.append("before"))
        conv.register_forward_hook(lambda *_: seen.append("after"))
        conv.register_full_backward_hook(lambda *_: seen.append("backward"))
    trained(model, steps=1)
    assert all(seen.count(kind) == len(convs(model)) for kind in ("before", "after", "backward"))


def flattening(model: nn.Sequential) -> Tensor:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.01, model.parameters())
    return model(images()[0])


def lbfgs(model: nn.Sequential) -> None:
    x, y = images()
    optimizer = torch.optim.LBFGS(model.train().parameters(), lr=0.1, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert closure().item() < first


def safetensors(model: nn.Sequential) -> Tensor:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(load(save(model.state_dict())))
    return other(images()[0])


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


def clipping_by_unit(model: nn.Sequential) -> None:
    x, y = images()
    F.cross_entropy(model.train()(x) * 100, y).backward()
    adaptive_clip_grad(model.parameters(), clip_factor=0.01)
    for conv in convs(model):  # filter by filter
        limit = 0.01 * conv.weight.flatten(1).norm(dim=1).clamp_min(1e-3)
        assert (conv.weight.grad.flatten(1).norm(dim=1) <= limit * 1.001).all()


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


WORKS, ONE_BY_ONE, GENERAL = "works", "one by one", "general path"
OLD_NORM = partial(weight_normalising, normalise=nn.utils.weight_norm, scale="weight_g")
NEW_NORM = partial(weight_normalising, normalise=parametrizations.weight_norm, scale="original0")
PRUNES = {
    "l1_unstructured": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "random_unstructured": lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    "ln_structured": lambda conv: prune.ln_structured(conv, "weight", 0.5, n=2, dim=0),
    "ln_structured over inputs": lambda conv: prune.ln_structured(conv, "weight", 0.3, n=2, dim=1),
    "random_structured": lambda conv: prune.random_structured(conv, "weight", 0.5, dim=0),
    "custom_from_mask": lambda conv: prune.custom_from_mask(conv, "weight", (conv.weight > 0).float()),
}


class Tool(NamedTuple):
    treated: str
    run: Callable[[nn.Sequential], Tensor | None]


TOOLS = {
    "freezing norms by class": Tool(WORKS, freezing_by_class),
    "`nn.SyncBatchNorm.convert_sync_batchnorm`": Tool(ONE_BY_ONE, sync_batch_norm),
    "`swa_utils.update_bn`": Tool(WORKS, statistics_of_an_average),
    "`swa_utils.AveragedModel`, EMA": Tool(WORKS, moving_average),
    "timm's weight-decay groups": Tool(WORKS, decayed_by_timm),
    "torchvision's weight-decay groups": Tool(WORKS, decayed_by_torchvision),
    "`model.apply(init)`": Tool(WORKS, initialising),
    "`nn.utils.weight_norm`": Tool(ONE_BY_ONE, OLD_NORM),
    "`parametrizations.weight_norm`": Tool(ONE_BY_ONE, NEW_NORM),
    "`nn.utils.spectral_norm`": Tool(
        ONE_BY_ONE, partial(spectral_normalising, normalise=partial(nn.utils.spectral_norm, n_power_iterations=50))
    ),
    "`parametrizations.spectral_norm`": Tool(
        ONE_BY_ONE,
        partial(spectral_normalising, normalise=partial(parametrizations.spectral_norm, n_power_iterations=50)),
    ),
    **{f"`prune.{name}`": Tool(ONE_BY_ONE, partial(pruning, prunes=prunes)) for name, prunes in PRUNES.items()},
    "`prune.global_unstructured`": Tool(ONE_BY_ONE, pruning_globally),
    "`parametrize.register_parametrization`": Tool(ONE_BY_ONE, parametrising),
    "forward and backward hooks": Tool(ONE_BY_ONE, hooks),
    "`parameters_to_vector`, `vector_to_parameters`": Tool(WORKS, flattening),
    "`optim.LBFGS`": Tool(WORKS, lbfgs),
    "safetensors": Tool(WORKS, safetensors),
    "timm's adaptive gradient clipping": Tool(WORKS, clipping_by_unit),
    "`copy.deepcopy`": Tool(WORKS, partial(copying, copied=copy.deepcopy)),
    "`torch.save` of a whole model": Tool(WORKS, partial(copying, copied=through_a_file)),
    "`share_memory`": Tool(WORKS, sharing_memory),
    "`torch.set_default_device`": Tool(WORKS, another_default_device),
    "FSDP2, `fully_shard`": Tool(WORKS, sharding),
    "dynamic quantisation": Tool(WORKS, quantising),
    "`create_feature_extractor`": Tool(WORKS, extracting_features),
    "`fx.symbolic_trace`": Tool(WORKS, symbolic_tracing),
    "`torch.compile`": Tool(WORKS, compiling),
    "`checkpoint(use_reentrant=False)`": Tool(WORKS, partial(checkpointing, reentrant=False)),
    "`checkpoint(use_reentrant=True)`": Tool(WORKS, partial(checkpointing, reentrant=True)),
    "`torch.func.grad`": Tool(GENERAL, partial(gradient_of, of_samples=False)),
    "per-sample gradients, `vmap(grad)`": Tool(GENERAL, partial(gradient_of, of_samples=True)),
    "`torch.func.jacrev`": Tool(GENERAL, jacobian),
    "`torch.func.jvp`": Tool(GENERAL, tangent),
    "`torch.func.hessian`": Tool(GENERAL, hessian),
    "`torch.vmap`": Tool(GENERAL, mapping),
    "second derivatives (`create_graph=True`)": Tool(GENERAL, partial(second_derivatives, training=False)),
    "gradient penalties": Tool(GENERAL, gradient_penalty),
    "`torch.export`": Tool(GENERAL, exporting),
    "`torch.onnx.export(dynamo=True)`": Tool(GENERAL, onnx),
    "`torch.jit.trace`": Tool(GENERAL, scripting_by_trace),
}
TOLERANCE = {"dynamic quantisation": 0.05, "`optim.LBFGS`": 1e-3}


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_treats_both_alike(name: str):
    tool = TOOLS[name]
    wanted = tool.run(dense())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = tool.run(routed())
    said = {
        kind
        for kind, words in ((ONE_BY_ONE, "run one by one"), (GENERAL, "in plain PyTorch"))
        if any(words in str(warning.message) for warning in caught)
    }
    assert said == ({tool.treated} - {WORKS})  # a detour is announced, and named
    assert (found is None) == (wanted is None)
    if wanted is not None:
        scale = max(1.0, float(wanted.detach().abs().max()))
        bound = scale * TOLERANCE.get(name, 2e-5)
        assert float((found.detach() - wanted.detach()).abs().max()) <= bound


def test_the_documentation_has_this_table():
    rows = dict(re.findall(r"^\| (.+?) \| (works|one by one|general path)\b.* \|$", DOCS.read_text(), re.MULTILINE))
    assert {name: rows.get(name) for name in TOOLS} == {name: tool.treated for name, tool in TOOLS.items()}
