"""Modules import one another in one direction: no circles, in functions or for type checkers either."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"robust_moe_kernels": ROOT / "robust_moe_kernels", "robust_moe": ROOT / "python" / "robust_moe"}


def modules_of(package: str, folder: Path) -> dict[str, Path]:
    """The files of a package by the names of their modules."""
    names = {path: (package, *path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


def imports(package: str, source: str, known: set[str]) -> set[str]:
    """Those of the known modules that a source in a package names in any import statement. ``from a import b`` means
    the module a.b where there is one, else a."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {module if module in known else base for module in inner}
    return found & known


def import_graph() -> dict[str, set[str]]:
    """Every module of both packages with those that it imports."""
    files = {name: path for root, folder in PACKAGES.items() for name, path in modules_of(root, folder).items()}
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = imports(package, path.read_text(), set(files)) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that reach one another, of two modules or more."""

    def reached(start: str) -> set[str]:
        seen, front = set(), [start]
        while front:
            for following in graph[front.pop()] - seen:
                seen.add(following)
                front.append(following)
        return seen

    reach = {name: reached(name) for name in graph}
    found = {frozenset({name, *(other for other in reach[name] if name in reach[other])}) for name in graph}
    return [set(circle) for circle in found if len(circle) > 1]


def test_circles_are_found_wherever_they_are_imported():
    sources = {
        "p": "from p import a\n",
        "p.a": "from p.b import thing\n",
        "p.b": "def late():\n    from .q.c import thing\n",
        "p.q.c": "if TYPE_CHECKING:\n    from ..a import Other\n",
        "p.d": "import p.a\nfrom elsewhere import a\n",
    }
    graph = {name: imports(name.rpartition(".")[0], source, set(sources)) - {name} for name, source in sources.items()}
    assert circles(graph) == [{"p.a", "p.b", "p.q.c"}]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_in_a_circle(package):
    found = [circle for circle in circles(import_graph()) if any(name.split(".")[0] == package for name in circle)]
    assert [sorted(circle) for circle in found] == []


def test_kernels_know_nothing_of_the_trainer():
    graph = import_graph()
    kernels = [name for name in graph if name.split(".")[0] == "robust_moe_kernels"]
    assert len(kernels) > 50
    for name in kernels:
        assert not any(other.split(".")[0] == "robust_moe" for other in graph[name]), name
