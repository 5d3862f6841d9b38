"""The site is built as ``make docs`` builds it, strictly, and nothing in it leads nowhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from robust_moe.commands.config import settings_of
from robust_moe.config import load_config, preset_names

for needed in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(needed, reason="the extra docs is not installed: pip install '.[docs]'")

ROOT = Path(__file__).parents[2]
NAV = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PACKAGES = re.findall(r"reference/(robust_moe[\w.]*)\.md", NAV)
PACKAGES.remove("robust_moe_kernels.ops")  # has a part for each op
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page leads to, what it loads, and the places in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places |= {found[name] or "" for name in ("id", "name") if name in found}
        target = found.get("href") or found.get("src")
        if target and tag == "a":
            self.links.append(target)
        elif target and (tag in ("img", "script", "iframe") or found.get("rel") in ("stylesheet", "icon")):
            self.loaded.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python")))}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_lead_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for target in (*page.links, *page.loaded):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            known = there.is_file() and (
                not parts.fragment or there not in pages or unquote(parts.fragment) in pages[there].places
            )
            if not known:
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


def test_a_page_loads_nothing_from_elsewhere(pages):
    assert [target for page in pages.values() for target in page.loaded if urlsplit(target).netloc] == []


def test_every_setting_of_every_preset_is_in_the_list(site):
    text = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for preset in preset_names():
        for row in settings_of(load_config(preset), {}):
            name = row.key.rpartition(".")[2]
            assert name == "name" or f"{name}</code>" in text, row.key


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package, pages, site):
    page = pages[site / "reference" / f"{package}.html"]
    module = importlib.import_module(package)
    for name in module.__all__:
        own = f"{getattr(getattr(module, name), '__module__', package)}.{name}"
        elsewhere = any(target.endswith(f"#{own}") for target in page.links)
        assert {f"{package}.{name}", own} & page.places or elsewhere or name.startswith("__"), name
