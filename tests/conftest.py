"""What has to stand before any test module is imported: how many threads a worker has and, without a GPU, that
Triton's kernels are interpreted. Then the order of the files.

Triton reads TRITON_INTERPRET when a kernel is decorated, and tests in every folder import kernels.
"""

from __future__ import annotations

import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores; read when PyTorch is imported, and by sub-processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/conftest.py: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

LONGEST = ("test_triton_compile.py", "test_cuda_emulation.py", "test_cuda_build.py", "test_dry_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none is left to one worker at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
