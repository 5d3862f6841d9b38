"""The examples run as they are, but for shorter training."""

from __future__ import annotations

import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_vit_is_made_robust(capsys):
    source = (EXAMPLES / "robust_vit.py").read_text()
    assert source.count("epochs=10") == 2
    exec(compile(source.replace("epochs=10", "epochs=1"), "robust_vit.py", "exec"), {"__name__": "robust_vit"})
    lines = capsys.readouterr().out.splitlines()
    kinds = [re.sub(r"[\d.]+%", "%", line) for line in lines[:4]]
    assert kinds == ["clean digits: % right", "attacked digits: % right"] * 2
    counts = [int(number) for number in re.findall(r"\d+", lines[4].rpartition(":")[2])]
    assert lines[4].startswith("blocks.1.mlp: tokens per expert ")
    assert sum(counts) == 2 * 5 * 297  # two experts for each of the five tokens of the test images
