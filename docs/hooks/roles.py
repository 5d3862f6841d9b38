"""Docstrings name objects as Sphinx does (``:func:`name` ``); here they become links of the site where it has the
object, and code elsewhere."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.\s]+)`")


class Roles(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        rewrite(pkg)


def rewrite(scope: griffe.Module | griffe.Class) -> None:
    """The docstrings of ``scope`` and of all that is defined in it."""
    with_links(scope)
    for member in scope.members.values():
        if member.is_alias:
            continue
        if isinstance(member, (griffe.Module, griffe.Class)):
            rewrite(member)
        else:
            with_links(member)


def with_links(found: Any) -> None:
    if found.docstring is None:
        return

    def link(match: re.Match[str]) -> str:
        short, name = match[1], re.sub(r"\s", "", match[2])
        try:
            path = found.resolve(name)
        except griffe.NameResolutionError:
            path = name
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    text = ROLE.sub(link, found.docstring.value)
    found.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
