"""What methods share that train the gates of a routed model by a loss of the gates' own."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from robust_moe.methods.adversarial import AdversarialMethod
from robust_moe.methods.rt_er import expect_experts
from robust_moe.models.config import ModelConfig
from robust_moe.settings import ConfigError
from robust_moe_kernels.modules import FixedGate, moe_layers

__all__ = ["GatePass", "RoutedMethod", "experts_and_gates", "run_gates"]


class RoutedMethod(AdversarialMethod):
    """A method for one routed model: its gates choose between two experts or more.

    Raises:
        ConfigError: a model without two routed experts, a dual model, or gates that are not trained.
    """

    dense = "pgd_at"

    def __init__(self, config: AdversarialMethod.Config, model: ModelConfig, devices: int = 1) -> None:
        super().__init__(config, model, devices)
        expect_experts(model, config.name)
        if model.dual.enabled:
            raise ConfigError(
                f"method.name: expected jtdmoe for a dual model (model.dual.enabled), got {config.name!r}"
            )
        if model.moe.layers:
            gate = model.moe.gate
            if issubclass(type(gate).owner, FixedGate):
                raise ConfigError(
                    f"model.moe.gate.name: expected a gate that is trained for {config.name}, got {gate.name!r}"
                )
        elif model.mixture.router.frozen:
            raise ConfigError(
                f"model.mixture.router.frozen: expected false for {config.name}, which trains the router, got true"
            )


def experts_and_gates(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(all parameters but those of the gates, those of the gates)."""
    gates = [parameter for layer in moe_layers(model).values() for parameter in layer.gate.parameters()]
    known = {id(parameter) for parameter in gates}
    return [parameter for parameter in model.parameters() if id(parameter) not in known], gates


class GatePass(NamedTuple):
    """What one gate read and answered."""

    inputs: Tensor  # [B, C, H, W], the maps that come to the layer; of a mixture of networks the images; tokens [N, C]
    logits: Tensor  # [N, E], before any noise


class _Enough(Exception):
    """Every gate has run."""


def run_gates(model: nn.Module, images: Tensor) -> dict[str, GatePass]:
    """What each layer's gate reads and answers for ``images`` [B, C, H, W], by the layer's name; on the graph of both.

    A forward of the model as it is (mode, noise, imposed routes) that ends with the last gate: what follows costs
    nothing, and its batch norms do not see the images. The layers before it have a record of this forward afterwards.

    Raises:
        RuntimeError: the forward does not reach some gate.
    """
    layers = moe_layers(model)
    found: dict[str, GatePass] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        found[name] = GatePass(inputs[0], logits)
        if len(found) == len(layers):
            raise _Enough

    hooks = [layer.gate.register_forward_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        model(images)
    except _Enough:
        return {name: found[name] for name in layers}
    finally:
        for hook in hooks:
            hook.remove()
    missed = ", ".join(repr(name) for name in layers if name not in found)
    raise RuntimeError(f"model: expected a forward through every gate, got none through {missed or 'any'}")
