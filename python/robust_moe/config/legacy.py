"""Configurations of checkpoint format 1, whose sections held the settings of all components, in today's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["modernised"]

Tree = dict[str, Any]

# Of each attack, the settings of format 1's section that it has, by their present names.
_CLIMB = {"eot_iter": "eot_iter", "graph": "graph", "loss": "loss"}
_PGD = {**_CLIMB, **{name: name for name in ("steps", "alpha", "random_start", "restarts")}}
_COMMON = {"steps": "steps", "restarts": "restarts"}
_APGD = {**_COMMON, "eot_iter": "eot_iter"}
ATTACKS: dict[str, dict[str, str]] = {
    "pgd": _PGD,
    "fgsm": _CLIMB,
    "apgd-ce": _APGD,
    "apgd-dlr": _APGD,
    "apgd-t": _APGD,
    "fab": _COMMON,
    "fab-t": _COMMON,
    "square": {"steps": "queries", "restarts": "restarts"},
    "autoattack": _COMMON,
}


def _attack(section: Mapping[str, Any]) -> Tree:
    names = {"name": "name", "eps": "eps", "norm": "norm", **ATTACKS.get(section["name"], {})}
    return {names[name]: value for name, value in section.items() if name in names}


def _with_attack(section: Mapping[str, Any]) -> Tree:
    return {**section, "attack": _attack(section["attack"])} if "attack" in section else dict(section)


def _model(tree: Tree) -> Tree:
    """A width or depth of null was the network's own; the balance loss is a component now, with its weight."""
    moe, dual = dict(tree.get("moe", {})), dict(tree.get("dual", {}))
    weight = moe.pop("balance_weight", None)
    if weight is not None and moe.get("balance", "entropy") != "none":
        moe["balance"] = {"name": moe.get("balance", "entropy"), "weight": weight}
    standard = {key: value for key, value in dual.pop("standard", {}).items() if value is not None}
    if "experts" in standard:
        dual["experts"] = standard.pop("experts")
    if standard:
        dual["standard"] = standard
    own = {key: value for key, value in tree.items() if not (key in ("width", "blocks") and value is None)}
    return own | {"moe": moe, "dual": dual}


# Of a section of format 1, the same in the present format.
SECTIONS: dict[str, Callable[[Tree], Tree]] = {"model": _model, "method": _with_attack, "eval": _with_attack}


def modernised(tree: Mapping[str, Any]) -> Tree:
    """The nested dict of a checkpoint of format 1 as :func:`~robust_moe.config.config_from_dict` takes it."""
    return {name: SECTIONS.get(name, dict)(section) for name, section in tree.items()}
