"""Every public function and class of both packages says what it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import robust_moe
import robust_moe_kernels


def modules(package: ModuleType) -> Iterator[ModuleType]:
    """A package and all modules in it that say what is public, without the implementations of operations: their
    functions are those that ``op.py`` describes."""
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.endswith("_impl"):
            continue
        module = importlib.import_module(found.name)
        if hasattr(module, "__all__"):
            yield module


def undocumented(module: ModuleType) -> list[str]:
    """Public functions and classes of the module without a docstring of their own. A class's generated one, its
    constructor's signature, says nothing, and neither does its base's."""
    found = []
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if getattr(value, "__module__", None) != module.__name__:
            continue  # a constant, or documented where it comes from
        if inspect.isclass(value):
            text = vars(value).get("__doc__") or ""
            if text.startswith(f"{value.__name__}("):
                text = ""
        elif inspect.isroutine(value):
            text = value.__doc__ or ""
        else:
            continue
        if not text.strip():
            found.append(name)
    return found


@pytest.mark.parametrize("package", [robust_moe_kernels, robust_moe], ids=lambda package: package.__name__)
def test_what_is_public_is_documented(package):
    found = {module.__name__: names for module in modules(package) if (names := undocumented(module))}
    assert found == {}


SAMPLE = """
from dataclasses import dataclass
from pathlib import Path
__all__ = ["LIMIT", "Bare", "Fields", "Path", "Told", "bare", "told"]
LIMIT = 3
def bare(): ...
def told(): "What it does."
class Told: "What it is."
class Bare(Told): ...
@dataclass
class Fields:
    size: int
"""


def test_what_is_undocumented_is_found(tmp_path, monkeypatch):
    (tmp_path / "sample_of_docstrings.py").write_text(SAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    assert undocumented(importlib.import_module("sample_of_docstrings")) == ["Bare", "Fields", "bare"]
