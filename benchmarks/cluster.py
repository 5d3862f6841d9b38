"""What a training step takes on many GPUs, on paper: computing, sums of gradients, what weights in parts save of
memory (``run.strategy=fsdp``), and what experts spread over the GPUs would save.

``python -m benchmarks cluster`` prints the tables of docs/clusters.md. Nothing here was measured on more than one GPU:
every assumption is a constant below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robust_moe.analysis.cost import model_cost
from robust_moe.models import LinearGateConfig, ModelConfig, MoEConfig, ResNet18Config, ViTSmallConfig, build_model
from robust_moe_kernels.modules import MoELayer

__all__ = ["Network", "Step", "held", "main", "network", "step", "tables", "transformer"]

# Of one GPU: a PGD-7 step of a ResNet-18 with four experts in bf16-mixed, README.md and benchmarks/results/h100. More
# experts cost it next to nothing, as k of them run for an image; fewer images a GPU cost it speed, which is left out.
IMAGES_PER_SECOND = 12_158
PEAK = 989e12  # FLOP/s of an H100 SXM in bfloat16, dense: NVIDIA's data sheet
PASSES = 2 * 7 + 3  # forwards' worth: seven attack steps of a forward and a gradient to the image; one training pass
EXCHANGES = PASSES - 1  # of them over a layer with maps going there and back: the weights' gradient needs no others

GPUS = 8  # in a machine
NVLINK = 450e9  # bytes/s of a GPU in each direction, H100 SXM
INFINIBAND = 50e9  # bytes/s of a network card in each direction: 400 Gb/s
HOP = 5e-6  # seconds that a message takes besides its bytes, between machines
HOP_INSIDE = 1e-6  # inside of one

GRADIENT = 4  # bytes of a number: gradients are float32 in bf16-mixed
WEIGHT = 4  # likewise weights, their momentum and their moving average
STATE = WEIGHT + GRADIENT + 4 + 4  # of all four
CAST = 2  # bytes of a number of the copies that a pass computes with: bfloat16
MAP = 2  # bytes of a number of a map: bfloat16
TOP_K = 2


@dataclass(frozen=True)
class Network:
    """A network with MoE layers of E experts."""

    experts: int
    flop: float  # of a forward of an image
    dense: int  # parameters outside of the experts
    expert: int  # parameters of one
    row: int  # numbers of a map that an expert takes, and of one that it gives
    layers: int = 1  # that are routed

    @property
    def gradient_bytes(self) -> int:
        """Of all parameters."""
        return GRADIENT * self.parameters

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.dense + self.layers * self.experts * self.expert


def network(experts: int) -> Network:
    """A ResNet-18 at 32 pixels whose layer4.1 is ``experts`` experts, by the package's own counter. Raises ValueError
    for fewer than two."""
    return _counted(ResNet18Config(moe=MoEConfig(layers=("layer4.1",), num_experts=TOP_K)), 32, experts, 512 * 4 * 4)


def transformer(experts: int) -> Network:
    """Likewise a ViT-S/16 at 224 pixels, every second of its twelve MLPs routed token by token."""
    layers = tuple(f"blocks.{i}.mlp" for i in range(1, 12, 2))
    moe = MoEConfig(layers=layers, num_experts=TOP_K, gate=LinearGateConfig())
    return _counted(ViTSmallConfig(moe=moe), 224, experts, 384)


def _counted(config: ModelConfig, pixels: int, experts: int, row: int) -> Network:
    if experts < TOP_K:
        raise ValueError(f"experts: expected at least {TOP_K}, got {experts}")
    model = build_model(config, num_classes=10, channels=3, image_size=pixels)
    cost = model_cost(model, torch.rand(1, 3, pixels, pixels))
    layers = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    expert = sum(parameter.numel() for parameter in layers[0].experts.parameters()) // TOP_K
    gate = sum(parameter.numel() for parameter in layers[0].gate.parameters()) // TOP_K  # an output for each expert
    dense = cost.parameters + len(layers) * (experts * gate - TOP_K * (expert + gate))
    return Network(experts, 2.0 * cost.multiply_adds, dense, expert, row, len(layers))


def held(net: Network, gpus: int) -> int:
    """Bytes of weights, gradients, momentum and moving average that a GPU holds in a step's fullest moment, ``gpus`` of
    them with a part each; 1: each has all of them. The bfloat16 copies of the experts' filters are among them, buffers
    of a fixed size are not.

    In parts, the fullest moment is that of an attack, for which all weights are gathered and before which the gradients
    are gone, or that of the backward through a layer: its weights, its gradients, and these once more in the buffer
    that is scattered; the weights of the next layer, which FSDP2 gathers ahead, and of what is in no layer.
    """
    layer = net.experts * net.expert
    copies = CAST * net.layers * layer
    if gpus == 1:
        return STATE * net.parameters + copies
    attacked = (STATE - GRADIENT) * net.parameters // gpus + WEIGHT * net.parameters
    learned = STATE * net.parameters // gpus + (WEIGHT + 2 * GRADIENT) * layer + WEIGHT * net.dense
    return max(attacked, learned + WEIGHT * layer * (net.layers > 1)) + copies


@dataclass(frozen=True)
class Step:
    """Seconds of a step's parts."""

    compute: float
    sums: float  # of gradients over all GPUs, after the backward
    exchange: float = 0.0  # of images' maps between GPUs with different experts

    @property
    def talking(self) -> float:
        """Share of the step in which nothing is computed."""
        return 1.0 - self.compute / (self.compute + self.sums + self.exchange)


def step(net: Network, gpus: int, images: int, sharded: int = 1, cards: int = GPUS) -> Step:
    """A step of ``images`` images a GPU.

    Args:
        gpus: of ``gpus / 8`` machines.
        sharded: GPUs over which the experts of a layer are spread, a machine's or a multiple; 1: every GPU has all of
            them, as today.
        cards: network cards of a machine.
    """
    compute = images / IMAGES_PER_SECOND
    experts = GRADIENT * net.experts * net.expert
    sums = _sum(GRADIENT * net.dense + experts, gpus, cards)
    exchange = 0.0
    if sharded > 1:
        sums = _sum(GRADIENT * net.dense, gpus, cards)
        sums += _between(experts / sharded * (GPUS / cards), gpus // sharded)  # with the GPUs that have the same ones
        exchange = _exchange(net, images, sharded, cards)
    return Step(compute, sums, exchange)


def _sum(size: float, gpus: int, cards: int) -> float:
    """Seconds of a sum of ``size`` bytes over all GPUs: reduced and scattered in each machine, summed between machines
    part by part, and gathered in each machine; by rings."""
    inside = min(gpus, GPUS)
    machines = gpus // inside
    within = 2 * (inside - 1) * (size / inside / NVLINK + HOP_INSIDE)
    return within + _between(size / cards, machines)


def _between(size: float, machines: int) -> float:
    """Seconds of a sum over machines of ``size`` bytes a network card, by a ring."""
    return 2 * (machines - 1) * (size / machines / INFINIBAND + HOP)


def _exchange(net: Network, images: int, sharded: int, cards: int) -> float:
    """Seconds in which maps go to the GPU of their expert and back, in each pass over the layer; every expert gets as
    many images as any other."""
    size = images * TOP_K * net.row * MAP
    inside = min(sharded, GPUS)
    within = size * (inside - 1) / sharded / NVLINK + HOP_INSIDE * (inside - 1)
    outside = size * (sharded - inside) / sharded * (GPUS / cards) / INFINIBAND + HOP * (sharded > GPUS)
    return EXCHANGES * 2 * max(within, outside)


def tables() -> list[str]:
    """The tables as Markdown lines."""
    lines = [
        "| E | parameters | gradients | images | computing | sums on 8 GPUs | on 64 | on 512 | 512, one card each |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for experts in (4, 8, 16, 32):
        net = network(experts)
        for images in (128, 640):
            cells = [_sums(step(net, gpus, images)) for gpus in (8, 64, 512)]
            cells.append(_sums(step(net, 512, images, cards=1)))
            size = net.gradient_bytes
            first = step(net, 8, images)
            lines.append(
                f"| {experts} | {size / GRADIENT / 1e6:.0f} M | {size / 1e6:.0f} MB | {images} | "
                f"{_ms(first.compute)} | {' | '.join(cells)} |"
            )
    net = network(32)
    lines += [
        "",
        "| E = 32, 128 images | 64 GPUs: sums | exchange | of the step | 512 GPUs: sums | exchange | of the step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, sharded in (("all experts on every GPU", 1), ("spread over a machine", 8), ("one expert a GPU", 32)):
        found = [step(net, gpus, 128, sharded) for gpus in (64, 512)]
        cells = [f"{_ms(each.sums)} | {_ms(each.exchange)} | {each.talking:.0%}" for each in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| network | E | parameters | all on every GPU | in parts on 8 GPUs | on 64 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, make in (("ResNet-18, `layer4.1`", network), ("ViT-S/16, six MLPs", transformer)):
        for experts in (32, 128, 512):
            net = make(experts)
            sizes = [f"{held(net, gpus) / 1e9:.1f} GB" for gpus in (1, 8, 64)]
            lines.append(f"| {name} | {experts} | {net.parameters / 1e6:,.0f} M | {' | '.join(sizes)} |")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _sums(each: Step) -> str:
    return f"{_ms(each.sums)} ({each.talking:.0%})"


def main() -> None:
    """Print the tables, and what the measured speed of one GPU is of its peak."""
    net = network(4)
    used = IMAGES_PER_SECOND * PASSES * net.flop / PEAK
    print(
        f"{IMAGES_PER_SECOND:,} images/s of one GPU x {PASSES} x {net.flop / 1e9:.2f} GFLOP: {used:.0%} of its peak\n"
    )
    print("\n".join(tables()))


if __name__ == "__main__":
    main()
