"""Configurations of checkpoint format 1, whose sections held the settings of all components, in today's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from robust_moe.attacks import ATTACKS
from robust_moe.data import DATASETS, FolderDataSet
from robust_moe.methods import METHODS
from robust_moe.optim import OPTIMIZERS, SCHEDULES
from robust_moe.settings import Table, field_types

__all__ = ["modernised"]

Tree = dict[str, Any]


def _of(table: Table, name: str, tree: Tree, shared: tuple[str, ...]) -> Tree:
    """Those of the ``shared`` settings, which a union of components had, that the component ``name`` has."""
    known = field_types(table[name]) if name in table else ()
    return {key: tree[key] for key in shared if key in tree and key in known}


def _attack(tree: Tree) -> Tree:
    """One section for all attacks."""
    name = tree.get("name", "pgd")
    of_attacks: tuple[str, ...] = ("steps", "alpha", "random_start", "restarts", "loss", "eot_iter", "graph")
    kept = {key: value for key, value in tree.items() if key not in of_attacks}
    if name == "square":  # its steps were its queries, and its loss the margin
        return kept | {new: tree[old] for old, new in (("steps", "queries"), ("restarts", "restarts")) if old in tree}
    if name == "fgsm":  # its step was eps, from the image itself, whatever the section said
        of_attacks = ("loss", "eot_iter", "graph")
    return kept | _of(ATTACKS, name, tree, of_attacks)


def _with_attack(tree: Tree) -> Tree:
    return {**tree, "attack": _attack(tree["attack"])} if "attack" in tree else dict(tree)


def _method(tree: Tree) -> Tree:
    """One section for all methods."""
    common = ("name", "awp_gamma", "awp_warmup_epochs")
    kept = {key: tree[key] for key in common if key in tree}
    return _with_attack(kept | _of(METHODS, tree.get("name", "pgd_at"), tree, tuple(tree)))


def _optim(tree: Tree) -> Tree:
    """One section for all optimisers, and in it all schedules' settings."""
    optimizer, schedule = tree.get("name", "sgd"), tree.get("schedule", "polynomial")
    of_schedules = ("power", "milestones", "lr_min", "cycle_epochs", "rise", "fall")
    of_sgd = ("momentum", "nesterov")
    kept = {key: value for key, value in tree.items() if key not in (*of_schedules, *of_sgd)}
    kept |= _of(OPTIMIZERS, optimizer, tree, of_sgd)
    return {**kept, "schedule": {"name": schedule, **_of(SCHEDULES, schedule, tree, of_schedules)}}


def _data(section: Mapping[str, Any]) -> Tree:
    """Without the root of a data set that has no files."""
    files = issubclass(DATASETS.choose(section["name"], "data.name"), FolderDataSet.Config)
    return {name: value for name, value in section.items() if name != "root" or files}


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
SECTIONS: dict[str, Callable[[Tree], Tree]] = {
    "data": _data,
    "model": _model,
    "method": _method,
    "optim": _optim,
    "eval": _with_attack,
}


def modernised(tree: Mapping[str, Any]) -> Tree:
    """The nested dict of a checkpoint of format 1 as :func:`~robust_moe.config.config_from_dict` takes it."""
    return {name: SECTIONS.get(name, dict)(section) for name, section in tree.items()}
