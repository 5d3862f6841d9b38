"""Routed networks, batches and attacks for the tests of an attack's steps as a graph."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from graph_recorder import Recorder
from torch import Tensor, nn

from robust_moe.attacks import PGD
from robust_moe.attacks.graph import StepGraphs
from robust_moe.models import BasicBlock
from robust_moe_kernels.modules import replace_blocks


def network(device: str = "cpu", dropout: float = 0.0) -> nn.Sequential:
    """Convolution and batch norm, two routed blocks, dropout, linear."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        BasicBlock(8, 8),
        BasicBlock(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, 5),
    )
    replace_blocks(model, ["2", "3"], num_experts=4, top_k=2, init="fresh", noise_std=dropout)
    for layer in (model[2], model[3]):  # gates that send different images to different experts
        nn.init.normal_(layer.gate.fc.weight, 0, 30)
    return model.to(device).train()


def batch(number: int, count: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and positions, other ones for each number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(count, 2, 6, 6, generator=generator)
    y = torch.randint(5, (count,), generator=generator)
    index = torch.arange(count) + 100 * number
    return x.to(device), y.to(device), index.to(device)


def routes(model: nn.Module, x: Tensor) -> Tensor:
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        twin(x)
    return torch.cat([layer.routing.indices.sort(1).values for layer in (twin[2], twin[3])]).cpu()


def learn(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A training step on these images: weights and running statistics move where they are."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def recorded(**settings) -> tuple[PGD, Recorder]:
    attack = PGD(**{"eps": 0.1, "steps": 3, **settings})
    recorder = Recorder()
    attack.graphs = StepGraphs(capturer=recorder)
    return attack, recorder


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


SETTINGS = {
    "Linf": {},
    "L2": {"norm": "L2", "eps": 0.5},
    "from the image": {"random_start": False},
    "one step": {"steps": 1},
    "restarts": {"restarts": 2},
    "best": {"best": True},
    "best of restarts": {"best": True, "restarts": 2},
    "kl": {"loss": "kl"},
    "targeted margin": {"loss": "margin", "targeted": True},
    "train mode with noise": {"mode": "train"},
    "several draws": {"mode": "train", "eot_iter": 2},
}
