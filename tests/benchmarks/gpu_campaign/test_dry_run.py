"""Every part of the campaign on the CPU, with tiny sizes: no typo waits for the GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_campaign.plan import PARTS
from benchmarks.gpu_campaign.runner import ROOT

pytest.importorskip("triton", reason="Triton is not installed here")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on two quiet cores, most of it importing PyTorch nine times
def test_every_part_runs(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks", "gpu_campaign", "--dry-run", "--work", str(tmp_path)]
    done = subprocess.run([*command, "--budget", "800"], cwd=ROOT, capture_output=True, text=True, timeout=880)
    packed = tmp_path / "packed"
    assert done.returncode == 0, done.stdout + done.stderr + (packed / "log.txt").read_text()[-8000:]
    assert {path.name for path in packed.iterdir()} == {"results.json", "log.txt", "tiles.json"}
    parts = json.loads((packed / "results.json").read_text())["parts"]
    assert [part["status"] for part in parts.values()] == ["done"] * len(PARTS)
    assert all(part["rows"] or part["name"] == "syncs" for part in parts.values())

    checked = [row for row in parts["correctness"]["rows"] if row["check"] == "candidate"]
    assert {row["operation"] for row in checked} == {"forward", "dgrad", "wgrad"}
    assert all(row["ok"] for row in parts["correctness"]["rows"] if "ok" in row)
    timed = {(row["case"]["operation"], row["variant"].split()[0]) for row in parts["products"]["rows"]}
    assert {(row["operation"], row["candidate"].split()[0]) for row in checked} <= timed
    assert ("forward", "dense") in timed
    entries = json.loads((packed / "tiles.json").read_text())["entries"]
    assert any(entry["source"].startswith("measured") for entry in entries)
    attacks = {row["attack"] for row in parts["real_run"]["rows"] if "attack" in row}
    assert attacks == {"none", "pgd-20", "apgd-ce", "apgd-t", "fab-t", "square", "experts", "router"}
