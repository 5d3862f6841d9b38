"""The fuzzer (tests/fuzz) finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from robust_moe_kernels import native

FUZZ = Path(__file__).parents[1] / "fuzz"
MODULES = ("draws", "calls", "faults", "verdicts")
pytestmark = [
    pytest.mark.skipif(native.why_not_cpu("cpu") is not None, reason="needs the compiled extension"),
    pytest.mark.skipif(sys.platform != "linux", reason="processor time and address space as Linux counts them"),
]

ENDING = """
import os, signal
from calls_as_they_were import Call

def end(impl):
    if impl == "native":
        os.kill(os.getpid(), signal.SIGSEGV)

CALLS = (lambda d: Call(end, {}),)
"""


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(FUZZ))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        del sys.modules[name]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(folder), *arguments], capture_output=True, text=True, timeout=800)


def test_valid_calls_have_no_fault() -> None:
    done = run(FUZZ, "--kind", "valid", "--calls", "300", "--seconds", "700")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 valid calls, 0 invalid ones (0 refused), 0 faults" in done.stdout


def test_every_result_is_compared(fuzz: dict[str, ModuleType]) -> None:
    """One number of a native result, wrong by half of the largest: each op's bound tells."""
    found: dict[str, int] = {}
    for number in range(400):
        d = fuzz["draws"].Draw(str(number))
        call = d.choice(fuzz["calls"].CALLS)(d)
        result, arguments = fuzz["verdicts"].answered(call, 1)
        results = [t for t in fuzz["verdicts"]._leaves(result) if isinstance(t, torch.Tensor) and t.numel()]
        if not results:
            continue
        spoilt = d.choice(results)
        at = d.place(spoilt)
        top = spoilt.double().abs().nan_to_num(0, 0, 0).max().item()
        spoilt[at] = spoilt[at].nan_to_num(0, 0, 0) + max(1.0, top / 2)
        assert fuzz["verdicts"].fault_of(call, True, (result, arguments)), fuzz["verdicts"].described(call)
        name = str(call.function)
        found[name] = found.get(name, 0) + 1
    assert len(found) >= 20


def test_a_written_argument_is_a_fault(fuzz: dict[str, ModuleType]) -> None:
    call = fuzz["calls"].shift(fuzz["draws"].Draw("3"))
    result, arguments = fuzz["verdicts"].answered(call, 1)
    assert fuzz["verdicts"].fault_of(call, True, (result, arguments)) is None
    arguments["scale"] = arguments["scale"] + 1
    assert "argument" in fuzz["verdicts"].fault_of(call, True, (result, arguments))


@pytest.mark.parametrize(
    ("valid", "error", "fault"),
    [(False, ValueError, False), (False, TypeError, False), (False, AssertionError, True), (False, RuntimeError, True),
     (True, ValueError, True)],
)  # fmt: skip
def test_refusals(fuzz: dict[str, ModuleType], valid: bool, error: type[Exception], fault: bool) -> None:
    call = fuzz["calls"].shift(fuzz["draws"].Draw("3"))
    assert (fuzz["verdicts"].fault_of(call, valid, error("why")) is not None) == fault


def test_a_key_is_one_call(fuzz: dict[str, ModuleType]) -> None:
    def text(key: str) -> str:
        d = fuzz["draws"].Draw(key)
        call = d.choice(fuzz["calls"].CALLS)(d)
        call.arguments, note = fuzz["faults"].spoil(d, call.arguments)
        return fuzz["verdicts"].described(call) + note

    keys = [f"{number}" for number in range(50)]
    assert list(map(text, keys)) == list(map(text, keys))
    assert len(set(map(text, keys))) > 45


def test_a_call_that_ends_its_process_is_found_and_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "fuzz"
    shutil.copytree(FUZZ, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "calls.py").rename(folder / "calls_as_they_were.py")
    (folder / "calls.py").write_text(ENDING, encoding="utf-8")
    done = run(folder, "--calls", "2", "--seed", "7", "--kind", "valid", "--seconds", "700")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the process ended: status -11" in done.stdout
    assert "--seed 7 --kind valid --first 0 --calls 1" in done.stdout
    assert "2 faults of 1 kinds" in done.stdout
