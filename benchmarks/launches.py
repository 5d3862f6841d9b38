"""Kernel launches of routed layers and of a whole training step, counted; see ``launch_counter`` for how.

``python -m benchmarks launches`` needs no GPU; with ``--device cuda`` the same cases run there under a profiler.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from benchmarks.launch_counter import Counted, Launches, Profiled
from robust_moe.attacks import PGD, attack_mode
from robust_moe.attacks.passes import Tally
from robust_moe.benchmarks.layer_case import Case
from robust_moe.benchmarks.records import expect_records, folder_option, write_record
from robust_moe.config import TrainConfig
from robust_moe.data import Batch
from robust_moe.methods import PGDAdversarialTraining, Standard
from robust_moe.models import BALANCE_LOSSES, MoEConfig, ResNet18Config, build_model
from robust_moe.provenance import provenance
from robust_moe_kernels.modules import FusedMLPMoE

__all__ = ["CASES", "count", "main"]

Autocast = Callable[[], AbstractContextManager]
_TOKENS, _CHANNELS = 197, 384  # of a ViT-S on images of 224x224


def _maps(launches: Launches | Profiled, *shape: int) -> Tensor:
    return launches.tensor(*shape).to(memory_format=torch.channels_last)


def _mlp_layer(device: torch.device, experts: int, top_k: int) -> FusedMLPMoE:
    """The routed MLP of a ViT-S. Made on the CPU in any case, as what an MLP computes is found out by numbers."""
    with torch.device("cpu"):
        mlp = nn.Sequential(nn.Linear(_CHANNELS, 4 * _CHANNELS), nn.GELU(), nn.Linear(4 * _CHANNELS, _CHANNELS))
        return FusedMLPMoE.from_mlp(mlp, experts, top_k).to(device)


def _attacked(
    name: str, launches: Launches | Profiled, layer: nn.Module, x: Tensor, autocast: Autocast
) -> dict[str, Counted]:
    """The second pass of an attack: what is done once an attack is done."""
    with autocast(), attack_mode(layer):
        for _ in range(2):
            launches.take()
            y = layer(x)
            forward, gradient = launches.take(), torch.ones_like(y)
            launches.take()
            torch.autograd.grad(y, x, gradient)
    return {f"{name} in an attack, forward": forward, f"{name} in an attack, forward + dx": forward + launches.take()}


def _trained(
    name: str, launches: Launches | Profiled, layer: nn.Module, x: Tensor, autocast: Autocast
) -> dict[str, Counted]:
    """Training mode, all gradients; without an optimiser and a balance loss."""
    layer.train()
    for _ in range(2):  # libraries set themselves up in the first
        launches.take()
        with autocast():
            y = layer(x)
        forward, gradient = launches.take(), torch.ones_like(y)
        launches.take()
        torch.autograd.grad(y, [x, *layer.parameters()], gradient)
    both = forward + launches.take()
    return {f"{name} in training, forward": forward, f"{name} in training, forward + backward": both}


def layer_in_attack(launches: Launches | Profiled, case: Case, autocast: Autocast) -> dict[str, Counted]:
    x = _maps(launches, case.batch, case.channels, case.size, case.size).requires_grad_()
    return _attacked("layer", launches, launches.module(case.layer), x, autocast)


def layer_in_training(launches: Launches | Profiled, case: Case, autocast: Autocast) -> dict[str, Counted]:
    x = _maps(launches, case.batch, case.channels, case.size, case.size).requires_grad_()
    return _trained("layer", launches, launches.module(case.layer), x, autocast)


def mlp(launches: Launches | Profiled, case: Case, autocast: Autocast) -> dict[str, Counted]:
    """The routed MLP on the tokens of ``case.batch`` images."""
    layer = launches.module(lambda device: _mlp_layer(device, case.experts, case.top_k))
    x = launches.tensor(case.batch, _TOKENS, _CHANNELS).requires_grad_()
    attacked = _attacked("MLP", launches, layer, x, autocast)
    return attacked | _trained("MLP", launches, layer, x, autocast)


def whole_step(launches: Launches | Profiled, case: Case, autocast: Autocast) -> dict[str, Counted]:
    """ResNet-18 for 32x32 images whose layer4.1 is the routed layer, by the trainer's own method and optimiser."""
    moe = MoEConfig(layers=["layer4.1"], num_experts=case.experts, top_k=case.top_k, balance=BALANCE_LOSSES["none"]())
    attack = PGD.Config(eps="8/255", alpha="2/255", steps=1)
    config = TrainConfig(model=ResNet18Config(moe=moe), method=PGDAdversarialTraining.Config(attack=attack))
    model = launches.module(lambda _: build_model(config.model, num_classes=10, channels=3, image_size=32)).train()
    method = config.method.build(config.model)
    images, labels = _maps(launches, case.batch, 3, 32, 32), launches.tensor(case.batch, dtype=torch.int64)
    batch = Batch(images, labels, labels)
    for _ in range(2):  # an attack is needed to learn which norms may be folded
        with autocast(), attack_mode(model):
            passes, x = method.attack.aim(model, images, batch.labels, Tally(images.device)), images
            for _ in range(2):
                launches.take()
                x = method.attack.step(x, passes.examine(x).grad, images)
            step = launches.take()
    training = Standard.Config().build(config.model)  # on given images, as the attack's are by then
    optimizer = config.optim.build(model, fused=True)  # as the trainer has it on a GPU
    for _ in range(2):  # the first allocates the momentum
        launches.take()
        with autocast():
            (update,) = training.updates(model, batch, 0)
        update.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"PGD step": step, "training pass": launches.take()}


def _about(case: Case, name: str) -> dict[str, object]:
    """The sizes of a counted case, as its result row has them."""
    about = case.describe(name)
    if name.startswith("MLP"):
        del about["map"]
        about |= {"C": _CHANNELS, "tokens": _TOKENS}
    return about


CASES = (layer_in_attack, layer_in_training, mlp, whole_step)


def count(autocast: bool = False, case: Case | None = None, device: torch.device | None = None) -> dict[str, Counted]:
    """Launches of every case, by kernel.

    Args:
        autocast: with bfloat16 convolutions and products.
        case: sizes of the layer.
        device: a GPU to profile them on; None: counted without one.
    """
    found = {}
    with Launches() if device is None else Profiled(device) as launches:
        kind = launches.device.type
        for run in CASES:
            found |= run(launches, case or Case(), lambda: torch.autocast(kind, torch.bfloat16, enabled=autocast))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Counts and prints the launches of every case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__.split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=4, help="E (4)")
    parser.add_argument("--batch", type=int, default=128, help="images (128)")
    parser.add_argument("--autocast", action="store_true", help="with bfloat16 convolutions and products")
    parser.add_argument("--device", help="a GPU that runs the cases under a profiler; without it none is needed")
    parser.add_argument("--out", type=folder_option, help="folder for launches.json; without it nothing is written")
    options = parser.parse_args(arguments)
    expect_records(parser, options.out, ["launches"])
    device = None if options.device is None else torch.device(options.device)
    case = Case(experts=options.experts, batch=options.batch)
    found = count(options.autocast, case, device)
    for name, counted in found.items():
        print(f"\n{name}: {counted.total()}")
        for kernel, launches in counted.most_common():
            print(f"  {launches:4}  {kernel}")
    if options.out:
        how = "counted without a GPU" if device is None else "profiled"
        about = {"benchmark": "launches", "how": how, "autocast": options.autocast}
        rows = [
            {"case": _about(case, name), "launches": counted.total(), "kernels": dict(counted.most_common())}
            for name, counted in found.items()
        ]
        record = {**about, **provenance(device or torch.device("cpu")), "rows": rows}
        path = write_record(options.out, "launches", json.dumps(record, indent=1) + "\n")
        print(f"\nwritten: {path}")
