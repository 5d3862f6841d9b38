"""What the source distribution holds: all that a build of it needs. `.ci/run` builds its wheels from it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="setuptools is not installed here")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")
PACKAGES = ("robust_moe_kernels", "python/robust_moe")
SUFFIXES = (".py", ".typed", ".yaml", ".json")


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--formats", "tar", "--dist-dir", str(tmp_path)]
    # so that no list of the compiler's inputs adds what MANIFEST.in leaves out
    env = {**os.environ, "RMK_BUILD": "none"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as content:
        held = {name.partition("/")[2] for name in content.getnames()}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES]
    files += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    files += [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")]
    wanted = {str(path.relative_to(ROOT)) for path in files}
    assert {"csrc/bindings.cpp", "robust_moe_kernels/ops/expert_conv/tiles.json"} <= wanted
    assert wanted - held == set()
    strangers = {name.partition("/")[0] for name in held if "/" in name}
    assert {name for name in strangers if not name.endswith(".egg-info")} == {"csrc", "python", "robust_moe_kernels"}
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]
