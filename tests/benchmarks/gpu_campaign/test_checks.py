"""Nothing is timed before it is right: the campaign's checks of the convolutions, and what follows from them."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed here")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_campaign import conv_check, correctness, products
from benchmarks.gpu_campaign.conv_cases import OPERATIONS, ConvCase, Operands, library, row_counts
from benchmarks.gpu_campaign.record import Record, read
from robust_moe.benchmarks.layer_case import Case

CPU = torch.device("cpu")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "lines", tmp_path, 600, dry=True)


def test_rows_are_spread_evenly_or_not():
    assert row_counts(10, 4, "even") == (3, 3, 2, 2)
    assert row_counts(200, 8, "uneven")[-2:] == (1, 0)
    for rows, experts in ((7, 4), (200, 8), (256, 16), (5, 3)):
        for spread in ("even", "uneven"):
            counts = row_counts(rows, experts, spread)
            assert sum(counts) == rows and len(counts) == experts and min(counts) >= 0


@pytest.mark.parametrize(("size", "kernel", "stride"), [(4, 3, 1), (8, 3, 2), (4, 1, 2)])
def test_work_counts_the_products_with_pixels(size, kernel, stride):
    case = ConvCase((3, 0, 2), 4, size, kernel, stride)
    x = torch.ones(5, 4, size, size)
    touched = library(Operands.of(case, torch.float32, CPU)._replace(x=x, weight=torch.ones(3, 4, 4, kernel, kernel)),
                      "forward", torch.float32)  # fmt: skip
    assert case.gflop() * 1e9 == pytest.approx(2 * float(touched.sum()))


def test_the_librarys_answers_are_autograds():
    operands = Operands.of(ConvCase((3, 0, 2), 4, gather=True), torch.float64, CPU)
    x = operands.x[operands.sample].requires_grad_()
    weight = operands.weight.clone().requires_grad_()
    out = torch.cat(
        [
            nn.functional.conv2d(x[:3], weight[0], padding=1),
            nn.functional.conv2d(x[3:], weight[2], padding=1),
        ]
    )
    wanted = [out, *torch.autograd.grad(out, [x, weight], operands.d_out)]
    for operation, value in zip(OPERATIONS, wanted, strict=True):
        torch.testing.assert_close(library(operands, operation, torch.float64), value)


def test_twice_the_librarys_error_passes_and_nan_does_not():
    assert conv_check.verdict("bf16", 1.9e-2, 1e-2)["ok"] and not conv_check.verdict("bf16", 2.1e-2, 1e-2)["ok"]
    assert conv_check.verdict("ieee", 1.9e-6, 0.0)["ok"] and not conv_check.verdict("ieee", 2.1e-6, 0.0)["ok"]
    assert not conv_check.verdict("ieee", math.nan, 1e-6)["ok"]


def test_a_wrong_kernel_is_seen(monkeypatch):
    def wrong(operands, operation, choice):
        return lambda: 1.01 * library(operands, operation, operands.x.dtype)

    monkeypatch.setattr(conv_check, "choices", lambda operands, operation: [("wrong", None), ("wrong too", None)])
    monkeypatch.setattr(conv_check, "runner", wrong)
    rows = list(conv_check.check("ieee", ["forward", "wgrad"], True, CPU))
    assert len(rows) == 12 and not any(row["ok"] for row in rows)
    shares = [list(conv_check.check("ieee", ["forward", "wgrad"], True, CPU, share=(i, 2))) for i in range(2)]
    assert shares == [rows[::2], rows[1::2]]  # each candidate in one of them
    assert all(row["error"] == pytest.approx(0.01, rel=1e-3) for row in rows)
    assert list(conv_check.check("ieee", ["forward", "wgrad"], True, CPU, skip=4)) == rows[4:]


WORKER = """
import json, os, sys
skip = int(sys.argv[sys.argv.index("--skip") + 1])
for number in range(skip, 5):
    if number == 2:
        os.abort()  # as a kernel that breaks the device does
    print(json.dumps({"candidate": number, "ok": True, "error": 0.0}), flush=True)
"""


def test_a_candidate_that_ends_its_process_costs_no_other(record, tmp_path):
    rows = correctness.check_group(record, [sys.executable, "-c", WORKER], "bf16", "forward")
    assert [row["ok"] for row in rows] == [True, True, False, True, True]
    assert rows[2]["candidate"] == "number 2" and rows[2]["error"] == "its process ended with status -6"
    assert len(read(tmp_path / "lines")["rows"]) == 5


ANNOUNCED = """
import json, os, signal, sys
skip = int(sys.argv[sys.argv.index("--skip") + 1])
print("a library's remark", 7, flush=True)
print("7", flush=True)
for number in range(skip, 3):
    about = {"mode": "bf16", "operation": "wgrad", "candidate": f"carry {number}"}
    print(json.dumps({"next": about}), flush=True)
    if number == 1:
        ENDING
    print(json.dumps(about | {"ok": True, "error": 0.0}), flush=True)
print('{"ok": tr', flush=True)
"""


def test_a_candidate_that_ends_its_process_is_named(record):
    command = [sys.executable, "-c", ANNOUNCED.replace("ENDING", "os.abort()")]
    rows = correctness.check_group(record, command, "bf16", "forward,wgrad")
    assert [row["candidate"] for row in rows] == ["carry 0", "carry 1", "carry 2"]
    assert [row["ok"] for row in rows] == [True, False, True] and {row["operation"] for row in rows} == {"wgrad"}


def test_a_lack_of_time_is_no_wrong_result(record, tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, "AFTER", record.left() - 2)
    command = [sys.executable, "-c", ANNOUNCED.replace("ENDING", "signal.pause()")]
    rows = correctness.check_group(record, command, "bf16", "wgrad")
    assert all(row["ok"] for row in rows)
    (said,) = read(tmp_path / "lines")["said"]
    assert said.startswith("bf16 wgrad: stopped for want of time")


def test_a_layer_that_cannot_be_captured_is_said(tmp_path, monkeypatch):
    def fail(run):
        raise RuntimeError("called a synchronizing CUDA operation\nmore")

    class OnTheCPU(Record):
        device = CPU

    monkeypatch.setattr(correctness, "_replayed", fail)
    small = Case(4, batch=6, channels=16)
    monkeypatch.setattr(correctness, "Case", lambda *_, **__: small)
    record = OnTheCPU(tmp_path / "lines", tmp_path, 600)
    monkeypatch.setattr(correctness.torch, "bfloat16", torch.float32)  # a layer that a CPU can compute
    assert not correctness._graph_is_eager(record, 4)
    found = read(tmp_path / "lines")
    assert found["rows"] == [{"check": "graph", "E": 4, "ok": False}]
    assert found["said"] == ["graph of a layer, E=4: not captured, RuntimeError: called a synchronizing CUDA operation"]


def test_memcheck_asks_about_kernels_and_not_about_the_drivers_refusals(monkeypatch):
    monkeypatch.setattr(correctness.shutil, "which", lambda name: f"/bin/{name}")
    command = correctness.memcheck_command(tiny=False)
    assert command[:2] == ["/bin/compute-sanitizer", "--tool"] and command[-1] == "memcheck"
    assert command[command.index("--report-api-errors") + 1] == "no"
    assert correctness.memcheck_command(tiny=True)[0] == sys.executable


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfResources(300000, 232448, "shared memory"), "OutOfResources: out of resource: shared memory, Required"),
        (CompilationError(None, ast.Pass(lineno=1, col_offset=0), "no"), "CompilationError: at 1:0:"),
        (RuntimeError("PassManager::run failed\nmore"), "RuntimeError: PassManager::run failed"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
)
def test_a_candidate_that_cannot_be_compiled_costs_no_other(monkeypatch, error, said):
    def refuse(operands, operation, choice):
        if choice:
            raise error
        return lambda: library(operands, operation, operands.x.dtype)

    monkeypatch.setattr(conv_check, "choices", lambda operands, operation: [("refused", True), ("right", False)])
    monkeypatch.setattr(conv_check, "runner", refuse)
    begun = []
    found = conv_check.check("ieee", ["wgrad"], True, CPU, begins=begun.append)
    if said is None:  # the device is broken: the process ends
        with pytest.raises(RuntimeError, match="illegal"):
            next(found)
    else:
        first, second = next(found), next(found)
        assert not first["ok"] and first["error"].startswith(said) and "\n" not in first["error"]
        assert second["ok"] and second["candidate"] == "right"
    assert begun[0]["candidate"] == "refused" and begun[0]["operation"] == "wgrad"
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_wrong_or_was_not_reached_is_not_timed(record, tmp_path):
    assert products.Doubts.of(record).about("bf16", "forward", "pointer x") is None  # part 2 has not run
    about = {"check": "candidate", "mode": "bf16", "operation": "forward"}
    rows = [
        about | {"candidate": "pointer x", "ok": True},
        about | {"candidate": "pointer y", "ok": False},
        about | {"candidate": "pointer y", "ok": True},  # right in another case
        {"check": "graph", "ok": False},
    ]
    (tmp_path / "2-correctness.json").write_text(json.dumps({"rows": rows}))
    doubts = products.Doubts.of(record)
    for _ in range(2):
        right = doubts.right(record, "bf16", "forward")
        assert [right(label) for label in ("pointer x", "pointer y", "pointer z")] == [True, False, False]
    assert doubts.right(record, "bf16", "dgrad")("pointer y")
    assert read(tmp_path / "lines")["said"] == [
        "bf16 forward pointer y: left out, part 2 found it wrong",
        "bf16 forward pointer z: left out, part 2 did not come to it",
    ]
