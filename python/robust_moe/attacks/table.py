"""The attacks that a section ``attack`` chooses from by its ``name``."""

from __future__ import annotations

from robust_moe.settings import Table

__all__ = ["ATTACKS"]

ATTACKS = Table("attack")
"""Name -> settings. An attack enters by ``@ATTACKS.register("name")`` on a class with a ``Config`` inside."""
