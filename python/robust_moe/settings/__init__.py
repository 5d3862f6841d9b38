"""Settings that belong to their component: frozen typed dataclasses, tables of components, nested dicts to objects.

This package knows no component. An attack, a method, a gate, a model or a data set owns a :class:`Config` whose fields
are made by :func:`setting`, and registers in the :class:`Table` of its kind; :func:`resolve` makes the objects from
what a YAML file, an override or a checkpoint says.
"""

from robust_moe.settings.config import Config, field_types, plain, replaced
from robust_moe.settings.errors import ConfigError, choose, hint, parse_fraction, shown
from robust_moe.settings.fields import setting
from robust_moe.settings.plugins import import_plugins, installed_plugins
from robust_moe.settings.resolve import Layer, Resolved, resolve
from robust_moe.settings.table import Table, fixed
from robust_moe.settings.text import Plain, Written, read_list, read_yaml

__all__ = [
    "Config",
    "ConfigError",
    "Layer",
    "Plain",
    "Resolved",
    "Table",
    "Written",
    "choose",
    "field_types",
    "fixed",
    "hint",
    "import_plugins",
    "installed_plugins",
    "parse_fraction",
    "plain",
    "read_list",
    "read_yaml",
    "replaced",
    "resolve",
    "setting",
    "shown",
]
