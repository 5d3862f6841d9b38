"""Components from outside the package: modules that register them when they are imported."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from robust_moe.settings.errors import ConfigError, shown

__all__ = ["GROUP", "import_plugins", "installed_plugins"]

GROUP = "robust_moe.plugins"  # of entry points; each names a module


@functools.cache
def installed_plugins() -> tuple[str, ...]:
    """Import the modules that installed distributions name in the entry points ``robust_moe.plugins``, once."""
    found = {entry.module: entry.dist.name if entry.dist else "unknown" for entry in entry_points(group=GROUP)}
    for module, distribution in sorted(found.items()):
        try:
            import_plugins([module])
        except ConfigError as error:
            raise ConfigError(f"{error}; the installed distribution {distribution} names it as a plug-in") from error
    return tuple(sorted(found))


def import_plugins(modules: Iterable[str]) -> None:
    """Import ``modules`` by name, as from the working folder; each registers its components.

    Raises:
        ConfigError: a module that is not there, cannot be imported, or registers a name that is taken.
    """
    here = str(Path.cwd())
    for name in modules:
        if name in sys.modules:
            continue
        if here not in sys.path:
            sys.path.append(here)  # and it stays there: a component may import a file beside it later
        try:
            importlib.import_module(name)
        except ConfigError as error:
            raise ConfigError(f"import: {name}: {error}") from error
        except Exception as error:  # whatever the module's own code raises
            raise ConfigError(
                f"import: expected a module that can be imported, got {shown(name)} ({type(error).__name__}: {error})"
            ) from error
