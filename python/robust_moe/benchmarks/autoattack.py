"""AutoAttack standard, whole: ours against the authors' code (pyautoattack), on one network and the same images.

Ours once more as ``robust-moe eval --fast`` runs it: attacks in bfloat16, every verdict of the float32 network.

A CNN on digits, L-infinity and L2; with a folder of CIFAR-10 (``--data``) in its place pyautoattack's own ResNet-18,
which takes a CPU about an hour a round.

Needs the extra ``train`` and pyautoattack.
"""

from __future__ import annotations

import warnings
from functools import partial
from importlib import resources
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_moe.attacks import AutoAttack, Counts
from robust_moe.attacks.autoattack import QUERIES_A_STEP
from robust_moe.benchmarks.harness import Options, Row, compare
from robust_moe.data import Parquet

__all__ = ["run"]

BATCH = 250  # images a forward, on both sides: their default
CLOSE = 0.005  # difference of robust accuracies
SAME = 0.98  # share of images with the same verdict
CIFAR_EPS = 1.5 / 255  # a few per cent of the ResNet-18's images withstand it: at 1 / 255 one in six, at 2 / 255 none
CIFAR_IMAGES = 300


def digits_cnn(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN after a second of training on noisy-stepped digits, and 397 digits that it has not seen."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(6):
            for rows in torch.randperm(1400).split(64):
                x, y = images[rows], labels[rows]
                start = (x + 0.1 * (2 * torch.rand_like(x) - 1)).clamp(0, 1).requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
                attacked = (x + (start.detach() + 0.12 * grad.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(model(attacked), y).backward()
                optimizer.step()
    return model.to(device).eval(), images[1400:].to(device), labels[1400:].to(device)


def cifar_resnet(options: Options) -> tuple[nn.Module, Tensor, Tensor]:
    """pyautoattack's own CIFAR-10 ResNet-18, and the first test images of a parquet folder (``options.data``)."""
    from pyautoattack.examples.resnet import ResNet18

    model = ResNet18()
    weights = resources.files("pyautoattack") / "examples" / "model_test.pt"
    model.load_state_dict(torch.load(str(weights), map_location="cpu", weights_only=True))
    _, test = Parquet(Parquet.Config(root=str(options.data))).load()
    chosen = test.head(options.batch or (40 if options.quick else CIFAR_IMAGES))
    x, y = chosen.images.to(options.device) / torch.tensor(255.0, device=options.device), chosen.labels
    return model.to(options.device).eval(), x, y.to(options.device)


def robust(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(BATCH)]).argmax(1) == y


def standard(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, steps: int) -> Tensor:
    """Their adversarial images; ``steps`` as ours takes it."""
    from pyautoattack import AutoAttack as Standard

    attack = Standard(model, eps=eps, norm=norm, seed=0, version="standard", device=x.device)
    for apgd in (attack.apgd, attack.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = steps
        apgd.n_iter_2, apgd.n_iter_min = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        apgd.size_decr = max(int(0.03 * steps), 1)
    attack.fab.n_iter, attack.square.n_queries = steps, QUERIES_A_STEP * steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Warning)  # about points without a gradient
        images, _ = attack.run_standard_evaluation(x, y, batch_size=BATCH)
    return images


def in_bfloat16(attack: AutoAttack, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images withstand every attack, as a fast evaluation finds it."""
    from robust_moe.evaluation import plan, run_suite  # needs the extra train

    stages = plan("autoattack", attack)
    with torch.autocast(x.device.type, torch.bfloat16):
        found = run_suite(model, x, y, stages, eps=attack.eps, norm=attack.norm, batch_size=BATCH)
    assert found.robust is not None  # there are attacks
    return torch.from_numpy(found.robust)


def whole(case: dict[str, Any], network: tuple[nn.Module, Tensor, Tensor], eps: float, options: Options) -> list[Row]:
    """Both attacks in turn; refused if their verdicts differ by more than sampling."""
    model, x, y = network
    norm, steps = case["norm"], case["steps"]
    found: dict[str, Tensor] = {}
    counts = Counts()

    def attack(number: int, variant: str) -> None:
        mine = AutoAttack(eps, norm, batch_size=BATCH, steps=steps)
        if variant == "ours, bfloat16":
            found[variant] = in_bfloat16(mine, model, x, y)
            return
        if variant == "ours":
            counts.forward = counts.backward = 0
            images = mine(model, x, y, counts=counts)
        else:
            images = standard(model, x, y, eps, norm, steps)
        found[variant] = robust(model, images, y).cpu()

    variants = ("pyautoattack", "ours", "ours, bfloat16")
    rows = compare(case, {name: partial(attack, variant=name) for name in variants}, options, warmup=0)
    ours, theirs, half = (found[name] for name in ("ours", "pyautoattack", "ours, bfloat16"))
    apart = abs(int(ours.sum()) - int(theirs.sum())) / len(y)
    same = 1 - int((ours != theirs).sum()) / len(y)
    if not options.quick and (apart > CLOSE or same < SAME):
        raise AssertionError(
            f"robust accuracy: expected within {CLOSE:.1%} and {SAME:.0%} of the verdicts the same, got {apart:.2%} "
            f"and {same:.1%}"
        )
    rows[0].extra["robust"] = int(theirs.sum()) / len(y)
    rows[1].extra.update(
        robust=int(ours.sum()) / len(y),
        same_verdicts=same,
        forwards_per_image=counts.forward / len(y),
        backwards_per_image=counts.backward / len(y),
    )
    rows[2].extra.update(robust=int(half.sum()) / len(y), same_verdicts=1 - int((half != theirs).sum()) / len(y))
    return rows


def run(options: Options) -> list[Row]:
    """AutoAttack standard, whole, beside pyautoattack's; raises AssertionError where the verdicts differ."""
    steps = 4 if options.quick else 100
    if options.data is not None:
        cases = [("CIFAR-10 ResNet-18", cifar_resnet(options), "Linf", CIFAR_EPS)]
    else:
        torch.set_num_threads(1)  # so small a network gains nothing by more
        network = digits_cnn(options.device)
        cases = [("digits CNN", network, "Linf", 0.15), ("digits CNN", network, "L2", 0.7)]
    rows = []
    for name, network, norm, eps in cases[:1] if options.quick else cases:
        case = {"network": name, "images": len(network[1]), "norm": norm, "eps": eps, "steps": steps}
        rows += whole(case, network, eps, options)
    return rows
