"""Random state: one seed for everything, and the generators' states as plain types and tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["restore_rng", "rng_state", "seed_all"]


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (the global generator is what other libraries draw from)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """States of the global generators, loadable with ``weights_only=True``."""
    version, words, gauss = random.getstate()
    state = np.random.get_state()  # noqa: NPY002
    if not isinstance(state, tuple):
        raise RuntimeError(f"NumPy's global generator: expected MT19937, got {state['bit_generator']}")
    name, keys, position, has_gauss, cached = state
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put the global generators back to ``state``; a CUDA state is used as far as there are such devices here."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), device)
