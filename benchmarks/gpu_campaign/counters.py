"""Part 8: what two kernels use of the chip, by Nsight Compute: tensor cores, L2, shared memory, registers."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu_campaign.record import Record

__all__ = ["command", "read_csv", "run"]

# Sections, not metrics by name: the names change with the architecture, and ncu stops at one that it does not know.
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
KEPT = re.compile(r"tensor|throughput|bank_conflicts|registers|time_duration|warps_active|inst_issued|hit_rate")
SHOWN = {
    "SM": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 and shared": "l1tex__throughput.avg.pct_of_peak_sustained_active",
}
KERNEL = "pointer_kernel|persistent_kernel"
SECONDS = 18.0  # that a kernel takes: 16 were measured


def run(record: Record) -> str:
    tool = shutil.which("ncu")
    found = []
    for label in _wanted(record):
        if record.out_of_time(1.0 if record.dry else SECONDS, f"{label or 'a product'}"):
            break
        asked = command(tool or "ncu", label, record.dry)
        if tool is None or record.dry:
            record.say(f"would run: {' '.join(asked)}")
            asked = asked[asked.index(sys.executable) :]  # the program alone
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=max(5.0, record.left() - 2))
        print(done.stdout[-20000:], done.stderr[-5000:])
        values = read_csv(done.stdout)
        record.row(candidate=label, status=done.returncode, **values)
        if done.returncode:
            found.append(f"{label} ended with status {done.returncode}, see log.txt")
        elif values:
            shares = [f"{name} {values[metric]} %" for name, metric in SHOWN.items() if metric in values]
            found.append(f"{label or values['kernel']}: {', '.join(shares)}")
    return "; ".join(found) or ("ncu is there, not used in a dry run" if tool else "ncu is not on the PATH")


def _wanted(record: Record) -> list[str | None]:
    """Labels of the fastest forward product of part 3 at B = 512 and of the fastest by another kind of kernel; without
    part 3 the first candidate."""
    path = record.folder / "3-products.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    case = {"mode": "bf16", "E": 4, "spread": "even", "B": 512, "operation": "forward"}
    mine = [row for row in rows if row["choice"] and case.items() <= row["case"].items()]
    mine.sort(key=lambda row: row["median_ms"])
    kinds = {row["choice"][0]: row["variant"] for row in reversed(mine)}  # the fastest of each kind
    return [kinds[kind] for kind in dict.fromkeys(row["choice"][0] for row in mine)][:2] or [None]


def command(tool: str, label: str | None, tiny: bool) -> list[str]:
    """ncu over the last launch of a candidate's product. The clocks are left as they are."""
    target = [sys.executable, "-m", "benchmarks.gpu_campaign.targets", "product", *([label] if label else [])]
    options = ["--page", "raw", "--csv", "--clock-control", "none"]
    options += [word for name in SECTIONS for word in ("--section", name)]
    options += ["--kernel-name", f"regex:{KERNEL}", "--launch-skip", "2", "--launch-count", "1"]
    return [tool, *options, *target, *(["--tiny"] if tiny else [])]


def read_csv(output: str) -> dict[str, Any]:
    """{"kernel", and every metric of interest} from what ``ncu --page raw --csv`` prints among other lines: a header, a
    line of units, a line of values."""
    lines = output.splitlines()
    header = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return {}
    *_, row = csv.DictReader(io.StringIO("\n".join(lines[header:])))
    return {"kernel": row["Kernel Name"], **{name: value for name, value in row.items() if name and KEPT.search(name)}}
