"""What the site has beside the pages of this folder: pages made from the code, the repository's own texts, and every
file of the repository that a page links to.

A page links to files as they lie in the repository (``../benchmarks/results/cpu/apgd.json``), so that its links work
there too; on the site these files are under ``files/``, and the links say so.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(Path(__file__).parent)]  # for as long as this file is loaded
from settings_page import settings_page  # noqa: E402

TEXTS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
PACKAGES = [  # whose public names the reference shows, in the order of their __all__
    *("robust_moe", "robust_moe.attacks", "robust_moe.evaluation", "robust_moe.analysis", "robust_moe.methods"),
    *("robust_moe.models", "robust_moe.data", "robust_moe.optim", "robust_moe.engine", "robust_moe.config"),
    *("robust_moe.settings", "robust_moe.outputs", "robust_moe.reproduce", "robust_moe.runs"),
    *("robust_moe_kernels", "robust_moe_kernels.modules", "robust_moe_kernels.ops"),
]
SOURCES: dict[str, str] = {}  # page of the site -> file of the repository


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that are not in this folder."""
    SOURCES.clear()
    SOURCES.update({file.src_uri: f"docs/{file.src_uri}" for file in files})
    for source, page in TEXTS.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
        SOURCES[page] = source
    waiting = [page for page in SOURCES if page.endswith(".md")]
    while waiting:
        source = SOURCES[waiting.pop()]
        for target in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            found = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            page = place(found)
            if page in SOURCES or generated(page):
                continue
            if not (ROOT / found).is_file():
                raise PluginError(f"{source}: expected a link to a file of the repository, got {target}")
            files.append(File.generated(config, page, abs_src_path=str(ROOT / found)))
            SOURCES[page] = found
            if page.endswith(".md"):
                waiting.append(page)
    files.append(File.generated(config, "reference/settings.md", content=settings_page()))
    for package in PACKAGES:
        files.append(File.generated(config, f"reference/{package}.md", content=reference(package)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository, as links to where the site has them."""
    here = page.file.src_uri
    if here not in SOURCES:
        return markdown
    source = SOURCES[here]

    def moved(match: re.Match[str]) -> str:
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return posixpath.relpath(place(found), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)


def place(source: str) -> str:
    """Where the site has a file of the repository."""
    if source in TEXTS:
        return TEXTS[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"files/{source}"


def generated(page: str) -> bool:
    return page.startswith("reference/")


def reference(package: str) -> str:
    """The page of a package, for mkdocstrings; of the ops, of each op."""
    if package != "robust_moe_kernels.ops":
        return f"# {package}\n\n" + block(package)
    ops = sorted(path.parent.name for path in (ROOT / "robust_moe_kernels/ops").glob("*/__init__.py"))
    return f"# {package}\n\n" + "\n".join(f"## {op}\n\n" + block(f"{package}.{op}", level=3) for op in ops)


def block(package: str, level: int = 2) -> str:
    """What a package has in ``__all__``.

    A function that is called like its module hides it, and only the module is found under that name in the sources;
    such a function stands after the others, by its own place.
    """
    module = importlib.import_module(package)
    names = [name for name in module.__all__ if not name.startswith("__")]
    apart = [name for name in names if hides_its_module(module, name)]
    members = "".join(f"        - {name}\n" for name in names if name not in apart)
    text = f"::: {package}\n    options:\n      heading_level: {level}\n      members:\n{members}\n"
    for name in apart:
        path = f"{getattr(module, name).__module__}.{name}"
        if path.partition(".")[0] == package.partition(".")[0]:
            text += f"::: {path}\n    options:\n      heading_level: {level}\n      show_root_heading: true\n"
            text += "      show_root_toc_entry: true\n\n"
        else:
            text += f"[`{name}`][{path}] is the one of `{path.partition('.')[0]}`.\n\n"
    return text


def hides_its_module(module: ModuleType, name: str) -> bool:
    return getattr(getattr(module, name), "__module__", "").rpartition(".")[2] == name
