"""Tools that change weights or training: each takes a network of ``tool_models`` and returns what is to be equal for
the dense and the routed one; None: it has asserted all itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from timm.optim import param_groups_weight_decay
from timm.utils import adaptive_clip_grad
from tool_models import blocks, convs, images, norms, trained
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.ops._utils import split_normalization_params


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


def clipping_by_unit(model: nn.Sequential) -> None:
    x, y = images()
    F.cross_entropy(model.train()(x) * 100, y).backward()
    adaptive_clip_grad(model.parameters(), clip_factor=0.01)
    for conv in convs(model):  # filter by filter
        limit = 0.01 * conv.weight.flatten(1).norm(dim=1).clamp_min(1e-3)
        assert (conv.weight.grad.flatten(1).norm(dim=1) <= limit * 1.001).all()
