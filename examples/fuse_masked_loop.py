"""Make a CNN with routed experts faster: its loop over masks becomes a fused layer with the same weights.

Runs on a CPU in under a minute, without a download: python examples/fuse_masked_loop.py
"""

import time
from statistics import median

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from robust_moe_kernels import FusedBlockMoE, moe_layers


class MaskedLoop(nn.Module):
    """As it is often written: every expert on the images that chose it, one expert after the other."""

    def __init__(self, channels, num_experts=8):
        super().__init__()
        self.experts = nn.ModuleList(BasicBlock(channels, channels) for _ in range(num_experts))
        self.gate = nn.Linear(channels, num_experts)

    def forward(self, x):
        weights, chosen = self.gate(x.mean((2, 3))).softmax(1).topk(2)
        weights = weights / weights.sum(1, keepdim=True)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]) * weights[rows, place].view(-1, 1, 1, 1))
        return y


def fused(loop):
    """The same layer on the grouped engine: experts' weights, batch norms' statistics and gate are the loop's."""
    layer = FusedBlockMoE.from_block(loop.experts[0], num_experts=len(loop.experts), top_k=2, gate="gap_fc")
    layer.experts.load_state_dict(loop.experts.state_dict())
    layer.gate.fc.load_state_dict(loop.gate.state_dict())
    return layer


def balance(loop, x):
    """Let every expert have images, as a balance loss does in training: a new gate sends most to the same two."""
    with torch.no_grad():
        loop.gate.weight *= 10
        loop.gate.bias -= loop.gate(x.mean((2, 3))).mean(0)
    return loop(x)


def step(model, images):
    """A training step's forward and backward; returns the logits."""
    model.zero_grad()
    logits = model(images)
    logits.square().mean().backward()
    return logits


torch.manual_seed(0)
stem = nn.Sequential(nn.Conv2d(3, 256, 8, stride=8), nn.ReLU())  # maps of 4 x 4, as in a ResNet's last blocks
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))
loops = [MaskedLoop(256).eval(), MaskedLoop(256).eval()]
images = torch.rand(64, 3, 1, 1) * torch.rand(64, 3, 32, 32)
balance(loops[1], balance(loops[0], stem(images)))
before = nn.Sequential(stem, *loops, head)
after = nn.Sequential(stem, *(fused(loop) for loop in loops), head)  # stem and head are shared

logits, wanted_logits = (step(model.eval(), images) for model in (after, before))
print(f"logits differ by at most {(logits - wanted_logits).abs().max() / wanted_logits.abs().max():.0e} of their size")
for name, layer in moe_layers(after).items():
    images_of = layer.last_routing().indices.flatten().bincount(minlength=layer.num_experts)
    print(f"layer {name}: images per expert {images_of.tolist()}")

seconds = {"masked loop": [], "fused layer": []}
for _ in range(6):  # in turn, so that whatever else the machine does meets both
    for name, model in (("masked loop", before.train()), ("fused layer", after.train())):
        begin = time.perf_counter()
        step(model, images)
        seconds[name].append(time.perf_counter() - begin)
for name, all_seconds in seconds.items():
    print(f"{name}: {1e3 * median(all_seconds[1:]):.0f} ms for forward and backward of 64 images")
