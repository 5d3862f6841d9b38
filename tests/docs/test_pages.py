"""The README and the pages of docs/, without the tool that makes the site: links, commands and programs in them."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from robust_moe.config import load_config
from robust_moe.models import BasicBlock
from robust_moe_kernels import replace_blocks

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
}
RUN = ["README.md", "docs/layers.md", *(f"docs/tutorials/{name}.md" for name in ("torchvision", "speed", "certify"))]
RUN_ELSEWHERE = {
    "README.md": "its second block, which is the one of evaluate.md, shortened",
    "docs/tutorials/evaluate.md": "tests/robust_moe/test_api.py",
    "docs/tutorials/extend.md": "below, in a process of its own",
    "docs/evaluation.md": "below, with a small model",
    "docs/tools.md": "two lines on general_path, which tests/robust_moe_kernels/modules test",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """What headings are called in links."""
    titles = re.findall(r"^#+ (.*)$", PAGES[page], flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_repository(page):
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[page]):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        name = str(path.relative_to(ROOT))
        if name.startswith("docs/reference/"):  # made with the site, and checked there
            assert page.startswith("docs/"), f"{page}: {target} is no file of the repository"
            continue
        assert path.exists(), f"{page}: {target} is missing"
        if anchor:
            assert anchor in anchors(name), f"{page}: {target} has no #{anchor}"


def test_the_readme_is_short():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 150
    assert {"make demo", "make test"} <= {line.partition("  #")[0].strip() for line in lines}  # as CI calls them


def commands(page: str) -> list[list[str]]:
    """The words of every call of robust-moe in a page."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[1:] for line in words if line[:1] == ["robust-moe"]]


def test_configurations_in_commands_are_valid():
    found = 0
    for page in PAGES:
        for command, *words in commands(page):
            if command not in ("train", "config") or "--import" in words:
                continue
            source, *settings = [word for word in words if not word.startswith("--")]
            if source.isupper():
                continue  # CONFIG stands for any
            load_config(source, settings)
            found += 1
    assert found >= 6


@pytest.mark.parametrize("page", RUN)
def test_programs_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")
    names: dict[str, object] = {"__name__": page}
    for block in code[:1] if page in RUN_ELSEWHERE else code:
        exec(compile(block, page, "exec"), names)


@pytest.mark.slow
def test_calls_of_the_evaluation_page_run():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), BasicBlock(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    model = replace_blocks(nn.Sequential(*body), "1", num_experts=2, top_k=1).eval()
    images = torch.rand(2, 3, 8, 8)
    names = {"model": model, "images": images, "labels": model(images).argmax(1), "index": torch.arange(2)}
    (code,) = blocks("docs/evaluation.md", "python")
    exec(compile(code, "evaluation.md", "exec"), names)
    assert names["x_adv"].shape == images.shape
    assert {"sa", "ra", "ra_e", "ra_r"} <= names["numbers"].keys()


def test_every_program_is_run_or_said_why_not():
    assert {page for page in PAGES if blocks(page, "python")} == {*RUN, *RUN_ELSEWHERE}


def test_components_of_the_tutorial_register_and_run(tmp_path):
    """In a process of its own, since what is registered stays."""
    page, program = "docs/tutorials/extend.md", []
    for block in blocks(page, "python"):
        if file := re.match(r"# (my_\w+)\.py\n", block):
            (tmp_path / f"{file[1]}.py").write_text(block)
        else:
            program.append(block)
    program.append("from robust_moe.config import load_config\n")
    calls = [words for words in commands(page) if "--import" in words]
    assert len(calls) == 2
    for _, source, _, module, *settings in calls:
        program.append(f"import {module}\nload_config({source!r}, {settings!r})\n")
    paths = [str(ROOT), str(ROOT / "python"), str(tmp_path)]
    program.insert(0, f"import sys\nsys.path[:0] = {paths!r}\n")
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_environment_variable_is_in_the_table():
    table = set(re.findall(r"`([A-Z][A-Z_]+)`", PAGES["docs/environment-variables.md"]))
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp")]
    for folder in ("robust_moe_kernels", "python", "benchmarks"):
        sources += (ROOT / folder).rglob("*.py")
    read = set()
    for source in sources:
        text = source.read_text(encoding="utf-8")
        read |= set(re.findall(r"""(?:getenv|environ(?:\.\w+)?)[(\[]"([A-Z_]+)""", text))
        read |= set(re.findall(r"\b(RMK_(?:BUILD|CPU_ISA|CUDA_ARCHS|SANITIZE|TEST_\w+))\b", text))
    assert {"RMK_BUILD", "RMK_CPU_ISA", "MAX_JOBS"} <= read
    assert read - table == set()


SOURCES = [*(ROOT / "robust_moe_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
USERS = {"ConfigError", "DataError", "CheckpointError", "ResumeError", "StudyError"}  # what a command says in a line


def texts(node: ast.AST) -> str:
    """The fixed text in an expression; what is filled in is a line break."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) for part in node.values)
    return "\n"


def messages(source: Path) -> str:
    """The texts in a source, and after them the sentences of its calls of ``expect``."""
    found = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            found.append(texts(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "expect" and len(node.args) == 4:
            _, argument, expected, got = map(texts, node.args)
            found.append(f"{argument}: expected {expected}, got {got}")
    return "\n".join(found)


def rows_of_troubleshooting() -> list[list[str]]:
    """For every message in a first column, the fixed parts of it that are long enough to be told from others."""
    columns = re.findall(r"^\| (.*?) \|", PAGES["docs/troubleshooting.md"], flags=re.MULTILINE)
    rows = [row for column in columns for row in re.findall(r"`([^`]+)`", column) if not row.startswith("zsh")]
    parts = [[part.strip(" (),;.") for part in row.split("...")] for row in rows]
    return [[part for part in row if len(part) > 8] for row in parts]


def test_messages_of_troubleshooting_are_those_of_the_code():
    others = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp")]
    code = "\n".join([*map(messages, SOURCES), *(source.read_text(encoding="utf-8") for source in others)])
    rows = rows_of_troubleshooting()
    assert len(rows) > 100
    assert [part for row in rows for part in row if part not in code] == []


def test_every_file_that_refuses_something_is_in_troubleshooting():
    """The page goes by kinds: of each file that raises an error which the command line says in one line, a message."""
    rows, missing = rows_of_troubleshooting(), []
    for source in (ROOT / "python").rglob("*.py"):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        own = [call for call in raised if ast.unparse(call.func) in USERS and texts(call.args[0]).strip()]
        said = messages(source)
        if own and not any(row and all(part in said for part in row) for row in rows):
            missing.append(str(source.relative_to(ROOT / "python")))
    assert missing == []
