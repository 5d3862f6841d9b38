"""The training methods that the section ``method`` chooses from by its ``name``."""

from __future__ import annotations

from robust_moe.settings import Table

__all__ = ["METHODS"]

METHODS = Table("method")
"""Name -> settings. A method enters by ``@METHODS.register("name")`` on a class with a ``Config`` inside."""
