"""What has to stand before any test module is imported: without a GPU, Triton's kernels are interpreted.

Triton reads TRITON_INTERPRET when a kernel is decorated, and tests in every folder import kernels.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("triton was imported before tests/conftest.py: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
