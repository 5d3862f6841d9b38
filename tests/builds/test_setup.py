"""What setup.py asks of a system's compilers, by the name of the system; nothing is built."""

from __future__ import annotations

import platform
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed here")

SETUP = Path(__file__).parents[2] / "setup.py"
pytestmark = pytest.mark.skipif(not SETUP.is_file(), reason="needs the source tree")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, which was run without building anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("RMK_BUILD", "none")
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    return runpy.run_path(str(SETUP))


def test_msvc_gets_flags_of_its_own(script):
    flags = script["flags_of"]("win32")
    assert all(flag.startswith("/") for flag in flags.compile)
    assert {"/std:c++17", "/O2", "/fp:precise"} <= set(flags.compile)
    assert not any(flag.startswith("/arch") for flag in flags.compile)  # the least processor runs it
    assert flags.link == ()
    (host,) = [flag for flag in flags.nvcc if flag.startswith("-Xcompiler")]
    assert all(option.startswith("/") for option in host.removeprefix("-Xcompiler=").split(","))
    assert "/MD" in host  # the C library that Python's own extensions link, setuptools' choice for C++
    assert flags.cudart == f"{flags.cuda_libraries[0]}.lib"


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_gcc_and_clang_get_theirs(script, system):
    flags = script["flags_of"](system)
    assert all(flag.startswith("-") for flag in (*flags.compile, *flags.link))
    assert {"-std=c++17", "-O3", "-ffp-contract=off"} <= set(flags.compile)
    assert not any(flag.startswith("-march") for flag in flags.compile)
    assert "-Xcompiler=-fPIC" in flags.nvcc
    assert flags.cudart == f"lib{flags.cuda_libraries[0]}.a"


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_no_system_lets_nvcc_fuse_a_product_and_a_sum(script, system):
    assert {"-std=c++17", "-O3", "--fmad=false"} <= set(script["flags_of"](system).nvcc)


@pytest.mark.parametrize(
    ("system", "machine", "chosen"),
    [("linux", "x86_64", True), ("linux", "aarch64", False), ("darwin", "x86_64", False), ("win32", "AMD64", False)],
)
def test_instruction_sets_are_chosen_from_on_x86_linux_alone(monkeypatch, system, machine, chosen):
    """Elsewhere the files of none are built, nor does the rest ask the processor for any."""
    pytest.importorskip("pybind11", reason="pybind11, which the extension is built with, is not installed here")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("RMK_BUILD", "none")
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    script = runpy.run_path(str(SETUP))
    extension = script["extension"]()
    files = [Path(source).stem for source in extension.sources]
    special = {name for name in files if name.endswith(tuple(script["INSTRUCTION_SETS"]))}
    expected = {"kernels_amx_bf16", "kernels_avx512_bf16", "kernels_avx512", "kernels_avx2"} if chosen else set()
    assert special == expected
    assert (("RMK_X86", "1") in extension.define_macros) is chosen
    assert bool(script["instruction_set"](Path("kernels_amx_bf16.cpp"))) is chosen
    assert not script["instruction_set"](Path("kernels_choice.cpp"))


def test_windows_builds_on_request_alone_and_says_so(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setenv("RMK_BUILD", "auto")
    assert script["build_mode"]() == ("none", None)
    assert "no extension has been built there yet" in capsys.readouterr().err
    monkeypatch.setenv("RMK_BUILD", "cpu")
    assert script["build_mode"]() == ("cpu", None)
