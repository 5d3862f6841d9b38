"""Part 2: nothing is timed before it is right. Every candidate of the convolutions against float64, a graph against the
same calls one by one, and compute-sanitizer over a small layer.

The candidates are checked by several processes at a time: that also compiles every kernel once, all at once, for the
parts that follow.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu_campaign.record import Record
from robust_moe.benchmarks.baselines import first_line
from robust_moe.benchmarks.cuda_graphs import captured
from robust_moe.benchmarks.layer_case import Case, one_pass, set_mode

__all__ = ["check_group", "memcheck_command", "run"]

BROKEN = 3  # candidates of a group that may end its process before the group is given up
MEMCHECK_LOG = "memcheck.log"
AFTER = 15.0  # seconds that the rest of the part wants after the candidates
# (mode, operations, processes that share the candidates); compiling a kernel takes seconds, bf16 has most of them
WHAT = {
    "cpu": [("fp16", "forward,dgrad,wgrad", 1)],
    "cuda": [
        ("bf16", "forward", 4),
        ("bf16", "dgrad", 3),
        ("bf16", "wgrad", 3),
        *((mode, operation, 1) for mode in ("tf32", "ieee") for operation in ("forward", "dgrad", "wgrad")),
    ],
}


def run(record: Record) -> str:
    sanitizer = _start_memcheck(record)
    groups = [(*what, number, count) for *what, count in WHAT[record.device.type] for number in range(count)]
    with ThreadPoolExecutor(max_workers=min(len(groups), os.cpu_count() or 1)) as pool:
        found = pool.map(lambda group: check_group(record, conv_check_command(record.dry, *group), *group[:2]), groups)
        rows = [row for group in found for row in group]
    wrong = [row for row in rows if not row["ok"]]
    for row in wrong:
        record.say(f"WRONG: {row['mode']} {row['operation']} {row.get('candidate', '')}: error {row['error']}")
    same = [_graph_is_eager(record, experts) for experts in (4, 16)]
    checked = _memcheck(record, sanitizer)
    graphs = "a graph gives the bits of single calls" if all(same) else "A GRAPH FAILS OR GIVES OTHER BITS"
    return f"{len(rows) - len(wrong)} of {len(rows)} candidates right; {graphs}; {checked}"


def conv_check_command(tiny: bool, mode: str, operations: str, number: int, count: int) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_campaign.conv_check", mode, operations]
    return [*command, "--share", str(number), str(count), *(["--tiny"] if tiny else [])]


def check_group(record: Record, command: list[str], mode: str, operations: str) -> list[dict[str, Any]]:
    """The rows that a process prints, started again (``--skip N``) behind every candidate that ended it. One that is
    stopped because the time is up has shown nothing: that is said, and is no row."""
    rows: list[dict[str, Any]] = []
    for _ in range(BROKEN):
        seconds = record.left() - AFTER
        if seconds <= 0:
            record.say(f"{mode} {operations}: stopped for want of time after {len(rows)} candidates")
            return rows
        about = {"mode": mode, "operation": operations, "candidate": f"number {len(rows)}"}  # if it does not say
        process = subprocess.Popen([*command, "--skip", str(len(rows))], stdout=subprocess.PIPE, text=True)
        alarm = threading.Timer(seconds, process.kill)  # a kernel that never ends
        alarm.start()
        assert process.stdout is not None
        for line in process.stdout:
            found = _object(line)
            if "next" in found:
                about = found["next"]
            elif "ok" in found:
                rows.append(found)
                about = {"mode": mode, "operation": operations, "candidate": f"number {len(rows)}"}
                record.row(check="candidate", **found)
            else:
                print(line, end="", flush=True)
        status = process.wait()
        alarm.cancel()
        if status == 0:
            return rows
        if record.left() <= AFTER:
            record.say(f"{mode} {operations}: stopped for want of time at {about['candidate']}")
            return rows
        rows.append(about | {"ok": False, "error": f"its process ended with status {status}"})
        record.row(check="candidate", **rows[-1])
    record.say(f"{mode} {operations}: given up after {len(rows)} candidates, {BROKEN} of which ended their process")
    return rows


def _object(line: str) -> dict[str, Any]:
    """The JSON object of a line; empty for a line that is none: cut short, or printed by a library."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _graph_is_eager(record: Record, experts: int) -> bool:
    """A layer's forward and input gradient, called twice and replayed from a graph: the same bits. Without a GPU, where
    there are no graphs: called twice more."""
    device = record.device
    case = Case(experts, batch=6 if record.dry else 128, channels=16 if record.dry else 512)
    dtype = torch.float32 if record.dry else torch.bfloat16
    layer = case.variants(case.layer(device, dtype), ())
    set_mode(layer, "forward+dx")
    (module,) = layer.values()
    inputs = case.inputs(device, dtype)
    run = one_pass(module, inputs, "forward+dx")
    single = [_first(run(number)).clone() for number in range(2)]
    try:
        results = [_first(run(number)) for number in range(2)] if record.dry else _replayed(run)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a wait for the device, above all
        record.say(f"graph of a layer, E={experts}: not captured, {first_line(error)}")
        record.row(check="graph", E=experts, ok=False)
        return False
    same = all(torch.equal(got, wanted) for got, wanted in zip(results, single, strict=True))
    record.row(check="graph", E=experts, ok=same)
    return same


def _first(found: Any) -> torch.Tensor:
    return found[0] if isinstance(found, tuple) else found


def _replayed(run: Callable[[int], Any]) -> list[torch.Tensor]:
    results: dict[int, torch.Tensor] = {}
    replay = captured(lambda number: results.update({number: _first(run(number))}), calls=2)
    for result in results.values():
        result.fill_(float("nan"))
    replay()
    return list(results.values())


def memcheck_command(tiny: bool) -> list[str]:
    """The small layer under compute-sanitizer, or alone where there is none."""
    target = [sys.executable, "-m", "benchmarks.gpu_campaign.targets", "memcheck", *(["--tiny"] if tiny else [])]
    tool = shutil.which("compute-sanitizer")
    # PyTorch asks the driver for functions that it may lack: those refusals are no errors of a kernel
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    return target if tool is None or tiny else [tool, *options, *target]


def _start_memcheck(record: Record) -> subprocess.Popen[bytes]:
    """Beside the candidates: it takes its time. PyTorch must not cut its tensors out of larger pieces, in which nobody
    could tell one from the next."""
    with open(record.folder / MEMCHECK_LOG, "wb") as log:
        return subprocess.Popen(
            memcheck_command(record.dry),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )


def _memcheck(record: Record, sanitizer: subprocess.Popen[bytes]) -> str:
    checked = sanitizer.args[0] != sys.executable
    try:
        status = sanitizer.wait(timeout=max(1.0, record.left() - 5))
    except subprocess.TimeoutExpired:
        sanitizer.kill()
        record.say("memcheck: stopped for want of time")
        return "memcheck unfinished"
    output = (record.folder / MEMCHECK_LOG).read_text(encoding="utf-8", errors="replace")
    print(output)
    record.row(check="memcheck", sanitizer=checked, status=status, output=output[-4000:])
    if status == 0:
        return "memcheck clean" if checked else "no memcheck (the small layer ran without it)"
    errors = [line for line in output.splitlines() if "ERROR SUMMARY" in line or "Error" in line]
    return f"MEMCHECK: status {status}, {errors[-1] if errors else 'see log.txt'}"
