"""Signs that a run has gone wrong: weights that are no longer numbers, routing that has collapsed or does not learn, an
attack that does not attack."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from robust_moe.engine.sharding import here, whole
from robust_moe.evaluation.scorer import COLLAPSE_SHARE, LayerRouting
from robust_moe_kernels.modules import moe_layers

__all__ = ["GateWatch", "describe_collapse", "describe_gain", "state_is_finite"]


def state_is_finite(model: nn.Module) -> bool:
    """Whether every parameter and floating buffer, what lies of them in this process, is free of NaN and infinity.
    Reads the host once."""
    tensors = [
        here(tensor.detach()) for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()
    ]
    # the sum of |x| is NaN or infinite as soon as one element is, and needs no mask in memory
    return not tensors or bool(torch.isfinite(torch.stack([tensor.double().abs().sum() for tensor in tensors])).all())


class GateWatch:
    """Whether the gates of a model get gradients, in any update of an interval that trains them, and their weights
    move.

    Layers with one expert, or whose gate has nothing to train, are not watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {
            name: layer
            for name, layer in moe_layers(model).items()
            if layer.num_experts > 1 and any(parameter.requires_grad for parameter in layer.gate.parameters())
        }
        self._start()

    def _start(self) -> None:
        self.weights = {
            name: [p.detach().clone() for p in layer.gate.parameters()] for name, layer in self.layers.items()
        }
        # bool scalars on the device: in an update that trains the gate some gradient was not zero
        self.seen: dict[str, Tensor] = {}
        self.asked: set[str] = set()  # layers whose gate some update was to train
        self.steps = False  # some update had a rate above 0

    def gradients(self) -> dict[str, Tensor]:
        """After a backward: whether some gradient of a layer's gate is not zero, as bool scalars on the device, by
        layer; none for a layer whose gate got no gradient at all."""
        found = {}
        for name, layer in self.layers.items():
            parameters = layer.gate.parameters()
            flags = [whole(parameter.grad.any()) for parameter in parameters if parameter.grad is not None]
            if flags:
                found[name] = reduce(torch.logical_or, flags)
        return found

    def look(
        self, rate: float, gradients: Mapping[str, Tensor], trains: Collection[nn.Parameter] | None = None
    ) -> None:
        """Take in the :meth:`gradients`, of gates that are trained, before a step of learning rate ``rate`` that moves
        ``trains`` (None: all); never waits for the device."""
        moving = None if trains is None else {id(parameter) for parameter in trains}
        for name, layer in self.layers.items():
            if moving is None or any(id(parameter) in moving for parameter in layer.gate.parameters()):
                self.asked.add(name)
                if name in gradients:
                    self.seen[name] = gradients[name] | self.seen[name] if name in self.seen else gradients[name]
        self.steps |= rate > 0

    def warnings(self) -> dict[str, str]:
        """What is wrong with the gates since the last call, by layer. Reads the host."""
        found = {}
        for name, layer in self.layers.items():
            if layer.fixed_expert is not None or name not in self.asked:
                continue
            pairs = zip(layer.gate.parameters(), self.weights[name], strict=True)
            moved = [whole((p != old).any()) for p, old in pairs]
            if name not in self.seen or not bool(self.seen[name]):
                found[name] = f"{name or 'the mixture'}: its gate gets no gradient, so its routing does not learn"
            elif self.steps and not bool(torch.stack(moved).any()):
                found[name] = f"{name or 'the mixture'}: its gate's weights do not move, though they get a gradient"
        self._start()
        return found


def describe_collapse(name: str, shares: LayerRouting) -> str:
    """The warning for a layer whose routing has collapsed."""
    expert = max(range(len(shares.first)), key=shares.first.__getitem__)
    return (
        f"{name or 'the mixture'}: routing has collapsed: expert {expert} is the first choice of "
        f"{shares.first[expert]:.0%} of the images (more than {COLLAPSE_SHARE:.0%}); a larger "
        "model.moe.balance.weight spreads them"
    )


def describe_gain(gain: float) -> str:
    """The warning for an attack that gains nothing: on the clean images in cross-entropy, or on its own random start in
    an objective that compares with the clean image."""
    return (
        f"method.attack: the attack does not raise the loss: its images change it by {gain:+.3g} on average; look at "
        "its eps, steps and alpha"
    )
