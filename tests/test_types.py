"""Types that a type checker reads: marked as there, and said of every function. ``make lint`` runs mypy itself."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "robust_moe_kernels").rglob("*.py"), *(ROOT / "python" / "robust_moe").rglob("*.py")])


@pytest.mark.parametrize("package", ["robust_moe_kernels", "robust_moe"])
def test_a_package_is_marked_as_typed(package):
    assert files(package).joinpath("py.typed").is_file()


def untyped(source: str) -> list[str]:
    """Functions that leave out the type of an argument or of what they return; ``@triton.jit`` functions, whose
    arguments have none, excepted."""
    found = []

    def visit(node: ast.AST, in_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = [ast.unparse(decorator) for decorator in child.decorator_list]
                if not any(name.startswith("triton.jit") for name in decorators):
                    given = child.args
                    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                    if in_class and "staticmethod" not in decorators:
                        arguments = arguments[1:]  # self or cls
                    if child.returns is None or any(a is not None and a.annotation is None for a in arguments):
                        found.append(child.name)
                visit(child, False)
            else:
                visit(child, isinstance(child, ast.ClassDef))

    visit(ast.parse(source), False)
    return found


def test_what_is_untyped_is_found():
    source = """
@triton.jit
def kernel(x, n: tl.constexpr): ...
def whole(x: int, *rest: int, key: int = 1) -> None: ...
def half(x: int, y) -> None: ...
def nothing(x: int): ...
class Thing:
    def method(self, x: int) -> None:
        def inner(y): ...
    @staticmethod
    def static(x) -> None: ...
"""
    assert untyped(source) == ["half", "nothing", "inner", "static"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_function_says_its_types(path):
    assert untyped(path.read_text()) == []
