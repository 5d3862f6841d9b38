"""What the campaign's parts conclude from what they see."""

from __future__ import annotations

import ast
import inspect
import json
import math
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed here")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.gpu_campaign import conv_check, correctness, counters, environment, layer, products, real_run
from benchmarks.gpu_campaign.conv_cases import OPERATIONS, ConvCase, Operands, library, row_counts
from benchmarks.gpu_campaign.environment import PACKAGES, missing
from benchmarks.gpu_campaign.pgd_step import LONGEST, kernels_of
from benchmarks.gpu_campaign.record import Record, read
from benchmarks.gpu_campaign.syncs import Waits
from robust_moe.config import RunConfig, TrainConfig
from robust_moe.engine import passes_of_run

CPU = torch.device("cpu")
H100 = {
    "name": "NVIDIA H100",
    "capability": [9, 0],
    "bf16": True,
    "memory": 80 * 2**30,
    "memory_free": 79 * 2**30,
}
GOOD = {
    "device": H100,
    "refused": None,
    "triton": "3.6.0",
    "descriptors": True,
    "extension": "CUDA",
    "extension_wanted": "cpython-312",
    "extension_files": ["_C.cpython-312-x86_64-linux-gnu.so"],
    "packages": list(PACKAGES),
    "tools": dict.fromkeys(environment.TOOLS, "1.0"),
    "compiler": "/usr/bin/gcc",
    "data": "/data",
    "disk": 2**40,
}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "lines", tmp_path, 600, dry=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        (
            {"device": None, "refused": "The NVIDIA driver on your system is too old (found version 11040)."},
            ["expected a GPU that PyTorch can use, got: The NVIDIA driver on your system is too old"],
        ),
        ({"device": {**H100, "bf16": False}}, ["NVIDIA H100 multiplies no bfloat16"]),
        ({"device": {**H100, "capability": [8, 0]}}, ["capability 8.0 has no tensor descriptors"]),
        ({"device": {**H100, "memory_free": 2**30}}, ["only 1 of 80 GiB of the GPU are free"]),
        ({"descriptors": False}, ["Triton 3.6.0 has no tensor descriptors"]),
        ({"triton": "not installed"}, ["Triton is not installed"]),
        (
            {"extension": None, "extension_files": ["_C.cpython-311-x86_64-linux-gnu.so"]},
            ["expected one for cpython-312, got _C.cpython-311-x86_64-linux-gnu.so"],
        ),
        ({"extension": None, "extension_files": []}, ["expected one for cpython-312, got none"]),
        ({"extension": "CPU"}, ["no CUDA kernels"]),
        ({"packages": [name for name in PACKAGES if name != "omegaconf"]}, ["omegaconf is not installed: parts 6"]),
        ({"tools": {**GOOD["tools"], "ncu": None}}, ["ncu is not on the PATH: part 8"]),
        ({"tools": {**GOOD["tools"], "compute-sanitizer": None}}, ["compute-sanitizer is not on the PATH: part 2"]),
        ({"compiler": None}, ["neither CC, gcc nor clang is there"]),
        ({"data": None}, ["no --data"]),
        ({"disk": 2**20}, ["only 0.0 GiB of disk"]),
    ],
)
def test_what_is_missing_is_one_sentence_each(changes, expected):
    said = missing(GOOD | changes)
    assert len(said) == len(expected)
    assert all(part in text and "\n" not in text for part, text in zip(expected, said, strict=True))


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


def test_the_attack_steps_bandwidth_is_that_of_the_largest_batch(tmp_path, monkeypatch):
    record = Record(tmp_path / "lines", tmp_path, 600)
    cases = [SimpleNamespace(name="pgd_step Linf", moved=0)]

    def op_cases(device, batch, *sizes):
        cases[0].moved = batch * 1e9
        return cases

    monkeypatch.setattr(layer, "op_cases", op_cases)
    monkeypatch.setattr(layer, "_op", lambda *_: [{"variant": "triton", "median_ms": 1e4}])
    monkeypatch.setattr(layer, "_copy_rate", lambda record: 1.0)
    assert layer._ops(record)[-1] == "attack step at 41% of the copy bandwidth (B=4096)"


def test_a_table_entry_is_a_mean_over_what_it_cannot_tell_apart():
    def row(operation: str, experts: int, variant: str, ms: float) -> dict:
        case = {"mode": "bf16", "E": experts, "spread": "even", "B": 128, "C": 512, "operation": operation}
        choice = None if variant == "dense" else [variant, 64, 64, 64, 4, 4]
        return {"case": case, "variant": variant, "median_ms": ms, "kind": "half", "choice": choice}

    rows = [row("forward", 4, "pointer", 1.0), row("dgrad", 4, "pointer", 4.0), row("wgrad", 4, "carry", 1.0)]
    rows += [row("forward", 4, "descriptor", 0.1), row("forward", 4, "dense", 0.5)]  # one case of two: not compared
    found = products.table_rows(rows, "sm_90", "a GPU")
    about = {"architecture": "sm_90", "kind": "half", "pairs": 2 * 128 * 16, "columns": 512, "source": "a GPU"}
    assert found == [
        about | {"operation": "product", "variant": "pointer", "tile": [64, 64, 64, 4, 4], "median_ms": 2.0},
        about | {"operation": "filter", "variant": "carry", "tile": [64, 64, 64, 4, 4], "median_ms": 1.0},
    ]


NCU = """==PROF== Connected to process 7
persistent 128x256x64x8x3
"ID","Process ID","Kernel Name","launch__registers_per_thread","sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","register/thread","%"
"0","7","persistent_kernel","230","61.5"
"""


def test_what_ncu_prints_is_read():
    assert counters.read_csv(NCU) == {
        "kernel": "persistent_kernel",
        "launch__registers_per_thread": "230",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed": "61.5",
    }
    assert counters.read_csv("==ERROR== no permission\n") == {}
    command = counters.command("ncu", "persistent 64x64", tiny=False)
    assert command[0] == "ncu" and command[-2:] == ["product", "persistent 64x64"]
    assert command[command.index("--clock-control") + 1] == "none"


def test_ncu_looks_at_the_fastest_product_and_the_fastest_of_another_kind(record, tmp_path):
    assert counters._wanted(record) == [None]
    case = {"mode": "bf16", "E": 4, "spread": "even", "B": 512, "operation": "forward", "C": 512}
    times = {"pointer a": 3.0, "persistent b": 2.0, "persistent c": 1.0, "pointer d": 2.5, "dense": 0.5}
    rows = [
        {"case": case, "variant": label, "median_ms": ms, "choice": None if label == "dense" else label.split()}
        for label, ms in times.items()
    ]
    rows.append({**rows[0], "case": {**case, "B": 128}, "median_ms": 0.1})
    (tmp_path / "3-products.json").write_text(json.dumps({"rows": rows}))
    assert counters._wanted(record) == ["persistent c", "pointer d"]


def test_a_wait_for_the_device_is_counted_by_its_place():
    waits = Waits(CPU)
    value = torch.ones(3)
    waits.start()
    for _ in range(2):
        value.sum().item()
    value.add(1)
    waits.stop()
    value.sum().item()  # nobody looks any more
    ((stack, count),) = waits.stacks.items()
    assert count == 2 and "value.sum().item()" in stack and __file__ in stack


def test_a_warning_of_a_wait_is_placed_where_the_wait_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    waits = Waits(torch.device("cuda"))
    waits.start()
    try:
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        line = inspect.currentframe().f_lineno - 1
    finally:
        waits.stop()
    ((stack, count),) = waits.stacks.items()
    assert count == 1 and waits.places[stack] == f"{__file__}:{line}"


def test_the_longest_kernels_come_first():
    x = torch.rand(200, 200)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(4):
            x = (x @ x).relu()
    found = kernels_of(profile, steps=2)
    calls = {entry["name"]: entry["calls_a_step"] for entry in found["longest"]}
    times = [entry["ms_a_step"] for entry in found["longest"]]
    assert calls["aten::mm"] == calls["aten::relu"] == 2
    assert times == sorted(times, reverse=True) and len(times) <= LONGEST
    assert found["kernels_a_step"] >= 4 and found["busy_ms_a_step"] >= sum(times) - 1e-9


def test_the_schedule_ends_where_the_time_does():
    config = TrainConfig(run=RunConfig(epochs=30, batch_size=10))
    an_epoch = passes_of_run(replace(config, run=replace(config.run, epochs=1)), 100)
    for seconds, expected in ((100, 9), (1000, 30), (-5, 1), (0.1, 1)):  # nine tenths of the time are planned for
        assert real_run.epochs_that_fit(seconds, an_epoch / 10, config, 100) == expected


def test_an_attack_without_time_leaves_the_images_it_did_not_reach():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].weight[1] = -1  # class 1 on dark images alone
        model[1].bias.copy_(torch.tensor([-1.0, 0.0]))
    images, labels = torch.zeros(5, 3, 2, 2), torch.tensor([1, 1, 1, 1, 0])
    right, index = torch.tensor([True, True, True, True, False]), torch.arange(5)
    asked = []

    def attack(model, x, y, index):
        asked.append(index.tolist())
        return torch.where((index < 2)[:, None, None, None], 1.0, 0.0).expand_as(x)

    later, before = time.monotonic() + 1000, time.monotonic() - 1
    left, whole = real_run._attacked(model, attack, images, labels, index, right, later, batch=3)
    assert left.tolist() == [False, False, True, True, False] and whole and asked == [[0, 1, 2], [3]]
    assert not model._forward_pre_hooks
    left, whole = real_run._attacked(model, attack, images, labels, index, right, before)
    assert left.tolist() == right.tolist() and not whole


def test_an_attack_in_progress_ends_when_the_time_is_up(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images, index = torch.rand(3, 3, 2, 2), torch.arange(3)
    right = torch.ones(3, dtype=torch.bool)
    times = iter(range(100))
    monkeypatch.setattr(real_run.time, "monotonic", lambda: next(times))
    forwards = []

    def attack(model, x, y, index):
        while True:
            forwards.append(model(x))

    left, whole = real_run._attacked(model, attack, images, index, index, right, end=4)
    assert left.all() and not whole and len(forwards) == 5 and not model._forward_pre_hooks
