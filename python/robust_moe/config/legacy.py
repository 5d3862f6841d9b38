"""Configurations of checkpoint format 1, whose sections held the settings of all components, in today's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["modernised"]

Tree = dict[str, Any]

SECTIONS: dict[str, Callable[[Tree], Tree]] = {}  # of a section of format 1, the same in the present format


def modernised(tree: Mapping[str, Any]) -> Tree:
    """The nested dict of a checkpoint of format 1 as :func:`~robust_moe.config.config_from_dict` takes it."""
    return {name: SECTIONS.get(name, dict)(section) for name, section in tree.items()}
