"""What the campaign's parts conclude from what they see."""

from __future__ import annotations

import inspect
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed here")


from benchmarks.gpu_campaign import counters, environment, ops, pgd_step, products, real_run
from benchmarks.gpu_campaign.environment import PACKAGES, missing
from benchmarks.gpu_campaign.pgd_step import LONGEST, kernels_of
from benchmarks.gpu_campaign.record import Record
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
        ({"packages": [name for name in PACKAGES if name != "yaml"]}, ["yaml is not installed: parts 6"]),
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


def test_the_attack_steps_bandwidth_is_that_of_the_largest_batch(tmp_path, monkeypatch):
    record = Record(tmp_path / "lines", tmp_path, 600)
    cases = [SimpleNamespace(name="pgd_step Linf", moved=0)]

    def op_cases(device, batch, *sizes):
        cases[0].moved = batch * 1e9
        return cases

    monkeypatch.setattr(ops, "op_cases", op_cases)
    monkeypatch.setattr(ops, "_op", lambda *_: [{"variant": "triton", "median_ms": 1e4}])
    monkeypatch.setattr(ops, "_copy_rate", lambda record: 1.0)
    assert ops._ops(record)[-1] == "attack step at 41% of the copy bandwidth (B=4096)"


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


def test_a_step_is_counted_by_its_passes():
    config = TrainConfig()
    config = replace(config, method=replace(config.method, attack=replace(config.method.attack, steps=7)))
    counted = {"PGD step": 10, "training pass": 5}
    assert pgd_step._with_count(config, counted) == {"counted": counted, "counted_a_step": 75}
    assert pgd_step._with_count(config, None) == {}
