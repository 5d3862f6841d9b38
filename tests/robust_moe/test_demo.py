import io
import json

from rich.console import Console

from robust_moe.config import load_config
from robust_moe.demo import PRESETS, run_demo
from robust_moe.engine import load_checkpoint, read_metrics
from robust_moe.settings import replaced

SMALL = [
    "data.image_size=8",
    "data.train_limit=64",
    "data.test_limit=40",
    "data.validation_fraction=0.02",
    "model.width=4",
    "method.attack.steps=1",
    "eval.attack.steps=2",
    "run.batch_size=16",
    "run.accelerator=cpu",
]


def test_demo_leaves_two_runs_a_table_and_figures(tmp_path):
    console = Console(width=140, record=True, file=io.StringIO())
    results = run_demo(tmp_path / "demo", epochs=2, overrides=SMALL, console=console)
    text = console.export_text()
    assert list(results) == list(PRESETS)
    for preset in PRESETS:
        folder = tmp_path / "demo" / preset
        assert json.loads((folder / "results.json").read_text())["clean"] == results[preset]["clean"]
        assert len(read_metrics(folder, "epoch")) == 2
        assert load_checkpoint(folder / "last.pt")["position"]["epoch"] == 2
        assert (folder / "training.png").stat().st_size > 1000
        assert (folder / "routing.png").exists() == (preset == "digits-blockmoe")
        assert list((folder / "tensorboard").iterdir())
        assert preset in text
        assert f"{100 * results[preset]['robust']:.1f} [" in text
    assert (tmp_path / "demo" / "comparison.png").stat().st_size > 1000
    assert "PGD-2, Linf eps = 1/10" in text
    assert results["digits-blockmoe"]["model"]["parameters"] > results["digits-dense"]["model"]["parameters"]
    # a second time there is nothing left to train, and the numbers stay
    again = run_demo(tmp_path / "demo", epochs=2, overrides=SMALL, console=Console(quiet=True))
    assert {name: r["robust_interval"] for name, r in again.items()} == {
        name: r["robust_interval"] for name, r in results.items()
    }


def test_the_twins_differ_in_their_experts_only():
    routed, dense = (load_config(preset) for preset in PRESETS)
    assert routed.model.moe.layers == ("layer4.1",)
    assert (routed.model.moe.num_experts, routed.model.moe.top_k, routed.model.moe.gate.name) == (4, 2, "gap_fc")
    assert routed.method.attack.steps == 7
    assert routed.eval.attack.steps == 20
    assert replaced(replaced(routed, "model.moe.layers", ()), "run.out", dense.run.out) == dense
