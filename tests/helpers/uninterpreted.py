"""Programs that compile Triton's kernels, in processes where nothing interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent


def in_fresh_process(*arguments: str) -> str:
    """Output of Python with these arguments, without TRITON_INTERPRET and with this folder's modules importable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HELPERS), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
