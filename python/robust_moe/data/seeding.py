"""Random generators that are pure functions of what they are for."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["generator"]

STREAMS = {"split": 0, "order": 1, "augment": 2, "flip": 3, "poison": 4}


def generator(seed: int, stream: str, *counters: int) -> torch.Generator:
    """A CPU generator keyed by ``seed``, its use and counters such as (epoch, batch number).

    The key is hashed (NumPy's SeedSequence), so neighbouring seeds and batches are unrelated. On the CPU because its
    numbers are the same whatever device the images are on.
    """
    key = [seed % 2**64, STREAMS[stream], *counters]
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)
