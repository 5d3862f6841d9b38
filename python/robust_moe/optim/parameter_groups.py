"""Which parameters the weight decay pulls on, as parameter groups of an optimiser."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robust_moe.weights import filters_and_matrices, stacked_name
from robust_moe_kernels.modules import moe_layers

__all__ = ["parameter_groups", "regrouped"]


def parameter_groups(model: nn.Module, weight_decay_on: str) -> list[dict[str, Any]]:
    """The groups of ``optim.weight_decay_on``: one of all parameters, or those that decay and those that do not.

    ``"weights"``: filters and matrices decay; biases and the scales and shifts of normalisations do not, as in ResNet
    recipes since He et al. (2019, arXiv:1812.01187, section 3.1), and neither do gates and routers, whose decay would
    pull every route towards a tie.
    """
    groups = _split(model, weight_decay_on)
    return [{"params": groups[0]}, *({"params": group, "weight_decay": 0.0} for group in groups[1:])]


def regrouped(state: dict[str, Any], model: nn.Module, before: str, now: str) -> dict[str, Any]:
    """The ``state_dict`` of an optimiser of ``model`` with the groups of ``weight_decay_on=before``, for one with those
    of ``now``: every parameter keeps its state. The options of the groups are those of the first group before. A state
    of older checkpoints, with the experts of a layer in one tensor, is taken apart."""
    state = _by_expert(state, model, before)
    if before == now:
        return state
    place = {id(p): number for number, p in enumerate(p for group in _split(model, before) for p in group)}
    groups = _split(model, now)
    old = [place[id(p)] for group in groups for p in group]
    numbers = iter(range(len(old)))
    options = state["param_groups"][0]
    return {
        **state,
        "state": {number: state["state"][was] for number, was in enumerate(old) if was in state["state"]},
        "param_groups": [{**options, "params": [next(numbers) for _ in group]} for group in groups],
    }


def _by_expert(state: dict[str, Any], model: nn.Module, on: str) -> dict[str, Any]:
    groups = _split(model, on)
    names = {id(p): stacked_name(name) for name, p in model.named_parameters()}
    place: dict[str, int] = {}
    for p in (p for group in groups for p in group):
        place.setdefault(names[id(p)][0], len(place))
    known = sum(len(group["params"]) for group in state["param_groups"])
    if known != len(place) or known == len(names):
        return state

    def of(p: nn.Parameter) -> dict[str, Any]:
        name, expert = names[id(p)]
        entry = state["state"].get(place[name], {})
        if expert is None:
            return entry
        stacks = {key for key, value in entry.items() if isinstance(value, Tensor) and value.dim() == p.dim() + 1}
        return {key: value[expert] if key in stacks else value for key, value in entry.items()}

    numbers = iter(range(len(names)))
    pairs = zip(state["param_groups"], groups, strict=True)
    parts = [{**options, "params": [next(numbers) for _ in group]} for options, group in pairs]
    entries = {number: of(p) for number, p in enumerate(p for group in groups for p in group)}
    return {**state, "state": {k: v for k, v in entries.items() if v}, "param_groups": parts}


def _split(model: nn.Module, on: str) -> list[list[nn.Parameter]]:
    everything = list(model.parameters())
    if on == "all":
        return [everything]
    gates = {id(p) for layer in moe_layers(model).values() for p in layer.gate.parameters()}
    decayed = {id(p) for p in filters_and_matrices(model)} - gates
    return [[p for p in everything if id(p) in decayed], [p for p in everything if id(p) not in decayed]]
