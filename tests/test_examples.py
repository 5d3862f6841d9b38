"""Every example runs, some with shorter training, and prints what its docstring promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm", reason="the extra train is not installed: pip install '.[train]'")

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = json.loads((EXAMPLES / "look_at_experts.ipynb").read_text(encoding="utf-8"))


def shorter(source: str, *changes: tuple[str, str]) -> str:
    """``source`` with less to compute: each first text, which has to be there, by the second."""
    for long, short in changes:
        assert long in source, long
        source = source.replace(long, short)
    return source


def run(name: str, capsys: pytest.CaptureFixture[str], *changes: tuple[str, str]) -> list[str]:
    """Lines that an example prints."""
    source = shorter((EXAMPLES / name).read_text(encoding="utf-8"), *changes)
    exec(compile(source, name, "exec"), {"__name__": name.removesuffix(".py")})
    return capsys.readouterr().out.splitlines()


def counts(line: str) -> list[int]:
    """The numbers after a line's last colon."""
    return [int(number) for number in re.findall(r"\d+", line.rpartition(":")[2])]


def test_a_vit_is_made_robust(capsys):
    lines = run("robust_vit.py", capsys, ("epochs=10", "epochs=1"))
    kinds = [re.sub(r"[\d.]+%", "%", line) for line in lines[:4]]
    assert kinds == ["clean digits: % right", "attacked digits: % right"] * 2
    assert lines[4].startswith("blocks.1.mlp: tokens per expert ")
    assert sum(counts(lines[4])) == 2 * 5 * 297  # two experts for each of the five tokens of the test images


def test_a_resnet_is_made_robust(capsys):
    trained, moved, routed, tuned, experts = run("robust_resnet.py", capsys, ("epochs=6", "epochs=1"))
    assert float(moved.split()[5].rstrip(":")) < 1e-4
    cost = [
        [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]+\d", line.split(";")[1])]
        for line in (trained, routed, tuned)
    ]
    (dense, macs), (more, routed_macs), again = cost
    assert more > dense + 3 * 64 * 64 * 9 * 2  # three blocks more of two convolutions
    assert 0 <= routed_macs - macs < 0.01 * macs  # one of four runs, and the gate
    assert again == [more, routed_macs]
    assert experts.startswith("layer4.1: images per expert ")
    assert sum(counts(experts)) == 297


def test_a_loop_over_masks_is_fused(capsys):
    logits, *layers, loop, fused = run("fuse_masked_loop.py", capsys, ("range(6)", "range(2)"))
    assert float(logits.split()[5]) < 1e-5
    assert [sum(counts(line)) for line in layers] == [2 * 64] * 2
    assert all(min(counts(line)) > 0 for line in layers)  # all eight have something to compute
    assert [re.sub(r": \d+ ms", ": N ms", line) for line in (loop, fused)] == [
        "masked loop: N ms for forward and backward of 64 images",
        "fused layer: N ms for forward and backward of 64 images",
    ]


@pytest.mark.slow
def test_a_model_that_hides_its_gradients_is_found_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate_honestly.py", str(tmp_path)])
    lines = run("evaluate_honestly.py", capsys, ("range(10)", "range(4)"), ("1600", "1530"))
    robust, flags = {}, {}
    for line in lines:
        if found := re.match(r"(\w+, \w+): clean \d+%, robust (\d+)%", line):
            last = found[1]
            robust[last], flags[last] = int(found[2]), set()
        elif not line.startswith("  report: "):
            flags[last].add(line.split(":")[0].strip())
    assert robust["rounded, quick"] > robust["rounded, standard"] + 30
    assert flags["plain, quick"] == flags["plain, standard"] == set()
    assert "gradient_of_ce" in flags["rounded, quick"]
    assert {"gradient_of_ce", "square_stronger"} <= flags["rounded, standard"]
    names = {f"{model}-{preset}.html" for model in ("plain", "rounded") for preset in ("quick", "standard")}
    assert {path.name for path in tmp_path.glob("*.html")} == names


@pytest.mark.slow
def test_components_of_ones_own_train_and_attack(tmp_path):
    """In a process of its own, since what is registered stays."""
    source = shorter(
        (EXAMPLES / "own_attack_and_method.py").read_text(encoding="utf-8"), ("run.epochs=4", "run.epochs=2")
    )
    source += "\ntry:\n    Corners(0.1, norm='L2')\nexcept ValueError as error:\n    print(error)\n"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "python")))}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"trained by (\w+, \w+) +clean [\d.]+%, left by (\w+): ([\d.]+)%", done.stdout)
    assert [row[:2] for row in found] == [
        (trained, attack)
        for trained in ("pgd_at, corners", "pgd_at, pgd", "half_clean, pgd")
        for attack in ("corners", "pgd20")
    ]
    left = [float(row[2]) for row in found]
    assert all(corners > pgd for corners, pgd in zip(left[::2], left[1::2], strict=True))  # the weaker attack
    assert done.stdout.endswith("norm: expected 'Linf', whose ball has corners, got 'L2'\n")
    configs = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("runs/own/*/config.yaml"))]
    assert ["share: 0.5" in text for text in configs] == [True, False, False]
    assert ["tries: 4" in text for text in configs] == [False, True, False]


def test_the_notebook_is_one_without_outputs():
    """As nbformat 4.5 says; outputs in the repository would be those of nobody's run."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert NOTEBOOK["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
    names = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(names)) == len(names)
    for cell in NOTEBOOK["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert isinstance(cell["metadata"], dict)
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown" and "outputs" not in cell


def test_the_notebook_runs(capsys, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for cell in NOTEBOOK["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(cell["source"]).replace("EPOCHS = 5", "EPOCHS = 1")
                exec(compile(source, cell["id"], "exec"), names)
        assert names["EPOCHS"] == 1
        assert len(pyplot.get_fignums()) == 4
        for number in pyplot.get_fignums():
            pyplot.figure(number).canvas.draw()
    finally:
        pyplot.close("all")
    torch.testing.assert_close(names["share"].sum(1), torch.ones(10))
    assert len(names["alone"]) == 5
    assert all(0 <= robust <= clean <= 1 for clean, robust in names["alone"])
    assert "the attack changes the first expert of" in capsys.readouterr().out


def test_the_page_of_examples_has_all_of_them():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(\.\./examples/([\w.]+)\)", page))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".sh")}


SRUN = """#!/bin/bash
printf '%s\\n' "$@"
"""
SCONTROL = """#!/bin/bash
[ "$1 $2 $3" = "show hostnames node[03-04]" ] && printf 'node03\\nnode04\\n'
"""


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_slurm_script_parses_and_starts_torchrun_on_every_machine(tmp_path: Path) -> None:
    script = EXAMPLES / "slurm_train.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_NODELIST": "node[03-04]",
    }
    command = ["bash", str(script), "my config.yaml", "run.batch_size=2048"]
    done = subprocess.run(command, env=job, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=64", "torchrun"]
    assert words[-5:] == ["-m", "robust_moe", "train", "my config.yaml", "run.batch_size=2048"]
    # torchrun itself reads the rest, and starts what the script means
    from torch.distributed.run import config_from_args, parse_args

    config, _, arguments = config_from_args(parse_args(words[3:]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 2, 8, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "node03:24242", "4242")
    assert arguments[-4:] == ["robust_moe", "train", "my config.yaml", "run.batch_size=2048"]
    for missing in ("SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_PER_TASK"):
        less = {key: value for key, value in job.items() if key != missing}
        refused = subprocess.run(command, env=less, capture_output=True, text=True, check=False)
        assert refused.returncode != 0 and refused.stdout == ""
    assert subprocess.run(command[:2], env=job, capture_output=True, check=False).returncode == 2
