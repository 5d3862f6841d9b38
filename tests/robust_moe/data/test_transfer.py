"""Between host and device: one copy a batch that the host does not wait for, and nothing read inside a step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robust_moe.attacks import PGD
from robust_moe.config import (
    TrainConfig,
)
from robust_moe.data import AugmentConfig, BatchLoader, ImageSet
from robust_moe.data.transfer import send
from robust_moe.engine.experiment import make_method
from robust_moe.engine.meters import Meter
from robust_moe.engine.updates import Updater
from robust_moe.evaluation import accuracy, staged
from robust_moe.methods import PGDAdversarialTraining
from robust_moe.models import BALANCE_LOSSES, MoEConfig, ResNet18Config, build_model
from robust_moe_kernels.modules import experts

AUGMENT = AugmentConfig(flip=True, crop_padding=4, color_jitter=0.2, cutout=4)


class Transfers(TorchDispatchMode):
    """What makes the host wait for a device, or would: copies between devices, and values read."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, bool]] = []  # direction, whether the host waits
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        out = func(*args, **kwargs)
        tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
        on_device = any(tensor.device.type != "cpu" for tensor in tensors)
        if name == "aten::_to_copy" and out.device != args[0].device:
            self.copies.append((f"{args[0].device.type} to {out.device.type}", not kwargs.get("non_blocking", False)))
        elif name == "aten::copy_" and args[0].device != args[1].device:
            blocking = not (kwargs.get("non_blocking", False) or (len(args) > 2 and args[2]))
            self.copies.append((f"{args[1].device.type} to {args[0].device.type}", blocking))
        elif name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal") and on_device:
            self.reads.append(name)
        return out


def image_set(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(10, (count,), generator=generator), tuple("abcdefghij"), "noise")


def test_the_watch_sees_what_would_wait():
    with Transfers() as seen:
        x = torch.ones(3).to("meta")
        torch.ones(3).to("meta", non_blocking=True)
        torch.empty(3, device="meta").copy_(torch.ones(3))
    assert seen.copies == [("cpu to meta", True), ("cpu to meta", False), ("cpu to meta", True)]
    assert x.device.type == "meta"


@pytest.mark.parametrize("resident", [True, False])
def test_a_batch_is_copied_without_waiting(resident, monkeypatch):
    """Two copies: of the positions, or the images where they do not fit; of all that was drawn for the augmentation."""
    loader = BatchLoader(image_set(32), 8, device="meta", shuffle=True, augment=AUGMENT)
    if not resident:
        monkeypatch.setattr(loader, "_images", image_set(32).images)
        monkeypatch.setattr(loader, "_labels", image_set(32).labels)
    batches = loader.epoch(0)
    next(batches)  # constants are copied once
    with Transfers() as seen:
        for batch in batches:
            assert {part.device.type for part in batch} == {"meta"}
    assert seen.copies == [("cpu to meta", False)] * 2 * 3
    assert not seen.reads


@pytest.fixture
def engine_on_meta(monkeypatch):
    """A routed layer runs on the device that holds no values: what the host reads fails there."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast  # neither is defined for such a device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind))
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *rest, **how: nullcontext() if kind == "meta" else autocast(kind, *rest, **how)
    )
    monkeypatch.setitem(experts._ENGINE, "meta", experts._ENGINE["cuda"])
    monkeypatch.setattr(experts, "_runs", lambda *_: True)  # the ops answer with their fake implementations


def test_three_steps_of_training_copy_no_more_than_their_batches(engine_on_meta):
    """Loader, attack, training pass, optimiser and meters, with a routed layer; what the host reads would fail on this
    device anyway."""
    attack = PGD.Config(eps="8/255", alpha="2/255", steps=2, graph=False)
    model = ResNet18Config(width=8, moe=MoEConfig(layers=["layer4.1"], balance=BALANCE_LOSSES["entropy"]()))
    config = TrainConfig(model=model, method=PGDAdversarialTraining.Config(attack=attack))
    network = build_model(config.model, num_classes=10, channels=3, image_size=32).to("meta").train()
    loader = BatchLoader(image_set(32), 8, device="meta", shuffle=True, augment=AUGMENT)
    fabric, meter = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), Meter()
    optimizer = config.optim.build(network)
    updater = Updater(fabric, network, network, optimizer, make_method(config), None)
    batches = loader.epoch(0)

    def step(number: int) -> None:
        updater.method.step = number
        logs, nonfinite = updater.run(next(batches), number)
        meter.add({**logs, "attack_nonfinite": nonfinite})

    step(0)  # constants, momentum
    with Transfers() as seen:
        for number in range(1, 4):
            step(number)
    assert seen.copies == [("cpu to meta", False)] * 2 * 3
    assert not seen.reads
    assert all(value.device.type == "meta" for value in meter.sums.values())


def test_a_validation_is_read_at_its_end_only(engine_on_meta, monkeypatch):
    """Images, attack, scores and routing: one copy a batch that the host does not wait for, nothing read before the
    end, and then flags, masks, the images to be shown and the experts of a layer once each."""
    read, batches = [], []
    monkeypatch.setattr(staged, "refuse_nonfinite", lambda bad, what: read.append(bad.shape))
    monkeypatch.setattr(
        Tensor, "cpu", lambda self: read.append(self.shape) or torch.zeros(self.shape, dtype=self.dtype)
    )
    monkeypatch.setattr(Tensor, "tolist", lambda self: read.append(self.shape) or [[0.5] * 4, [0.25] * 4])
    model = ResNet18Config(width=8, moe=MoEConfig(layers=["layer4.1"]))
    network = build_model(model, num_classes=10, channels=3, image_size=32).to("meta")

    def on_batch(count: int) -> None:
        batches.append((count, list(read)))

    with Transfers() as seen:
        result = accuracy(network, image_set(20), PGD(8 / 255, 2, graph=False), batch_size=8, on_batch=on_batch)
    assert seen.copies == [("cpu to meta", False)] * 3
    assert not seen.reads
    assert batches == [(8, []), (8, []), (4, [])]
    assert read == [(), (20,), (20,), (2, 4, 3, 32, 32), (2, 4)]
    assert result.routing["layer4.1"].first == [0.25] * 4


def test_what_is_sent_arrives():
    parts = [torch.arange(7), torch.rand(3, 2), torch.tensor([True, False, True]), torch.randint(256, (5,)).byte()]
    for moved in (send(parts, torch.device("cpu")), send(parts, torch.device("meta"))):
        for part, got in zip(parts, moved, strict=True):
            assert (part.shape, part.dtype) == (got.shape, got.dtype)
    assert all(a is b for a, b in zip(parts, send(parts, torch.device("cpu")), strict=True))
    assert send([], torch.device("meta")) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_sent_to_a_gpu_arrives():
    parts = [torch.arange(7), torch.rand(3, 2), torch.tensor([True, False, True]), torch.randint(256, (5,)).byte()]
    for part, got in zip(parts, send(parts, torch.device("cuda")), strict=True):
        assert torch.equal(part, got.cpu())
