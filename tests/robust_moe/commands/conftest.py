"""What tests of the commands share."""

from __future__ import annotations

import pytest

from robust_moe import certify as certifying
from robust_moe import report
from robust_moe.commands import sweep as sweeping
from robust_moe.engine import Trainer, trainer
from robust_moe.reproduce import study as studying


@pytest.fixture
def idle(monkeypatch):
    """Any work is a failure."""

    def work(*_, **__):
        raise AssertionError("work began")

    places = ((report, "load_measured"), (certifying, "load_experiment"), (studying, "run_jobs"))
    for module, name in (*places, (sweeping, "run_sweep")):
        monkeypatch.setattr(module, name, work)
    monkeypatch.setattr(Trainer, "fit", work)
    monkeypatch.setattr(trainer.CheckpointReader, "read", work)
    monkeypatch.setattr(trainer, "load_splits", work)
