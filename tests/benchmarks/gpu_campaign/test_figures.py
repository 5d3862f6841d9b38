"""Figures of a campaign's results."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed here")

from benchmarks import plots
from benchmarks.gpu_campaign.figures import best_rates
from robust_moe.evaluation.plots import new_figure, save_figure


def _row(operation: str, experts: int, batch: int, variant: str, tflops: float) -> dict:
    case = {"mode": "bf16", "E": experts, "spread": "even", "B": batch, "C": 512, "operation": operation}
    return {"case": case, "variant": variant, "tflops": tflops, "choice": variant.split() if " x" in variant else None}


def test_a_campaign_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    variants = {"pointer x": 200.0, "persistent x": 300.0, "dense": 250.0}
    rows = [
        _row(operation, experts, batch, variant, rate * batch / 512)
        for operation, experts, batch, (variant, rate) in product(
            ("forward", "wgrad"), (4, 16), (128, 512), variants.items()
        )
    ]
    assert best_rates(rows, "wgrad", 16, "even") == {"ours": {128: 75.0, 512: 300.0}, "dense": {128: 62.5, 512: 250.0}}
    steps = [{"variant": "bf16", "B": 640, "images_per_s": 9000.0, "kernels_a_step": 700.0, "longest": []}]
    steps.append({"variant": "plain loop trainer, tf32", "B": 640, "images_per_s": 2000.0})
    ceiling = {"case": {"op": "product", "dtype": "bfloat16"}, "tflops": 790.0}
    about = {"provenance": {"hardware": "a GPU", "versions": {"torch": "2"}}}
    parts = {"environment": [about], "ceilings": [ceiling], "products": rows, "pgd_step": steps, "layer": []}
    results = {"commit": None, "parts": {name: {"rows": found} for name, found in parts.items()}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    plots.main()
    assert all((tmp_path / f"campaign_{name}.png").stat().st_size > 5000 for name in ("products", "steps"))
    assert all(b"robust-moe benchmarks plots" in path.read_bytes()[:1000] for path in tmp_path.glob("campaign_*.png"))
    plots.main()  # its own figures are drawn again


def test_only_its_own_figures_are_written_over(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"commit": None, "parts": {}}))
    path = tmp_path / "campaign_steps.png"
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    figure = new_figure(2, 2)
    save_figure(figure, path, "train")
    for content in (b"notes", path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="2"):
            plots.main()
        expected = "folder: expected a new name or a figure of python -m benchmarks plots, got another file at"
        assert f"{expected} {path}\n" in capsys.readouterr().err
        assert path.read_bytes() == content
    figure.savefig(path)  # as earlier versions wrote it
    with pytest.raises(SystemExit, match="2"):
        plots.main()
    assert "found none of them" in capsys.readouterr().err  # no number to draw: the figure was no hindrance
