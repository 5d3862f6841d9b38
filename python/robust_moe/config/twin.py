"""The dense twin of a configuration with experts: the same network without them, trained in the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from robust_moe.config.schema import TrainConfig
from robust_moe.methods import METHODS, Method
from robust_moe.settings import ConfigError, Resolved, field_types

__all__ = ["dense_twin"]

EXPERTS = ("moe", "mixture", "dual")  # sections of the model
ORIGIN = "--dense"


def dense_twin(found: Resolved[TrainConfig]) -> Resolved[TrainConfig]:
    """The configuration without routed layers, mixture and dual model; all else stays, ``run.out`` with ``-dense`` at
    its end unless an override names it. A method that is about experts gives way to the one that it adds to
    (``dense`` of its class), with what settings they share.

    Raises:
        ConfigError: there are no experts, or an override is about them.
    """
    config, origins = found
    model = config.model
    if not (model.moe.layers or model.mixture.num_experts > 0 or model.dual.enabled):
        raise ConfigError("dense: expected a configuration with experts, got one of a dense network")
    for key, where in origins.items():
        if where == "override" and key.split(".")[:2] in [["model", section] for section in EXPERTS]:
            raise ConfigError(f"dense: expected no setting of experts beside it, got {key}")
    without: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(model) if field.name in EXPERTS
    }
    method = _method(config.method)
    run = config.run
    if origins.get("run.out") != "override":
        run = dataclasses.replace(run, out=f"{run.out}-dense")
    twin = dataclasses.replace(config, model=dataclasses.replace(model, **without), method=method, run=run)
    return Resolved(twin, _origins(origins, config, twin))


def _method(config: Method.Config) -> Method.Config:
    """That of a network without experts, with the settings that both have."""
    name = type(config).owner.dense
    if name is None:
        return config
    other: Any = METHODS[name]
    values = config.values()
    twin: Method.Config = other(**{key: values[key] for key in field_types(other) if key in values})
    return twin


def _origins(origins: Mapping[str, str], before: TrainConfig, after: TrainConfig) -> dict[str, str]:
    """Where settings come from, without those of sections that are gone."""
    gone = tuple(f"model.{section}." for section in EXPERTS)
    kept = {key: where for key, where in origins.items() if not key.startswith(gone)}
    if before.method.name != after.method.name:
        kept = {key: where for key, where in kept.items() if key.split(".")[0] != "method" or _is_in(after.method, key)}
        kept["method.name"] = ORIGIN
    return kept if before.run.out == after.run.out else kept | {"run.out": ORIGIN}


def _is_in(method: Method.Config, key: str) -> bool:
    return key.split(".")[1] in field_types(type(method))
