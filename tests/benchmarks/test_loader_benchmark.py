"""The loader's benchmark: its images are what it says, and a loader of other pixels is not timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robust_moe.benchmarks import loader
from robust_moe.benchmarks.harness import Options
from robust_moe.data import StreamedSet

CPU = Options(torch.device("cpu"), repeats=1, quick=True)


def test_every_variant_passes_the_same_number_of_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "QUICK", {8: 40})
    monkeypatch.setattr(loader, "MANY_QUICK", 40)
    monkeypatch.setattr(loader, "BATCH", 16)
    plain, folder, shard, memory = loader.run(CPU)
    assert [row.variant for row in (plain, folder, shard)] == [loader.PLAIN, loader.FOLDER, loader.SHARD]
    for row in (plain, folder, shard):
        assert row.extra["images_per_second"] == pytest.approx(40 / row.median_ms * 1e3, rel=1e-3, abs=0.1)
    assert memory.case["images"] == 40
    if Path("/proc/self/smaps_rollup").exists():
        assert 0 < memory.extra["first_mib"] <= memory.extra["peak_mib"]


def test_a_loader_of_other_pixels_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    whole = StreamedSet.pixels
    monkeypatch.setattr(StreamedSet, "pixels", lambda self, i: whole(self, i) // 2)
    with loader._images(8, 20) as root, pytest.raises(AssertionError, match=r"stream, folder, image 0: .*not timed"):
        loader._speed(root, 8, 20, CPU)
